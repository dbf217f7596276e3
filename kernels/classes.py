"""The formulas of the single-label family: losses of a row of logits and its class, or its class probabilities.

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
poly           R + eps sum of a_c (1 - p_c)      B q + eps q (p a_t + q M), with M = sum of b_c e_c / sum
=============  ================================  =====================================================

and d/dx_j = (derivative in u) e_j / sum - b_j (j != t; poly: - eps q b_j e_j / sum), and at t what makes the sum over
classes 0. LDAM is cross-entropy of scaled logits, of which the label's is less by its margin. z_loss adds z lse^2,
whose derivative is 2 z lse p_j.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import power


class Slopes(NamedTuple):
    """The gradient at class j is e_j (of_e - of_mixed b_j) - of_spread b_j, and at the label its own."""

    of_e: Any
    of_mixed: Any  # None for 0
    of_spread: Any
    at: Any


@triton.jit
def _at_label(rows, sums):
    """What the target has on the label."""
    return sums.at if rows.hard is None else rows.hard


@triton.jit
def cross_entropy(margin, rows, sums, PARAMS: tl.constexpr):
    total = _at_label(rows, sums)
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
        at_label = _at_label(rows, sums)
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
