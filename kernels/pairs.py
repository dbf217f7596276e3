"""The driver of losses of two rows of logits: distillation, R-Drop, Jensen-Shannon, and of score margins.

With p and q the softmax of both rows, and K(p, q) = sum of p (log p - log q):

============  =====================================  ==========================================================
loss          value                                  gradient at class j
============  =====================================  ==========================================================
distillation  a T^2 K(q, p) + (1 - a) nll            a T (p_j - q_j) + (1 - a) (p_j - [j = t]); p, q at T
R-Drop        (nll + nll') / 2                       (p_j - [j = t]) / 2
              + a (K(p, q) + K(q, p)) / 2            + a (p_j (log p_j / q_j - K(p, q)) + p_j - q_j) / 2
JS            (K(p, m) + K(q, m)) / 2, m = (p+q)/2   p_j (log p_j / m_j - K(p, m)) / 2
margin MSE    sum of (d_0 - d_k)^2, k > 0            -2 (d_0 - d_k), at 0 minus their sum; d = inputs - targets
============  =====================================  ==========================================================

What is summed over a row is relative to its greatest logits, so that rows in parts add up.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import LN2, exp_difference, load_as, sigmoids, store_rounded
from .elements import triton_dtype
from .launch import launch_scope
from .operands import extent, load, matrix
from .softmax import (
    Config,
    Launch,
    Loss,
    Operands,
    Sums,
    finite,
    load_rows,
    margin_of,
    num_programs,
    num_warps,
    place_of,
)
from .upstream import Upstream, inverse, receive


class Side(NamedTuple):
    """Of each row of one of the two."""

    top: Any  # the greatest logit
    total: Any  # of e^((x - top) / T)
    others: Any  # of e^(x - top), without the label's; None without labels
    cross: Any  # of e^((x - top) / T) (x - top - (y - top_y)), with the other's y; None where it is not needed


class Scores(NamedTuple):
    """Of each row of scores."""

    first: Any  # d_0
    squares: Any
    differences: Any


class Outcome(NamedTuple):
    """Of each row."""

    loss: Any
    slopes: Any  # what the gradient needs; None for no more than the sums


class Gradient(NamedTuple):
    x: Any  # None where it is not wanted
    y: Any


class Tile(NamedTuple):
    """Two rows' logits [ROWS, BLOCK]."""

    x: Any
    y: Any
    at: Any  # whether these are the label's; None without labels
    place: Any


class Labels(NamedTuple):
    """Of each row, [ROWS]."""

    row: Any
    kept: Any
    label: Any  # None without labels
    x: Any  # the label's logits
    y: Any


@triton.jit
def _terms(x, top, y, top_y, T: tl.constexpr, FAST: tl.constexpr):
    """e^((x - top) / T), and how far x is above y, each relative to its top."""
    e = exp_difference(x, top[:, None], 1.0 / T, FAST)
    return e, tl.where(e == 0, 0.0, (x - top[:, None]) - (y - top_y[:, None]))


@triton.jit
def _others(x, e, at, top, T: tl.constexpr, FAST: tl.constexpr):
    """e^(x - top), 0 at the label."""
    if T != 1:
        e = exp_difference(x, top[:, None], 1.0, FAST)
    return tl.where(at, 0.0, e)


@triton.jit
def _side(tile_x, tile_y, at, top, top_y, before, shift_y, T: tl.constexpr, CROSS: tl.constexpr, FAST: tl.constexpr):
    """Sums over a tile, added to those ``before``, whose partner moves by ``shift_y``."""
    e, above = _terms(tile_x, top, tile_y, top_y, T, FAST)
    total = tl.sum(e, 1)
    others, cross = None, None
    if CROSS:
        cross = tl.sum(e * above, 1)
    if at is not None:
        others = tl.sum(_others(tile_x, e, at, top, T, FAST), 1)
    if before is not None:
        old = exp_difference(before.top, top, 1.0 / T, FAST)
        total += before.total * old
        if CROSS:
            shift = finite(before.top) - top - shift_y
            cross += tl.where(before.total == 0, 0.0, old * (before.cross + before.total * shift))
        if at is not None:
            others += before.others * exp_difference(before.top, top, 1.0, FAST)
    return Side(top, total, others, cross)


