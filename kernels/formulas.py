"""The formulas of the multi-label family: what one logit and one label cost, and the slope in the logit.

==========  ====================================================  =====================================================
loss        value                                                 d/dv
==========  ====================================================  =====================================================
bce         -log p                                                q
poly        -q^gamma log p + epsilon q^(gamma + 1)                q^gamma (q - gamma p log p + epsilon (gamma + 1) p q)
focal       poly with epsilon = 0
asymmetric  focal with gamma_pos for a positive label;
            for a negative one -r^gamma_neg log(1 - r),           p q r^(gamma - 1) (r / (1 - r) - gamma log(1 - r))
            r = max(q - clip, 0)
balanced    focal of a shifted and scaled v, rebalanced           as focal
ghm         bce, weighted by how many elements have a similar q   as bce
==========  ====================================================  =====================================================

v = (1 - 2y) x, q = sigmoid(v) is the probability of the wrong label and p = 1 - q. Every formula has the signature
(v, label, values, place, PARAMS, FAST) -> (loss, slope in v).

A label y between 0 and 1 lies at a ``distance`` d from a hard label, and v is that one's. Then the cross-entropy is
whole * (-log p) - rejected * v, where ``whole`` is pos_weight * y + (1 - y) and ``rejected`` the term of the other hard
label, (1 - y) or pos_weight * y; and the focal factor q becomes q + d (p - q).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import LARGE, LARGEST, exp_scaled, neg_log, neg_log1p, power, select, sigmoids


class Soft(NamedTuple):
    """A label between 0 and 1, as the module's docstring has it."""

    whole: Any
    rejected: Any
    distance: Any
    y: Any
    pos_weight: Any  # or None


class Label(NamedTuple):
    """A tile of labels."""

    positive: Any  # the nearest hard label; None where all are negative
    share: Any  # what multiplies the cross-entropy of a hard label, or None
    soft: Any  # Soft, or None where all labels are hard


class Values(NamedTuple):
    """What a formula reads beside logits and labels: pointers to values by label, by row, and to a table of its own."""

    by_label: Any = None  # [k, L]
    by_row: Any = None  # [N]
    table: Any = None


@triton.jit
def _value(pointer, place, dtype):
    """Values of a tile; 1 where it is past the end."""
    return tl.load(pointer, place.valid, None if place.valid is None else 1.0).to(dtype)


@triton.jit
def _cross_entropy(v, q, nll, label):
    """Weighted cross-entropy and its slope."""
    if label.soft is not None:
        soft = label.soft
        # No two infinities are subtracted, and none is multiplied by 0.
        linear = tl.where(soft.rejected == 0, 0.0, soft.rejected * tl.minimum(v, LARGEST))
        return soft.whole * nll - linear, soft.whole * q - soft.rejected
    elif label.share is not None:
        return label.share * nll, label.share * q
    else:
        return nll, q


@triton.jit
def bce(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Binary cross-entropy."""
    _, q, nll, _ = sigmoids(v, FAST)
    return _cross_entropy(v, q, nll, label)


@triton.jit
def poly(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Poly-1 on the focal loss (Leng et al. 2022, arXiv:2204.12511); PARAMS is (gamma, epsilon)."""
    GAMMA: tl.constexpr = PARAMS[0]
    EPSILON: tl.constexpr = PARAMS[1]
    p, q, nll, neg_log_q = sigmoids(v, FAST)
    ce, slope = _cross_entropy(v, q, nll, label)
    if label.soft is None:
        m, neg_log_m, relative_slope = q, neg_log_q, p
    else:
        distance = label.soft.distance
        hard = distance == 0
        m = q + distance * (p - q)
        # m underflows before its logarithm does, and only at a hard label.
        neg_log_m = tl.where(hard, neg_log_q, -tl.log(m))
        relative_slope = tl.where(hard, p, p * q * (1.0 - 2.0 * distance) / tl.where(hard, 1.0, m))
    if EPSILON != 0:
        slope += EPSILON * (GAMMA + 1) * (relative_slope * m)
    if GAMMA != 0:
        # An infinite logit has p = 0 and an infinite loss, whose product is 0.
        slope = GAMMA * (relative_slope * tl.minimum(ce, LARGE)) + slope
    if EPSILON != 0:
        ce += EPSILON * m
    if GAMMA == 0:
        return ce, slope
    else:
        modulation = power(m, neg_log_m, GAMMA, FAST)
        return modulation * ce, modulation * slope


@triton.jit
def focal(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002); PARAMS is (gamma,)."""
    GAMMA: tl.constexpr = PARAMS[0]
    if GAMMA == 0:
        return bce(v, label, values, place, PARAMS, FAST)
    else:
        return poly(v, label, values, place, (GAMMA, 0.0), FAST)


@triton.jit
def _clipped(p, q, nll, CLIP: tl.constexpr, FAST: tl.constexpr):
    """r = max(q - clip, 0), -log(1 - r), and the slopes of both: (r, -log(1 - r), dr/dv, d(-log(1 - r))/dv)."""
    if CLIP == 0:
        return q, nll, p * q, q
    else:
        above = q > CLIP
        r = tl.where(above, q - CLIP, 0.0)
        nlr, inverse = neg_log1p(r, tl.where(above, p + CLIP, 1.0), FAST)
        r_slope = tl.where(above, p * q, 0.0)
        return r, nlr, r_slope, r_slope * inverse


@triton.jit
def asymmetric(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Asymmetric loss (Ridnik et al. 2021, arXiv:2009.14119); PARAMS is (gamma_neg, gamma_pos, clip, detached)."""
    GAMMA_NEG: tl.constexpr = PARAMS[0]
    GAMMA_POS: tl.constexpr = PARAMS[1]
    CLIP: tl.constexpr = PARAMS[2]
    DETACHED: tl.constexpr = PARAMS[3]
    p, q, nll, neg_log_q = sigmoids(v, FAST)
    if FAST and (CLIP != 0 or label.soft is not None):
        p = exp_scaled(-nll, 1.0, FAST)  # here the slope of a wrong element is p times something
    if label.soft is None:
        r, nlr, r_slope, nlr_slope = _clipped(p, q, nll, CLIP, FAST)
        neg_log_r = neg_log_q if CLIP == 0 else neg_log(r, FAST)
        if GAMMA_NEG >= 1 and not DETACHED:
            # One power of r less, so that nothing is divided by r.
            modulation = power(r, neg_log_r, GAMMA_NEG - 1, FAST)
            loss = modulation * (r * nlr)
            slope = modulation * (r * nlr_slope + GAMMA_NEG * (r_slope * tl.minimum(nlr, LARGE)))
        else:
            modulation = power(r, neg_log_r, GAMMA_NEG, FAST)
            loss = modulation * nlr
            slope = modulation * nlr_slope
            if GAMMA_NEG != 0 and not DETACHED:
                ratio = tl.where(r == 0, 1.0, tl.minimum(nlr, LARGE) / tl.where(r == 0, 1.0, r))
                slope += modulation * (GAMMA_NEG * (r_slope * ratio))
        if label.positive is not None:
            modulation = power(q, neg_log_q, GAMMA_POS, FAST)
            slope_pos = modulation * (q if DETACHED else GAMMA_POS * (p * tl.minimum(nll, LARGE)) + q)
            loss_pos = modulation * nll
            if label.share is not None:
                loss_pos *= label.share
                slope_pos *= label.share
            loss = tl.where(label.positive, loss_pos, loss)
            slope = tl.where(label.positive, slope_pos, slope)
        return loss, slope
    else:
        # In x: the two labels' terms are not each other's mirror image.
        y = label.soft.y
        positive = label.positive
        p_x, not_p_x = select(positive, p, q), select(positive, q, p)
        nlp_x, nl_not_p_x = select(positive, nll, neg_log_q), select(positive, neg_log_q, nll)
        r, nlr, r_slope, nlr_slope = _clipped(not_p_x, p_x, nl_not_p_x, CLIP, FAST)
        y_share = y if label.soft.pos_weight is None else y * label.soft.pos_weight
        # No infinity is multiplied by 0.
        ce = tl.where(y_share == 0, 0.0, y_share * nlp_x) + tl.where(y == 1, 0.0, (1.0 - y) * nlr)
        slope = (1.0 - y) * nlr_slope - y_share * not_p_x
        base = y * not_p_x + (1.0 - y) * r
        base_slope = (1.0 - y) * r_slope - y * (p * q)
        exponent = GAMMA_POS * y + GAMMA_NEG * (1.0 - y)
        vanished = base == 0
        log_base = tl.log(tl.where(vanished, 1.0, base))
        modulation = tl.exp(exponent * log_base)
        modulation = tl.where(vanished, tl.where(exponent == 0, 1.0, 0.0), modulation)
        if not DETACHED:
            slope += exponent * tl.minimum(ce, LARGE) * (base_slope / tl.where(vanished, 1.0, base))
        slope *= modulation
        return modulation * ce, select(positive, -slope, slope)


@triton.jit
def balanced(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Distribution-balanced loss (Wu et al. 2020, arXiv:2007.09654).

    PARAMS is (gamma, balance, neg_scale, map_alpha, map_beta, map_mu); by_label holds 1 / counts and the shift of the
    logits, by_row is the sum of 1 / counts over a row's labels, tiny where there is none.
    """
    GAMMA: tl.constexpr = PARAMS[0]
    BALANCE: tl.constexpr = PARAMS[1]
    NEG_SCALE: tl.constexpr = PARAMS[2]
    inverse = _value(values.by_label + place.col, place, v.dtype)
    shift = _value(values.by_label + place.num_labels + place.col, place, v.dtype)
    rate = _value(values.by_row + place.row, place, v.dtype)
    _, rebalanced, _, _ = sigmoids(PARAMS[4] * (inverse / rate - PARAMS[5]), FAST)
    weight = BALANCE * (rebalanced + PARAMS[3])
    if label.soft is None:
        logit = NEG_SCALE * (v + shift)
        if label.positive is not None:
            logit = tl.where(label.positive, v - shift, logit)
            weight_of_loss = tl.where(label.positive, weight, weight * (1.0 / NEG_SCALE))
        else:
            weight_of_loss = weight * (1.0 / NEG_SCALE)
        loss, slope = focal(logit, label, values, place, (GAMMA,), FAST)
        return weight_of_loss * loss, weight * slope
    else:
        y = label.soft.y
        x = select(label.positive, -v, v) + shift
        hard = Label(None, None, None)
        loss_pos, slope_pos = focal(-x, hard, values, place, (GAMMA,), FAST)
        loss_neg, slope_neg = focal(NEG_SCALE * x, hard, values, place, (GAMMA,), FAST)
        y_share = y if label.soft.pos_weight is None else y * label.soft.pos_weight
        # No infinity is multiplied by 0.
        loss = tl.where(y_share == 0, 0.0, y_share * loss_pos)
        loss += tl.where(y == 1, 0.0, (1.0 - y) * (loss_neg * (1.0 / NEG_SCALE)))
        slope = (1.0 - y) * slope_neg - y_share * slope_pos
        return weight * loss, weight * select(label.positive, -slope, slope)


@triton.jit
def gradient_bin(q, label, BINS: tl.constexpr):
    """Which of the bins of GHM an element's |sigmoid(x) - y| falls in."""
    norm = q if label.soft is None else tl.abs(q - label.soft.distance)
    norm = tl.where(norm == norm, norm, 0.0)  # NaN goes to a bin, too: it is an index soon
    return tl.minimum(norm * BINS, BINS - 1).to(tl.int32)


@triton.jit
def ghm(v, label, values, place, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Gradient harmonizing (Li et al. 2019, arXiv:1811.05181); PARAMS is (bins,), the table holds their weights."""
    loss, slope = bce(v, label, values, place, PARAMS, FAST)
    _, q, _, _ = sigmoids(v, FAST)
    weight = _value(values.table + gradient_bin(q, label, PARAMS[0]), place, v.dtype)
    return weight * loss, weight * slope


FORMULAS = {"bce": bce, "focal": focal, "poly": poly, "asymmetric": asymmetric, "balanced": balanced, "ghm": ghm}
