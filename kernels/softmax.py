"""The driver of the single-label family: losses of a row of logits and its class, or the probabilities of its classes.

classes.py has the formulas, rows.py what the driver of two rows has too. A row is one tile, which is read once; a
longer one goes by in tiles, and once more for its gradient.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .classes import FORMULAS, Slopes
from .device import exp_difference, load_as, store_rounded
from .launch import launch_scope
from .operands import Place, load, matrix, pointers_to
from .rows import (
    MANY,
    Config,
    Loss,
    Operands,
    Rows,
    Sums,
    Work,
    factor_of,
    finite,
    load_rows,
    margin_of,
    num_programs,
    num_warps,
    place_of,
    prepare,
    transform,
    upstream_of,
)
from .upstream import Upstream, inverse, receive


class Tile(NamedTuple):
    """Logits [ROWS, BLOCK]."""

    x: Any
    slope: Any  # as in Logits
    at: Any  # whether this is the label's
    spread: Any  # what the target has on each class beside the label; None for nothing
    place: Place


@triton.jit
def _load_tile(operands, rows, start, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What does not count has the logit -inf and no target."""
    lanes = start + tl.arange(0, BLOCK)[None, :]
    col = lanes
    if LAUNCH.wide:
        col = lanes.to(tl.int64)
    valid = rows.kept[:, None]
    if LAUNCH.num_classes % BLOCK != 0:
        valid &= col < LAUNCH.num_classes
    place = place_of(rows.row[:, None], col, valid, LAUNCH)
    if BLOCK >= LAUNCH.num_classes:
        start = place.row * LAUNCH.num_classes
        place = Place(start, tl.zeros_like(place.offs) + col, place.row, col, valid, LAUNCH.num_classes)
    logits = transform(load(operands.inputs, place, -float("inf"), LAUNCH.dtype), LAUNCH)
    spread = None
    if operands.targets is not None:
        spread = load(operands.targets, place, 0.0, LAUNCH.dtype)
        if LAUNCH.loss.smoothing != 0:
            spread = spread * (1.0 - LAUNCH.loss.smoothing) + LAUNCH.loss.smoothing / LAUNCH.num_classes
    elif LAUNCH.loss.smoothing != 0:
        spread = tl.full([ROWS, BLOCK], 1.0, LAUNCH.dtype) * (LAUNCH.loss.smoothing / LAUNCH.num_classes)
    if spread is not None:
        if LAUNCH.loss.spread_weight and operands.weight is not None:
            spread = spread * load_as(operands.weight + place.col, place.col < LAUNCH.num_classes, 0.0, LAUNCH.dtype)
        spread = tl.where(place.valid, spread, 0.0)
    at = None
    if rows.label is not None:
        at = lanes == rows.label[:, None]
    return Tile(logits.x, logits.slope, at, spread, place)


@triton.jit
def _greatest(tile, before, LAUNCH: tl.constexpr):
    """The greatest logit of each row, and the first class that has it."""
    x = tl.max(tile.x, 1)
    label = tl.min(tl.where(tile.x == x[:, None], tile.place.col, LAUNCH.num_classes), 1)
    if before is None:
        return x, label
    else:
        greater = x > before[0]
        return tl.where(greater, x, before[0]), tl.where(greater, label, before[1])


@triton.jit
def _with_label(operands, rows, x, label, LAUNCH: tl.constexpr):
    known = rows.kept & (label < LAUNCH.num_classes)  # where all are NaN, none is the greatest
    slope = None
    if LAUNCH.loss.softcap != 0:
        place = place_of(rows.row, label, known, LAUNCH)
        slope = transform(load(operands.inputs, place, 0.0, LAUNCH.dtype), LAUNCH).slope
    label = tl.where(known, label, -1)
    return Rows(rows.row, rows.kept, label, tl.where(rows.kept, x, 0.0), slope, None, None)


@triton.jit
def _mark(tile, label):
    return Tile(tile.x, tile.slope, tile.place.col == label[:, None], tile.spread, tile.place)