@triton.jit
def softmaxes(tile, before, T: tl.constexpr, CROSS_X: tl.constexpr, CROSS_Y: tl.constexpr, FAST: tl.constexpr):
    """The sums of both sides."""
    top_x, top_y = tl.max(tile.x, 1), tl.max(tile.y, 1)
    before_x, before_y, shift_x, shift_y = None, None, 0.0, 0.0
    if before is not None:
        before_x, before_y = before
        top_x, top_y = tl.maximum(top_x, before_x.top), tl.maximum(top_y, before_y.top)
        shift_x = finite(before_x.top) - finite(top_x)
        shift_y = finite(before_y.top) - finite(top_y)
    top_x, top_y = finite(top_x), finite(top_y)
    return (
        _side(tile.x, tile.y, tile.at, top_x, top_y, before_x, shift_y, T, CROSS_X, FAST),
        _side(tile.y, tile.x, tile.at, top_y, top_x, before_y, shift_x, T, CROSS_Y, FAST),
    )


@triton.jit
def _nll(side, x):
    """Cross-entropy of the label, and the factors of its gradient: of e^(x - top), and at the label."""
    margin = margin_of(Sums(side.top, side.others, None, None, None, None), x)
    return margin.nll, margin.q * margin.inverse, -margin.q


@triton.jit
def _log_ratio(side, other):
    return tl.log(side.total) - tl.log(other.total)


@triton.jit
def add_distillation(tile, before, labels, PARAMS: tl.constexpr, FAST: tl.constexpr):
    return softmaxes(tile, before, PARAMS[0], False, True, FAST)


@triton.jit
def distillation(sums, labels, PARAMS: tl.constexpr):
    T: tl.constexpr = PARAMS[0]
    student, teacher = sums
    loss = T * T * (teacher.cross / (T * teacher.total) + _log_ratio(student, teacher))
    if labels.label is None:
        return Outcome(loss, None)
    else:
        nll, others, at = _nll(student, labels.x)
        hard: tl.constexpr = 1.0 - PARAMS[1]
        return Outcome(PARAMS[1] * loss + hard * nll, (others * hard, at * hard))


@triton.jit
def distillation_gradient(tile, sums, slopes, WANTED: tl.constexpr, PARAMS: tl.constexpr, FAST: tl.constexpr):
    T: tl.constexpr = PARAMS[0]
    student, teacher = sums
    e, _ = _terms(tile.x, student.top, tile.y, teacher.top, T, FAST)
    e_teacher, _ = _terms(tile.y, teacher.top, tile.x, student.top, T, FAST)
    share: tl.constexpr = T if tile.at is None else T * PARAMS[1]
    gradient = e * (share / student.total)[:, None] - e_teacher * (share / teacher.total)[:, None]
    if tile.at is not None:
        others = _others(tile.x, e, tile.at, student.top, T, FAST)
        gradient += others * slopes[0][:, None] + tl.where(tile.at, slopes[1][:, None], 0.0)
    return Gradient(gradient, None)


@triton.jit
def add_r_drop(tile, before, labels, PARAMS: tl.constexpr, FAST: tl.constexpr):
    return softmaxes(tile, before, 1.0, True, True, FAST)


@triton.jit
def r_drop(sums, labels, PARAMS: tl.constexpr):
    a, b = sums
    nll_a, others_a, at_a = _nll(a, labels.x)
    nll_b, others_b, at_b = _nll(b, labels.y)
    ratio = _log_ratio(a, b)
    kl_ab = a.cross / a.total - ratio
    kl_ba = b.cross / b.total + ratio
    loss = 0.5 * (nll_a + nll_b + PARAMS[0] * (kl_ab + kl_ba))
    return Outcome(loss, (others_a, at_a, kl_ab, others_b, at_b, kl_ba, ratio))


@triton.jit
def r_drop_gradient(tile, sums, slopes, WANTED: tl.constexpr, PARAMS: tl.constexpr, FAST: tl.constexpr):
    HALF_ALPHA: tl.constexpr = 0.5 * PARAMS[0]
    a, b = sums
    others_a, at_a, kl_ab, others_b, at_b, kl_ba, ratio = slopes
    e_a, above_a = _terms(tile.x, a.top, tile.y, b.top, 1.0, FAST)
    e_b, above_b = _terms(tile.y, b.top, tile.x, a.top, 1.0, FAST)
    p, q = e_a * (1.0 / a.total)[:, None], e_b * (1.0 / b.total)[:, None]
    of_a, of_b = None, None
    if WANTED[0]:
        of_a = tl.where(tile.at, (0.5 * at_a)[:, None], e_a * (0.5 * others_a)[:, None])
        log_ratio = tl.where(e_a == 0, 0.0, above_a - (ratio + kl_ab)[:, None])
        of_a += HALF_ALPHA * (p * log_ratio + p - q)
    if WANTED[1]:
        of_b = tl.where(tile.at, (0.5 * at_b)[:, None], e_b * (0.5 * others_b)[:, None])
        log_ratio = tl.where(e_b == 0, 0.0, above_b + (ratio - kl_ba)[:, None])
        of_b += HALF_ALPHA * (q * log_ratio + q - p)
    return Gradient(of_a, of_b)


