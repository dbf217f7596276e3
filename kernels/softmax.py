"""The driver of the single-label family: losses of a row of logits and its class, or the probabilities of its classes.

A label t makes softmax a sigmoid: with u = log(sum of e^(x_j), j != t) - x_t, the probability of the label is
p = sigmoid(-u), of all others q = sigmoid(u), and cross-entropy is softplus(u). Each is relatively accurate to its end,
since the label's own exponential is never added and subtracted again. Class probabilities have no t: there the class of
the greatest logit stands in its place.

A target that is not on the label alone (smoothing, class probabilities) adds b_c to each class. With
R = B softplus(u) + sum of b_c (x_t - x_c), where B is all of the target:

=============  ================================  =====================================================
loss           value                             derivative in u
=============  ================================  =====================================================
cross-entropy  R                                 B q
focal          q^g R                             q^g (B q + g p R)
poly           R + eps sum of a_c (1 - p_c)      B q + eps p q a_t + ..., see ``poly``
=============  ================================  =====================================================

and d/dx_j = (derivative in u) e_j / sum - b_j (j != t), and at t what makes the sum over classes 0.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import exp_difference, load_as, power, sigmoids, store_rounded, tanh, two_sum
from .elements import triton_dtype
from .launch import launch_scope
from .operands import Place, extent, load, matrix
from .upstream import Upstream, inverse, receive


class Operands(NamedTuple):
    """What a kernel reads: matrices [N, C] of any strides, and contiguous vectors."""

    inputs: Any
    targets: Any  # class probabilities, or None
    labels: Any  # [N], or None
    weight: Any  # [C], or None
    margins: Any  # [C], or None
    factors: tuple[Any, ...]  # each [N], multiplies the loss of its row


class Loss(NamedTuple):
    """What a loss is, beside its tensors."""

    formula: str
    params: tuple[float, ...]
    smoothing: float
    ignored: int
    softcap: float
    scale: float  # of the logits
    z_loss: float
    spread_weight: bool  # the weight is each class's own; else that of the label


class Launch(NamedTuple):
    """What is compiled in."""

    loss: Loss
    num_classes: int
    reduced: bool
    written: bool  # grad is written already, for the upstream that was expected
    fast: bool
    wide: bool  # offsets past 2^31
    dtype: tl.dtype


class Logits(NamedTuple):
    """As the loss is of them."""

    x: Any
    slope: Any  # the derivative in the given ones, without the scale; None for 1


class Tile(NamedTuple):
    """Logits [ROWS, BLOCK]."""

    x: Any
    slope: Any  # as in Logits
    at: Any  # whether this is the label's
    spread: Any  # what the target has on each class beside the label; None for nothing
    place: Place


class Rows(NamedTuple):
    """Of each row, [ROWS]."""

    row: Any
    kept: Any
    label: Any
    x: Any  # the label's logit
    weight: Any  # the label's; None for 1
    hard: Any  # what the target has on the label alone; None for nothing


class Sums(NamedTuple):
    """Over the classes of each row, all but ``at`` without the label's."""

    top: Any  # the greatest logit
    total: Any  # of e^(x - top)
    at: Any  # of the target, the label's beside ``hard``; None for 0, as the rest
    others: Any  # of the target
    distance: Any  # spread (x_t - x)
    mixed: Any  # spread e^(x - top)


class Margin(NamedTuple):
    """What u gives."""

    p: Any
    q: Any
    nll: Any  # -log p
    neg_log_q: Any
    inverse: Any  # 1 / Sums.total, 0 for none


class Slopes(NamedTuple):
    """The gradient at class j is e_j (of_e - of_mixed b_j) - of_spread b_j, and at the label its own."""

    of_e: Any
    of_mixed: Any  # None for 0
    of_spread: Any
    at: Any


@triton.jit
def _at_label(hard, sums):
    """What the target has on the label."""
    if hard is None:
        return sums.at
    elif sums.at is None:
        return hard
    else:
        return hard + sums.at


@triton.jit
def cross_entropy(margin, rows, sums, PARAMS: tl.constexpr):
    total = _at_label(rows.hard, sums)
    at = -total * margin.q
    loss = total * margin.nll
    if sums.others is not None:
        total += sums.others
        at += sums.others * margin.p  # of all that is not the label's, no difference
        loss = total * margin.nll
        loss += tl.where(margin.nll == float("inf"), 0.0, sums.distance)  # of which both are infinite
    return loss, Slopes(total * margin.q * margin.inverse, None, tl.full([], 1.0, loss.dtype), at)


@triton.jit
def focal(margin, rows, sums, PARAMS: tl.constexpr):
    GAMMA: tl.constexpr = PARAMS[0]
    nll, of = cross_entropy(margin, rows, sums, PARAMS)
    factor = power(margin.q, margin.neg_log_q, GAMMA, False)
    slope = tl.where(margin.p == 0, 0.0, factor * GAMMA * margin.p * nll)  # of an infinite loss, too
    return factor * nll, Slopes(factor * of.of_e + slope * margin.inverse, None, factor, factor * of.at - slope)


@triton.jit
def poly(margin, rows, sums, PARAMS: tl.constexpr):
    """With a the whole target: + eps sum of a_c (1 - p_c)."""
    EPSILON: tl.constexpr = PARAMS[0]
    loss, of = cross_entropy(margin, rows, sums, PARAMS)
    p, q = margin.p, margin.q
    if sums.others is None:
        loss += EPSILON * rows.hard * q
        slope = EPSILON * rows.hard * p * q
        return loss, Slopes(of.of_e + slope * margin.inverse, None, of.of_spread, of.at - slope)
    else:
        at_label = _at_label(rows.hard, sums)
        mixed = sums.mixed * margin.inverse
        loss += EPSILON * (at_label * q + sums.others - mixed * q)
        of_e = of.of_e + EPSILON * q * (at_label * p + mixed * q) * margin.inverse
        at = of.at - EPSILON * p * q * (at_label - mixed)
        return loss, Slopes(of_e, EPSILON * q * margin.inverse, of.of_spread, at)


@triton.jit
def z_loss(margin, rows, sums, PARAMS: tl.constexpr):
    """What z_loss adds, alone."""
    zero = margin.nll * 0.0
    return zero, Slopes(zero, None, zero, zero)


FORMULAS = {"z_loss": z_loss, "cross_entropy": cross_entropy, "focal": focal, "poly": poly, "ldam": cross_entropy}


@triton.jit
def transform(x, LAUNCH: tl.constexpr):
    """The logits, capped or scaled."""
    slope = None
    if LAUNCH.loss.softcap != 0:
        ratio = tanh(x * (1.0 / LAUNCH.loss.softcap))
        slope = 1.0 - ratio * ratio
        x = tl.where(x == -float("inf"), x, LAUNCH.loss.softcap * ratio)
    if LAUNCH.loss.scale != 1:
        x *= LAUNCH.loss.scale
    return Logits(x, slope)


@triton.jit
def load_rows(operands, row, num_rows, LAUNCH: tl.constexpr):
    """What each row has beside its logits; without labels, the greatest logit is still to be found."""
    DTYPE: tl.constexpr = LAUNCH.dtype
    kept = row < num_rows
    if operands.labels is None:
        return Rows(row, kept, None, None, None, None)
    else:
        C: tl.constexpr = LAUNCH.num_classes
        label = tl.load(operands.labels + row, kept, 0)
        kept &= label != LAUNCH.loss.ignored
        known = kept & (label >= 0) & (label < C)
        place = place_of(row, label, known, LAUNCH)
        x = transform(load(operands.inputs, place, 0.0, DTYPE), LAUNCH).x
        if operands.margins is not None:
            x -= LAUNCH.loss.scale * load_as(operands.margins + label, known, 0.0, DTYPE)
        x = tl.where(kept & ~known, float("nan"), x)  # a label out of range is loud
        weight = None
        hard = tl.where(kept, 1.0, 0.0).to(DTYPE) * (1.0 - LAUNCH.loss.smoothing)
        if operands.weight is not None:
            weight = load_as(operands.weight + label, known, 0.0, DTYPE)
            if LAUNCH.loss.spread_weight:
                hard *= weight
                weight = None
        return Rows(row, kept, label, x, weight, hard)


@triton.jit
def place_of(row, col, valid, LAUNCH: tl.constexpr):
    return Place(row * LAUNCH.num_classes + col, row, col, valid, LAUNCH.num_classes)


@triton.jit
def _load_tile(operands, rows, start, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What does not count has the logit -inf and no target."""
    col = start + tl.arange(0, BLOCK)[None, :]
    if LAUNCH.wide:
        col = col.to(tl.int64)
    valid = rows.kept[:, None]
    if LAUNCH.num_classes % BLOCK != 0:
        valid &= col < LAUNCH.num_classes
    place = place_of(rows.row[:, None], col, valid, LAUNCH)
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
        at = place.col == rows.label[:, None]
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
def _with_label(rows, x, label):
    return Rows(rows.row, rows.kept, label, tl.where(rows.kept, x, 0.0), None, None)


@triton.jit
def _mark(tile, label):
    return Tile(tile.x, tile.slope, tile.place.col == label[:, None], tile.spread, tile.place)


@triton.jit
def finite(top):
    return tl.where(top == -float("inf"), 0.0, top)


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
        at = tl.sum(tile.spread - elsewhere, 1)
        others = tl.sum(elsewhere, 1)
        distance = tl.sum(tl.where(elsewhere == 0, 0.0, elsewhere * (rows.x[:, None] - tile.x)), 1)
        mixed = tl.sum(elsewhere * e, 1)
    if before is not None:
        old = exp_difference(before.top, finite(top), 1.0, LAUNCH.fast)
        total += before.total * old
        if tile.spread is not None:
            at += before.at
            others += before.others
            distance += before.distance
            mixed += before.mixed * old
    return Sums(top, total, at, others, distance, mixed), e


@triton.jit
def margin_of(sums, x):
    """u, and what the rounding of it lost, as the probabilities and their logarithms."""
    distance, low = two_sum(finite(sums.top), -x)
    u, lost = two_sum(distance, tl.log(sums.total))
    lost += low
    lost = tl.where(lost == lost, lost, 0.0)  # of infinities
    p, q, nll, neg_log_q = sigmoids(u, False)
    nll += q * lost
    neg_log_q -= p * lost
    return Margin(p - p * q * lost, q + p * q * lost, nll, neg_log_q, tl.where(sums.total == 0, 0.0, 1.0 / sums.total))


@triton.jit
def _log_sum(sums, x, margin):
    """log of the sum of e^x over all classes."""
    others = finite(sums.top) + tl.log(sums.total)
    return tl.where(others > x, others + margin.neg_log_q, x + margin.nll)


@triton.jit
def _store_gradient(grad_ptr, tile, e, slopes, num_rows, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    gradient = e * slopes.of_e[:, None]
    if tile.spread is not None:
        of_spread = slopes.of_spread[:, None]
        if slopes.of_mixed is not None:
            of_spread += e * slopes.of_mixed[:, None]
        gradient -= tile.spread * of_spread
    gradient = tl.where(tile.at, slopes.at[:, None], gradient)
    if tile.slope is not None:
        gradient *= tile.slope
    place = tile.place
    valid = None
    if LAUNCH.num_classes % BLOCK != 0:
        valid = place.col < LAUNCH.num_classes
    if ROWS > 1:
        valid = place.row < num_rows if valid is None else valid & (place.row < num_rows)
    store_rounded(grad_ptr + place.offs, gradient, valid)


@triton.jit
def _loss_of_rows(
    operands,
    denominator,
    z_denominator,
    upstream,
    upstreams_ptr,
    loss_ptr,
    grad_ptr,
    first,
    num_rows,
    FORMULA: tl.constexpr,
    LAUNCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of the rows from the first on, and their gradient, which is stored."""
    DTYPE: tl.constexpr = LAUNCH.dtype
    C: tl.constexpr = LAUNCH.num_classes
    row = first + tl.arange(0, ROWS)
    rows = load_rows(operands, row, num_rows, LAUNCH)
    # A row that does not count is not gone through; a tile of several is, without being loaded.
    cols = tl.where(tl.max(rows.kept.to(tl.int32)) == 0, 0, C)
    if BLOCK >= C:
        tile = _load_tile(operands, rows, 0, LAUNCH, ROWS, BLOCK)
        if rows.label is None:
            x, label = _greatest(tile, None, LAUNCH)
            rows = _with_label(rows, x, label)
            tile = _mark(tile, label)
        sums, e = _add(tile, rows, None, LAUNCH)
    else:
        if rows.label is None:
            x = tl.full([ROWS], -float("inf"), DTYPE)
            label = tl.zeros_like(row)
            for start in range(0, cols, BLOCK):
                x, label = _greatest(_load_tile(operands, rows, start, LAUNCH, ROWS, BLOCK), (x, label), LAUNCH)
            rows = _with_label(rows, x, label)
        zeros = tl.zeros([ROWS], DTYPE)
        sums = Sums(tl.full([ROWS], -float("inf"), DTYPE), zeros, None, None, None, None)
        if LAUNCH.loss.smoothing != 0 or operands.targets is not None:
            sums = Sums(sums.top, zeros, zeros, zeros, zeros, zeros)
        for start in range(0, cols, BLOCK):
            sums, _ = _add(_load_tile(operands, rows, start, LAUNCH, ROWS, BLOCK), rows, sums, LAUNCH)
        if sums.others is not None:  # Triton's pass over loops that add up demands that their results are used once
            sums = Sums(sums.top, sums.total, sums.at + 0.0, sums.others + 0.0, sums.distance + 0.0, sums.mixed)

    margin = margin_of(sums, rows.x)
    loss, slopes = FORMULA(margin, rows, sums, LAUNCH.loss.params)
    factor = tl.where(rows.kept, inverse(denominator, DTYPE), 0.0)
    if rows.weight is not None:
        factor *= rows.weight
    for i in tl.static_range(len(operands.factors)):
        factor *= load_as(operands.factors[i] + row, row < num_rows, 0.0, DTYPE)
    loss = tl.where(rows.kept, loss * factor, 0.0)
    z_slope = None
    if LAUNCH.loss.z_loss != 0:
        lse = _log_sum(sums, rows.x, margin)
        z_factor = tl.where(rows.kept, LAUNCH.loss.z_loss * inverse(z_denominator, DTYPE), 0.0)
        loss += tl.where(rows.kept, z_factor * lse * lse, 0.0)
        z_slope = 2.0 * z_factor * lse
    if not LAUNCH.reduced and loss_ptr is not None:
        store_rounded(loss_ptr + row, loss, row < num_rows)

    if grad_ptr is not None:
        of_all = upstream * LAUNCH.loss.scale
        if upstreams_ptr is not None:
            of_all *= load_as(upstreams_ptr + row, row < num_rows, 0.0, DTYPE)
        factor *= of_all
        of_e, at = slopes.of_e * factor, slopes.at * factor
        if z_slope is not None:
            of_e += z_slope * of_all * margin.q * margin.inverse
            at += z_slope * of_all * margin.p
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
    losses = tl.zeros([ROWS], LAUNCH.dtype)
    if LOOP:
        for first in range(pid * ROWS, end, tl.num_programs(0) * ROWS):
            losses += _loss_of_rows(
                operands,
                denominator,
                z_denominator,
                value,
                upstreams_ptr,
                loss_ptr,
                grad_ptr,
                first,
                num_rows,
                FORMULA,
                LAUNCH,
                ROWS,
                BLOCK,
            )
    elif pid * ROWS < end:
        losses = _loss_of_rows(
            operands,
            denominator,
            z_denominator,
            value,
            upstreams_ptr,
            loss_ptr,
            grad_ptr,
            pid * ROWS,
            num_rows,
            FORMULA,
            LAUNCH,
            ROWS,
            BLOCK,
        )
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(losses))


# A row in registers, 32 logits a thread of four bytes: the longest one where nothing else has to be there, half of it
# where there is more to compute, a quarter of it beside class probabilities.
_LONGEST, _BYTES_A_THREAD = 32768, 128
# Longer rows in tiles, read twice; the second time from the end, which the L2 cache of a GPU still holds.
_TILE_OF_LONG, _THREADS_OF_LONG = 8192, 256
# Shorter rows share a tile of one warp, which needs no barrier to add up a row.
_TILE, _MOST_ROWS = 1024, 8
# Enough programs to fill the largest GPU several times over, and few enough for one program to add up their sums; of
# long rows there are never so many.
_MAX_PROGRAMS, _LONG = 8192, 4096


class Config(NamedTuple):
    rows: int
    block: int
    num_warps: int
    loop: bool  # programs take rows in turn


def num_warps(threads: int) -> int:
    return max(threads // device.LANES, 1)


def row_config(inputs: Tensor, loss_of: Loss, targets: Tensor | None, compute_dtype: torch.dtype) -> Config:
    """How rows are cut."""
    num_rows, num_classes = inputs.shape
    size = compute_dtype.itemsize
    longest = _LONGEST
    if targets is not None:
        longest //= 4
    elif size == 8 or loss_of.smoothing or loss_of.softcap:
        longest //= 2
    block = triton.next_power_of_2(num_classes)
    if block * size > 4 * longest:
        return Config(1, _TILE_OF_LONG * 16 // size**2, _THREADS_OF_LONG // device.LANES, False)
    rows = max(min(_TILE // block, _MOST_ROWS, triton.next_power_of_2(num_rows)), 1)
    return Config(rows, block, num_warps(rows * block * size // _BYTES_A_THREAD), block <= _LONG)


def num_programs(num_rows: int, cut: Config) -> int:
    """How many partial sums a reduced loss has."""
    programs = triton.cdiv(num_rows, cut.rows)
    return min(programs, _MAX_PROGRAMS) if cut.loop else programs


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
    cut = row_config(inputs, loss_of, targets, compute_dtype)
    last_offset = max(inputs.numel(), extent(inputs), 0 if targets is None else extent(targets))
    launch = Launch(
        loss=loss_of,
        num_classes=inputs.shape[1],
        reduced=reduced,
        written=written,
        fast=inputs.element_size() == 2 and compute_dtype == torch.float32,
        wide=last_offset + cut.rows * cut.block >= 2**31,
        dtype=triton_dtype(compute_dtype),
    )
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


@triton.jit
def _count_kernel(
    labels_ptr,  # [N]
    weight_ptr,  # [C], or None
    counts_ptr,  # [2]: the weights of the labels that count, and how many they are
    num_rows,
    num_classes,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = counts_ptr.dtype.element_ty
    weights = tl.zeros([BLOCK], DTYPE)
    counts = tl.zeros([BLOCK], DTYPE)
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + row, row < num_rows, IGNORED)
        kept = (label != IGNORED) & (row < num_rows)
        counts += tl.where(kept, 1.0, 0.0)
        if weight_ptr is not None:
            weights += load_as(weight_ptr + label, kept & (label >= 0) & (label < num_classes), 0.0, DTYPE)
    count = tl.sum(counts)
    weight = count
    if weight_ptr is not None:
        weight = tl.sum(weights)
    tl.store(counts_ptr, tl.where(weight == 0, 1.0, weight))
    tl.store(counts_ptr + 1, tl.maximum(count, 1.0))


_COUNT_BLOCK = 1024
MAX_COUNTED = 2**17  # rows that one program counts in less time than the loss takes


def count_launcher(labels: Tensor, weight: Tensor | None, counts: Tensor, *, num_classes: int, ignored: int) -> None:
    """The two denominators of a mean, neither of them 0."""
    with launch_scope(labels):
        _count_kernel[(1,)](labels, weight, counts, len(labels), num_classes, IGNORED=ignored, BLOCK=_COUNT_BLOCK)