@triton.jit
def _exponentials(tile, top, LAUNCH: tl.constexpr):
    """e^(x - top), 0 at the label."""
    x = tl.where(tile.at, -float("inf"), tile.x)
    return exp_difference(x, finite(top)[:, None], 1.0, LAUNCH.fast)


@triton.jit
def _add(tile, rows, before, LAUNCH: tl.constexpr):
    """Sums over a tile, added to those ``before``; and the exponentials."""
    top = tl.max(tl.where(tile.at, -float("inf"), tile.x), 1)
    if before is not None:
        top = tl.maximum(top, before.top)
    e = _exponentials(tile, top, LAUNCH)
    total = tl.sum(e, 1)
    at, others, distance, mixed = None, None, None, None
    if tile.spread is not None:
        elsewhere = tl.where(tile.at, 0.0, tile.spread)
        if rows.hard is None:
            at = tl.sum(tile.spread - elsewhere, 1)
        others = tl.sum(elsewhere, 1)
        distance = tl.sum(tl.where(elsewhere == 0, 0.0, elsewhere * (rows.x[:, None] - tile.x)), 1)
        mixed = tl.sum(elsewhere * e, 1)
    if before is not None:
        old = exp_difference(before.top, finite(top), 1.0, LAUNCH.fast)
        total += before.total * old
        if at is not None:
            at += before.at
        if tile.spread is not None:
            others += before.others
            distance += before.distance
            mixed += before.mixed * old
    return Sums(top, total, at, others, distance, mixed), e


@triton.jit
def _log_sum(sums, x, margin):
    """log of the sum of e^x over all classes."""
    others = finite(sums.top) + tl.log(sums.total)
    return tl.where(others > x, others + margin.neg_log_q, x + margin.nll)


@triton.jit
def _store_gradient_at_label(grad_ptr, rows, at, LAUNCH: tl.constexpr):
    """In the place of what the tiles left there. To select it in them costs three instructions for every class."""
    if rows.slope is not None:
        at *= rows.slope
    tl.debug_barrier()  # another thread may have stored it
    store_rounded(grad_ptr + rows.row * LAUNCH.num_classes + rows.label, at, rows.label >= 0)