@triton.jit
def add_js(tile, before, labels, PARAMS: tl.constexpr, FAST: tl.constexpr):
    return softmaxes(tile, before, 1.0, False, False, FAST)


@triton.jit
def _mixture(tile, sums, FAST: tl.constexpr):
    """p, q, log p / m and log q / m, which are 0 where p or q are."""
    a, b = sums
    e_a, above = _terms(tile.x, a.top, tile.y, b.top, 1.0, FAST)
    e_b, below = _terms(tile.y, b.top, tile.x, a.top, 1.0, FAST)
    ratio = _log_ratio(a, b)[:, None]
    above = tl.where(e_a == 0, -below, above) - ratio  # log p / q
    _, _, more, less = sigmoids(-above, FAST)
    log_p = tl.where(e_a == 0, 0.0, LN2 - more)
    log_q = tl.where(e_b == 0, 0.0, LN2 - less)
    return e_a * (1.0 / a.total)[:, None], e_b * (1.0 / b.total)[:, None], log_p, log_q


@triton.jit
def add_mixture(tile, sums, before, FAST: tl.constexpr):
    """K(p, m) and K(q, m), of which JS is made; they need the sums of whole rows."""
    p, q, log_p, log_q = _mixture(tile, sums, FAST)
    return before[0] + tl.sum(p * log_p, 1), before[1] + tl.sum(q * log_q, 1)


@triton.jit
def js_gradient(tile, sums, slopes, WANTED: tl.constexpr, PARAMS: tl.constexpr, FAST: tl.constexpr):
    p, q, log_p, log_q = _mixture(tile, sums, FAST)
    return Gradient(0.5 * p * (log_p - slopes[0][:, None]), 0.5 * q * (log_q - slopes[1][:, None]))


