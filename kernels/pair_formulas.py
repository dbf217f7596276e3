"""Losses of two rows of logits: distillation, R-Drop, Jensen-Shannon, and of score margins.

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

import triton
import triton.language as tl

from .device import LN2, exp_difference, sigmoids
from .rows import Sums, finite, margin_of


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
        hard: tl.constexpr = 1.0 - PARAMS[1]
        nll, others, at = _nll(student, labels.x)
        if PARAMS[1] == 0:  # 0 times infinity is no 0
            loss = nll
        elif hard == 0:
            loss = loss + tl.where(nll == nll, 0.0, nll)
        else:
            loss = PARAMS[1] * loss + hard * nll
        return Outcome(loss, (others * hard, at * hard))


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
    loss = 0.5 * (nll_a + nll_b)
    if PARAMS[0] != 0:  # 0 times infinity is no 0
        loss += 0.5 * PARAMS[0] * (kl_ab + kl_ba)
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
        if HALF_ALPHA != 0:
            log_ratio = tl.where(e_a == 0, 0.0, above_a - (ratio + kl_ab)[:, None])
            of_a += HALF_ALPHA * (p * log_ratio + p - q)
    if WANTED[1]:
        of_b = tl.where(tile.at, (0.5 * at_b)[:, None], e_b * (0.5 * others_b)[:, None])
        if HALF_ALPHA != 0:
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