@triton.jit
def _store_gradient(grad_ptr, tile, e, slopes, num_rows, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    gradient = e * slopes.of_e[:, None]
    if tile.spread is not None:
        of_spread = slopes.of_spread[:, None]
        if slopes.of_mixed is not None:
            of_spread += e * slopes.of_mixed[:, None]
        gradient -= tile.spread * of_spread
    if tile.slope is not None:
        gradient *= tile.slope
    place = tile.place
    valid = None
    if LAUNCH.num_classes % BLOCK != 0:
        valid = place.col < LAUNCH.num_classes
    if ROWS > 1:
        valid = place.row < num_rows if valid is None else valid & (place.row < num_rows)
    store_rounded(pointers_to(grad_ptr, place), gradient, valid)


@triton.jit
def _loss_of_rows(work, first, FORMULA: tl.constexpr, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The losses of the rows from the first on, and their gradient, which is stored."""
    operands = work.operands
    num_rows = work.num_rows
    DTYPE: tl.constexpr = LAUNCH.dtype
    C: tl.constexpr = LAUNCH.num_classes
    row = first + tl.arange(0, ROWS)
    if LAUNCH.wide:
        row = row.to(tl.int64)
    rows = load_rows(operands, row, num_rows, LAUNCH)
    # A row that does not count is not gone through; a tile of several is, without being loaded.
    cols = tl.where(tl.max(rows.kept.to(tl.int32)) == 0, 0, C)
    if BLOCK >= C:
        tile = _load_tile(operands, rows, 0, LAUNCH, ROWS, BLOCK)
        if rows.label is None:
            x, label = _greatest(tile, None, LAUNCH)
            rows = _with_label(operands, rows, x, label, LAUNCH)
            tile = _mark(tile, rows.label)
        sums, e = _add(tile, rows, None, LAUNCH)
    else:
        if rows.label is None:
            x = tl.full([ROWS], -float("inf"), DTYPE)
            label = tl.zeros_like(row)
            for start in range(0, cols, BLOCK):
                x, label = _greatest(_load_tile(operands, rows, start, LAUNCH, ROWS, BLOCK), (x, label), LAUNCH)
            rows = _with_label(operands, rows, x, label, LAUNCH)
        zeros = tl.zeros([ROWS], DTYPE)
        sums = Sums(tl.full([ROWS], -float("inf"), DTYPE), zeros, None, None, None, None)
        if LAUNCH.loss.smoothing != 0 or operands.targets is not None:
            sums = Sums(sums.top, zeros, zeros if rows.hard is None else None, zeros, zeros, zeros)
        for start in range(0, cols, BLOCK):
            sums, _ = _add(_load_tile(operands, rows, start, LAUNCH, ROWS, BLOCK), rows, sums, LAUNCH)
        # Triton's pass over loops that add up demands that their results are used once.
        if sums.others is not None:
            sums = Sums(sums.top, sums.total, sums.at, sums.others + 0.0, sums.distance + 0.0, sums.mixed)
        if sums.at is not None:
            sums = Sums(sums.top, sums.total, sums.at + 0.0, sums.others, sums.distance, sums.mixed)

    margin = margin_of(sums, rows.x)
    loss, slopes = FORMULA(margin, rows, sums, LAUNCH.loss.params)
    factor = factor_of(work, row, rows.kept, rows.weight, DTYPE)
    loss = tl.where(rows.kept, loss * factor, 0.0)
    z_slope = None
    if LAUNCH.loss.z_loss != 0:
        lse = _log_sum(sums, rows.x, margin)
        z_factor = LAUNCH.loss.z_loss * inverse(work.z_denominator, DTYPE)
        loss += tl.where(rows.kept, z_factor * lse * lse, 0.0)
        z_slope = 2.0 * z_factor * lse
    if not LAUNCH.reduced and work.loss_ptr is not None:
        store_rounded(work.loss_ptr + row, loss, row < num_rows)

    grad_ptr = work.grad_ptrs[0]
    if grad_ptr is not None:
        upstream = upstream_of(work, row, rows.kept, DTYPE) * LAUNCH.loss.scale
        factor *= upstream
        of_e, at = slopes.of_e * factor, slopes.at * factor
        if z_slope is not None:
            of_e += z_slope * upstream * margin.q * margin.inverse
            at += z_slope * upstream * margin.p
        of_mixed = None
        if slopes.of_mixed is not None:
            of_mixed = slopes.of_mixed * factor
        slopes = Slopes(
            tl.where(rows.kept, of_e, 0.0), of_mixed, slopes.of_spread * factor, tl.where(rows.kept, at, 0.0)
        )
        if BLOCK >= C:
            _store_gradient(grad_ptr, tile, e, slopes, num_rows, LAUNCH, ROWS, BLOCK)
        else:
            # From the end: what was read last is still in the cache.
            for back in range(0, C, BLOCK):
                start = (C - 1) // BLOCK * BLOCK - back
                tile = _load_tile(operands, rows, start, LAUNCH, ROWS, BLOCK)
                e = _exponentials(tile, sums.top, LAUNCH)
                _store_gradient(grad_ptr, tile, e, slopes, num_rows, LAUNCH, ROWS, BLOCK)
        _store_gradient_at_label(grad_ptr, rows, slopes.at, LAUNCH)
    return loss


@triton.jit(do_not_specialize=["denominator", "z_denominator"])
def _softmax_kernel(
    operands,  # Operands
    denominator,  # an integer, or a pointer to a number in []
    z_denominator,  # the same for z_loss
    upstream,  # Upstream
    upstreams_ptr,  # [N], or None
    loss_ptr,  # [N]; when reduced [programs]; or None
    grad_ptr,  # [N, C], or None
    num_rows,
    FORMULA: tl.constexpr,
    LAUNCH: tl.constexpr,  # Launch
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
    work = Work(operands, denominator, z_denominator, value, upstreams_ptr, loss_ptr, (grad_ptr,), num_rows)
    losses = tl.zeros([ROWS], LAUNCH.dtype)
    if LOOP:
        for first in range(pid * ROWS, end, tl.num_programs(0) * ROWS):
            losses += _loss_of_rows(work, first, FORMULA, LAUNCH, ROWS, BLOCK)
    elif pid * ROWS < end:
        losses = _loss_of_rows(work, pid * ROWS, FORMULA, LAUNCH, ROWS, BLOCK)
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(losses))


class _Cut(NamedTuple):
    longest: int  # row that is held in registers; a longer one goes by in tiles, and is read twice
    tile: int
    rows: int  # that share a tile of one warp, which needs no barrier to add up a row
    bytes_a_thread: int  # of a row


# By the registers that a thread keeps of each logit from its load to its store. With more of anything, kernels spill
# (docs/measured.md).
_CUTS = {
    1: _Cut(32768, 8192, 8, 128),
    2: _Cut(8192, 2048, 4, 128),
    3: _Cut(8192, 2048, 4, 64),
    4: _Cut(2048, 1024, 2, 64),
    6: _Cut(2048, 1024, 2, 64),
}
_THREADS_OF_LONG = 256
_TILE = 1024


def row_config(loss_of: Loss, tensors: Operands, compute_dtype: torch.dtype) -> Config:
    """How rows are cut."""
    num_rows, num_classes = tensors.inputs.shape
    size = compute_dtype.itemsize
    weighed = loss_of.spread_weight and tensors.weight is not None
    # Of each logit its exponential, the slope of a cap, and a target; one that only smooths is the same for all classes
    # and needs nothing kept, but beside a cap its sums do.
    spread = tensors.targets is not None or (loss_of.smoothing and (weighed or loss_of.softcap))
    kept = 1 + bool(loss_of.softcap) + bool(spread)
    registers = kept * size // 4
    longest, tile, most_rows, bytes_a_thread = _CUTS[registers]
    if registers == 1 and loss_of.smoothing:  # which adds sums
        longest //= 2
    block = triton.next_power_of_2(num_classes)
    if block > longest:
        threads = _THREADS_OF_LONG if kept == 1 else _THREADS_OF_LONG // 2
        if registers == 2 and loss_of.softcap:  # smaller tiles cost 5 to 10% fewer instructions, and spill a few
            tile, threads = _CUTS[1].tile, _THREADS_OF_LONG
        return Config(1, tile, num_warps(threads), False)
    rows = max(min(_TILE // block, most_rows, triton.next_power_of_2(num_rows)), 1)
    return Config(rows, block, num_warps(rows * block * size // bytes_a_thread), block <= MANY)


def softmax_launcher(
    loss_of: Loss,
    tensors: Operands,
    denominators: tuple[int | Tensor, int | Tensor],
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    compute_dtype: torch.dtype,
    reduced: bool,
    written: bool,
) -> None:
    """Launch one pass; an upstream is a scalar, or ``upstreams`` [N] of the losses. What is written is contiguous.

    The first of the denominators is the loss's, the second that of z_loss; both are divided by here.
    """
    inputs, targets = tensors.inputs, tensors.targets
    cut = row_config(loss_of, tensors, compute_dtype)
    launch = prepare(loss_of, tensors, cut, inputs, compute_dtype=compute_dtype, reduced=reduced, written=written)
    with launch_scope(inputs):
        _softmax_kernel[(num_programs(inputs.shape[0], cut),)](
            tensors._replace(inputs=matrix(inputs), targets=matrix(targets)),
            *denominators,
            upstream,
            upstreams,
            loss,
            grad,
            inputs.shape[0],
            FORMULA=FORMULAS[loss_of.formula],
            LAUNCH=launch,
            LOOP=cut.loop,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )
