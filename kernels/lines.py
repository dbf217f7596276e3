"""Lines of positive and negative labels: their sums of exponentials, and what ZLPR and two-way make of them.

A line is a row and, in two-way, also a column. With v = x / tn on negatives and -x / tp on positives, N = log sum e^v
over the negatives of a line, P over its positives, and u = tn N + tp P:

=======  =====================================  ====================  ======================
loss     of a line                              d/dx of a negative    d/dx of a positive
=======  =====================================  ====================  ======================
zlpr     log(1 + e^N) + log(1 + e^P), tn=tp=1   e^v / (1 + e^N)       -e^v / (1 + e^P)
two-way  log(1 + e^u)                           sigmoid(u) e^(v - N)  -sigmoid(u) e^(v - P)
=======  =====================================  ====================  ======================

A sum of exponentials is kept as the greatest t v, its ``top``, and the ``total`` of e^(v - top / t), which is 0 where
there are no elements.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import NAN_STAYS, _log1p_exponential, exp_scaled, load_as, store_rounded, two_sum
from .elements import load_targets
from .operands import Place, load

FAR = tl.constexpr(2.0**125)  # 4e37: what is as far from 0 counts as infinite
ABSENT = tl.constexpr(-3 * 2.0**125)  # tv of what does not count; differences from it are still finite in fp32


class Sums(NamedTuple):
    """Sums of exponentials over one class, by line."""

    top: Any  # ABSENT where there is none
    total: Any


class Tile(NamedTuple):
    """Elements [ROWS, BLOCK]."""

    tv: Any  # -x where positive, else x
    positive: Any  # what does not count is negative, but for its tv
    place: Place


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, relatively accurate to the smallest x."""
    if x.dtype == tl.float64:
        return _log1p_exponential(x)
    else:
        one_plus = (1.0 + x).to(tl.int32, bitcast=True)
        exponent = (one_plus >> 23) - 127
        mantissa = ((one_plus & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        large = exponent * 0.6931471805599453 + _log1p_exponential(mantissa - 1.0)
        return tl.where(x > 1.0, large, _log1p_exponential(x))  # NaN is not greater


@triton.jit
def exponential(tv, top, positive, T: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr):
    """e^(v - top / t); EXACT makes up for the rounding of the difference, which is 2e-6 of the result at 40."""
    distance, lost = two_sum(tv, -top)
    if T[0] != 1 or T[1] != 1:
        distance = tl.where(positive, distance * (1.0 / T[1]), distance * (1.0 / T[0]))
        lost = tl.where(positive, lost * (1.0 / T[1]), lost * (1.0 / T[0]))
    e = exp_scaled(distance, 1.0, FAST)
    if EXACT and not FAST and tv.dtype == tl.float32:
        e += e * lost
    return e


@triton.jit
def by_class(positive, when_positive, when_negative, AXIS: tl.constexpr):
    """A value of each line for its positives, and one for its negatives."""
    return tl.where(positive, tl.expand_dims(when_positive, AXIS), tl.expand_dims(when_negative, AXIS))


@triton.jit
def _rescale(sums, top, T: tl.constexpr):
    """The total relative to a top that is not below its own."""
    return sums.total * exp_scaled(sums.top - top, 1.0 / T, True)  # what is off by much is little of the sum


@triton.jit
def add(one, other, T: tl.constexpr):
    """Sums over the elements of both."""
    top = tl.maximum(one.top, other.top)
    return Sums(top, _rescale(one, top, T) + _rescale(other, top, T))


@triton.jit
def add_parts(parts, T: tl.constexpr):
    """Sums over all parts, [parts, lines]."""
    top = tl.max(parts.top, 0)
    return Sums(top, tl.sum(_rescale(parts, top[None, :], T), 0))


@triton.jit
def _zero_bounded(sums):
    """log(1 + sum), and its derivative in the total."""
    e = exp_scaled(-tl.abs(sums.top), 1.0, False)
    above = sums.top > 0
    rest = tl.where(above, (sums.total - 1.0) + e, sums.total * e)
    loss = tl.where(above, sums.top, 0.0) + _log1p(rest)
    return tl.where(sums.top >= FAR, float("inf"), loss), tl.where(above, 1.0, e) / (1.0 + rest)


@triton.jit
def zlpr(negative, positive, T: tl.constexpr):
    """The loss of each line, and its slopes in the two totals."""
    of_negative, negative_slope = _zero_bounded(negative)
    of_positive, positive_slope = _zero_bounded(positive)
    return of_negative + of_positive, negative_slope, positive_slope


@triton.jit
def two_way(negative, positive, T: tl.constexpr):
    """As ``zlpr``; a line without one of the classes has no loss."""
    tops, low = two_sum(negative.top, positive.top)
    u, lost = two_sum(tops, T[0] * _log1p(negative.total - 1.0) + T[1] * _log1p(positive.total - 1.0))
    e = exp_scaled(-tl.abs(u), 1.0, False)
    e += e * tl.where(u > 0, -(low + lost), low + lost)
    loss = tl.where(u > 0, u, 0.0) + _log1p(e)
    loss = tl.where((negative.top >= FAR) | (positive.top >= FAR), float("inf"), loss)
    slope = tl.where(u > 0, 1.0, e) / (1.0 + e)
    both = (negative.total != 0) & (positive.total != 0)
    return (
        tl.where(both, loss, 0.0),
        tl.where(both, slope / negative.total, 0.0),
        tl.where(both, slope / positive.total, 0.0),
    )


@triton.jit
def _mark(labels, row, row_valid, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile are positive, [ROWS, BLOCK], from column ``start`` on; ``row`` is [ROWS, 1].

    A row's labels become bits of words, a chunk of them at a time; they are distinct, so that their sum is their union.
    """
    WORD: tl.constexpr = 32 if BLOCK > 32 else BLOCK
    CHUNK: tl.constexpr = 8
    low = tl.load(labels.crow_ptr + row, row_valid, 0)
    end = tl.load(labels.crow_ptr + row + 1, row_valid, 0)
    if start > 0:
        high = end
        while tl.max(high - low) > 0:  # the first label that is not below start, by bisection in all rows at once
            middle = (low + high) // 2
            below = tl.load(labels.col_ptr + middle, low < high, start) < start
            high = tl.where(below, high, middle)
            low = tl.where(below, middle + 1, low)
    words = tl.arange(0, BLOCK // WORD)[None, None, :]
    bits = tl.zeros([ROWS, BLOCK // WORD], tl.int32)
    more = tl.min(tl.load(labels.col_ptr + low, low < end, start + BLOCK)) < start + BLOCK
    while more:
        index = low + tl.arange(0, CHUNK)[None, :]
        col = tl.load(labels.col_ptr + index, index < end, start + BLOCK) - start
        bit = tl.where(col < BLOCK, 1 << (col % WORD).to(tl.int32), 0)
        bits += tl.sum(tl.where((col // WORD)[:, :, None] == words, bit[:, :, None], 0), 1)
        low += CHUNK
        more = tl.min(tl.load(labels.col_ptr + low, low < end, start + BLOCK)) < start + BLOCK
    shifts = tl.arange(0, WORD)[None, None, :]
    return tl.reshape((bits[:, :, None] >> shifts) & 1, [ROWS, BLOCK]) != 0


@triton.jit
def load_tile(operands, first_row, start, num_rows, LAUNCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile from a row and a column on."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    col = start + tl.arange(0, BLOCK)[None, :]
    if LAUNCH.wide:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    valid = (row < num_rows) & (col < LAUNCH.num_labels)
    place = Place(None, row * LAUNCH.num_labels + col, row, col, valid, LAUNCH.num_labels)
    x = load(operands.inputs, place, 0.0, LAUNCH.dtype)
    targets = load_targets(operands, place, LAUNCH)
    if LAUNCH.sparse:
        positive = _mark(operands.targets, row, row < num_rows, start, ROWS, BLOCK)
    elif LAUNCH.soft:
        positive = targets.value > 0.5
    else:
        positive = targets.value != 0
    kept = valid
    if targets.kept is not None:
        kept &= targets.kept
        positive &= targets.kept
    tv = tl.where(positive, -x, x)
    if LAUNCH.dtype == tl.float64:  # the instruction that takes both bounds at once is fp32's
        tv = tl.maximum(tl.minimum(tv, FAR, propagate_nan=NAN_STAYS), -FAR, propagate_nan=NAN_STAYS)
    else:
        tv = tl.clamp(tv, -FAR, FAR, propagate_nan=NAN_STAYS)
    return Tile(tl.where(kept, tv, ABSENT), positive, place)


@triton.jit
def line_sums(tile, before, T: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr, AXIS: tl.constexpr):
    """Sums over negatives and positives of each line of a tile, added to those ``before``; and the exponentials."""
    negative_top = tl.max(tl.where(tile.positive, ABSENT, tile.tv), AXIS)
    positive_top = tl.max(tl.where(tile.positive, tile.tv, ABSENT), AXIS)
    if before is not None:
        negative_top = tl.maximum(negative_top, before[0].top)
        positive_top = tl.maximum(positive_top, before[1].top)
    top = by_class(tile.positive, positive_top, tl.where(negative_top == ABSENT, 0.0, negative_top), AXIS)
    e = exponential(tile.tv, top, tile.positive, T, EXACT, FAST)
    negative_total = tl.sum(tl.where(tile.positive, 0.0, e), AXIS)
    positive_total = tl.sum(tl.where(tile.positive, e, 0.0), AXIS)
    if before is not None:
        negative_total += _rescale(before[0], negative_top, T[0])
        positive_total += _rescale(before[1], positive_top, T[1])
    return Sums(negative_top, negative_total), Sums(positive_top, positive_total), e


@triton.jit
def line_count(negative, positive, num_positive, COUNT: tl.constexpr):
    """What a line adds to the denominator: the "positives" that it has, or 1 if it has "any", or any "element"."""
    if COUNT == "positives":
        return num_positive
    elif COUNT == "any":
        return tl.where(positive.total != 0, 1.0, 0.0)
    else:
        return tl.where((positive.total != 0) | (negative.total != 0), 1.0, 0.0)


@triton.jit
def store_gradient(grad_ptr, tile, gradient, MASKED: tl.constexpr):
    gradient = tl.where(tile.positive, -gradient, gradient)
    if MASKED:
        gradient = tl.where(tile.tv == ABSENT, 0.0, gradient)
    store_rounded(grad_ptr + tile.place.offs, gradient, tile.place.valid)


@triton.jit
def store_sums(pointer, size, negative, positive, valid):
    tl.store(pointer, negative.top, valid)
    tl.store(pointer + size, negative.total, valid)
    tl.store(pointer + 2 * size, positive.top, valid)
    tl.store(pointer + 3 * size, positive.total, valid)


@triton.jit
def row_factor(factors, row, valid, DTYPE: tl.constexpr):
    """The product of what multiplies the loss of a row."""
    factor = tl.where(valid, 1.0, 0.0).to(DTYPE)
    for i in tl.static_range(len(factors)):
        factor *= load_as(factors[i] + row, valid, 0.0, DTYPE)
    return factor