@triton.jit
def add_margins(tile, before, labels, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """The first score is every row's label."""
    counts = tile.place.valid & (tile.place.col > 0)
    first = labels.x - labels.y
    difference = tl.where(counts, first[:, None] - (tile.x - tile.y), 0.0)
    squares, differences = tl.sum(difference * difference, 1), tl.sum(difference, 1)
    if before is not None:
        squares += before.squares
        differences += before.differences
    return Scores(first, squares, differences)


@triton.jit
def margins(sums, labels, PARAMS: tl.constexpr):
    return Outcome(sums.squares, None)


@triton.jit
def margins_gradient(tile, sums, slopes, WANTED: tl.constexpr, PARAMS: tl.constexpr, FAST: tl.constexpr):
    gradient = -2.0 * (sums.first[:, None] - (tile.x - tile.y))
    gradient = tl.where(tile.place.col == 0, 2.0 * sums.differences[:, None], gradient)
    return Gradient(gradient, -gradient)


class Formula(NamedTuple):
    add: Any  # the sums of a tile
    loss: Any  # of rows, and what their gradient needs; None for JS, whose loss is a second sum
    gradient: Any  # of both tiles
    of_first: bool = False  # the label is the first class


FORMULAS = {
    "distillation": Formula(add_distillation, distillation, distillation_gradient),
    "r_drop": Formula(add_r_drop, r_drop, r_drop_gradient),
    "js": Formula(add_js, None, js_gradient),
    "margin_mse": Formula(add_margins, margins, margins_gradient, of_first=True),
}


@triton.jit
def _load_labels(operands, row, num_rows, FIRST: tl.constexpr, LAUNCH: tl.constexpr):
    """Each row's label, which with FIRST is 0."""
    if FIRST:
        kept = row < num_rows
        place = place_of(row, tl.zeros_like(row), kept, LAUNCH)
        x = load(operands.inputs, place, 0.0, LAUNCH.dtype)
        return Labels(row, kept, None, x, load(operands.targets, place, 0.0, LAUNCH.dtype))
    elif operands.labels is None:
        return Labels(row, row < num_rows, None, None, None)
    else:
        of_x = load_rows(operands, row, num_rows, LAUNCH)
        other = Operands(operands.targets, None, operands.labels, None, None, ())
        return Labels(row, of_x.kept, of_x.label, of_x.x, load_rows(other, row, num_rows, LAUNCH).x)


@triton.jit
def _load_tile(operands, labels, start, LAUNCH: tl.constexpr, BLOCK: tl.constexpr):
    col = start + tl.arange(0, BLOCK)[None, :]
    if LAUNCH.wide:
        col = col.to(tl.int64)
    place = place_of(labels.row[:, None], col, labels.kept[:, None] & (col < LAUNCH.num_classes), LAUNCH)
    x = load(operands.inputs, place, -float("inf"), LAUNCH.dtype)
    y = load(operands.targets, place, -float("inf"), LAUNCH.dtype)
    return Tile(x, y, None if labels.label is None else col == labels.label[:, None], place)


@triton.jit
def _store(grad_ptr, tile, gradient, factor, num_rows, LAUNCH: tl.constexpr):
    gradient = tl.where((factor == 0)[:, None], 0.0, gradient * factor[:, None])  # a row that does not count has NaN
    place = tile.place
    store_rounded(grad_ptr + place.offs, gradient, (place.row < num_rows) & (place.col < LAUNCH.num_classes))


@triton.jit
def _store_both(
    grad_ptrs,
    tile,
    sums,
    slopes,
    factor,
    num_rows,
    FORMULA: tl.constexpr,
    WANTED: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    gradient = FORMULA.gradient(tile, sums, slopes, WANTED, LAUNCH.loss.params, LAUNCH.fast)
    if WANTED[0]:
        _store(grad_ptrs[0], tile, gradient.x, factor, num_rows, LAUNCH)
    if WANTED[1]:
        _store(grad_ptrs[1], tile, gradient.y, factor, num_rows, LAUNCH)


@triton.jit
def _loss_of_rows(
    operands,
    denominator,
    upstream,
    upstreams_ptr,
    loss_ptr,
    grad_ptrs,
    first,
    num_rows,
    FORMULA: tl.constexpr,
    WANTED: tl.constexpr,
    LAUNCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of the rows from the first on, and their gradients, which are stored."""
    DTYPE: tl.constexpr = LAUNCH.dtype
    PARAMS: tl.constexpr = LAUNCH.loss.params
    C: tl.constexpr = LAUNCH.num_classes
    row = first + tl.arange(0, ROWS)
    labels = _load_labels(operands, row, num_rows, FORMULA.of_first, LAUNCH)
    tile = _load_tile(operands, labels, 0, LAUNCH, BLOCK)
    sums = FORMULA.add(tile, None, labels, PARAMS, LAUNCH.fast)
    if BLOCK < C:
        for start in range(BLOCK, C, BLOCK):
            sums = FORMULA.add(_load_tile(operands, labels, start, LAUNCH, BLOCK), sums, labels, PARAMS, LAUNCH.fast)
    if FORMULA.loss is None:
        slopes = (tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE))
        if BLOCK < C:
            for start in range(0, C, BLOCK):
                slopes = add_mixture(_load_tile(operands, labels, start, LAUNCH, BLOCK), sums, slopes, LAUNCH.fast)
        else:
            slopes = add_mixture(tile, sums, slopes, LAUNCH.fast)
        loss = 0.5 * (slopes[0] + slopes[1])
    else:
        outcome = FORMULA.loss(sums, labels, PARAMS)
        loss, slopes = outcome.loss, outcome.slopes

    factor = tl.where(labels.kept, inverse(denominator, DTYPE), 0.0)
    for i in tl.static_range(len(operands.factors)):
        factor *= load_as(operands.factors[i] + row, row < num_rows, 0.0, DTYPE)
    loss = tl.where(labels.kept, loss * factor, 0.0)
    if not LAUNCH.reduced and loss_ptr is not None:
        store_rounded(loss_ptr + row, loss, row < num_rows)

    if WANTED[0] or WANTED[1]:
        factor *= upstream
        if upstreams_ptr is not None:
            factor *= load_as(upstreams_ptr + row, row < num_rows, 0.0, DTYPE)
        if BLOCK < C:
            # From the end: what was read last is still in the cache.
            for back in range(0, C, BLOCK):
                tile = _load_tile(operands, labels, (C - 1) // BLOCK * BLOCK - back, LAUNCH, BLOCK)
                _store_both(grad_ptrs, tile, sums, slopes, factor, num_rows, FORMULA, WANTED, LAUNCH)
        else:
            _store_both(grad_ptrs, tile, sums, slopes, factor, num_rows, FORMULA, WANTED, LAUNCH)
    return loss


@triton.jit(do_not_specialize=["denominator"])
def _pairs_kernel(
    operands,  # softmax.Operands; targets are the second logits
    denominator,  # an integer, or a pointer to a number in []
    upstream,  # Upstream
    upstreams_ptr,  # [N], or None
    loss_ptr,  # [N]; when reduced [programs]; or None
    grad_ptrs,  # each [N, C], or None
    num_rows,
    FORMULA: tl.constexpr,  # Formula
    WANTED: tl.constexpr,  # which gradients
    LAUNCH: tl.constexpr,  # softmax.Launch
    LOOP: tl.constexpr,  # programs take rows in turn; else each has its own, and more registers
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    value, done = receive(upstream, pid, LAUNCH.written, LAUNCH.dtype)
    end = num_rows
    if LAUNCH.written:
        end = tl.where(done, 0, num_rows)
    losses = tl.zeros([ROWS], LAUNCH.dtype)
    if LOOP:
        for first in range(pid * ROWS, end, tl.num_programs(0) * ROWS):
            losses += _loss_of_rows(
                operands,
                denominator,
                value,
                upstreams_ptr,
                loss_ptr,
                grad_ptrs,
                first,
                num_rows,
                FORMULA,
                WANTED,
                LAUNCH,
                ROWS,
                BLOCK,
            )
    elif pid * ROWS < end:
        losses = _loss_of_rows(
            operands,
            denominator,
            value,
            upstreams_ptr,
            loss_ptr,
            grad_ptrs,
            pid * ROWS,
            num_rows,
            FORMULA,
            WANTED,
            LAUNCH,
            ROWS,
            BLOCK,
        )
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(losses))


# Two rows in registers, 16 logits of each a thread of four bytes; longer ones in tiles, read once more for the
# gradient.
_LONGEST, _BYTES_A_THREAD, _TILE_OF_LONG = 8192, 64, 4096
# Shorter rows share a tile of one warp.
_TILE, _MOST_ROWS = 512, 8
# Programs take rows in turn where there may be many.
_LONG = 4096


def pair_config(inputs: Tensor, compute_dtype: torch.dtype) -> Config:
    """How rows are cut."""
    num_rows, num_classes = inputs.shape
    size = compute_dtype.itemsize
    block = triton.next_power_of_2(num_classes)
    if block * size > 4 * _LONGEST:
        block = _TILE_OF_LONG * 4 // size
    rows = max(min(_TILE // block, _MOST_ROWS, triton.next_power_of_2(num_rows)), 1)
    return Config(rows, block, num_warps(rows * block * size // _BYTES_A_THREAD), num_classes <= _LONG)


def pairs_launcher(
    loss_of: Loss,
    tensors: Operands,
    denominator: int | Tensor,
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    *,
    compute_dtype: torch.dtype,
    reduced: bool,
    written: bool,
) -> None:
    """Launch one pass; an upstream is a scalar, or ``upstreams`` [N] of the losses. What is written is contiguous."""
    inputs, targets = tensors.inputs, tensors.targets
    cut = pair_config(inputs, compute_dtype)
    last_offset = max(inputs.numel(), extent(inputs), extent(targets))
    launch = Launch(
        loss=loss_of,
        num_classes=inputs.shape[1],
        reduced=reduced,
        written=written,
        fast=inputs.element_size() == targets.element_size() == 2 and compute_dtype == torch.float32,
        wide=last_offset + cut.rows * cut.block >= 2**31,
        dtype=triton_dtype(compute_dtype),
    )
    with launch_scope(inputs):
        _pairs_kernel[(num_programs(inputs.shape[0], cut),)](
            tensors._replace(inputs=matrix(inputs), targets=matrix(targets)),
            denominator,
            upstream,
            upstreams,
            loss,
            grads,
            inputs.shape[0],
            FORMULA=FORMULAS[loss_of.formula],
            WANTED=tuple(grad is not None for grad in grads),
            LAUNCH=launch,
            LOOP=cut.loop,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )
