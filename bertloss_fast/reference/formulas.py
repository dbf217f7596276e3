"""The formulas of the multi-label family in plain PyTorch: what one logit and one label cost, and the slope in it.

The mathematics is that of ``kernels/formulas.py``: v = (1 - 2y) x for the hard label nearest to y, q = sigmoid(v) the
probability of the wrong label and p = sigmoid(-v) that of the right one. Neither is taken as 1 minus the other, so both
keep their relative accuracy, but in :func:`_focal_by_lerp`, which can do without. Autograd through the values is
right to second order at any finite logit; at an infinite one it multiplies 0 by infinity, and only the slopes that are
spelled out here give the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# In float32 that costs the focal loss's slope 0.9e-6 times gamma at most, and it is to be right to 2e-6.
LARGEST_GAMMA_BY_LERP = 2.0
# Beyond it softplus is the identity: at 20, torch's default, that costs a double its last digits.
_LINEAR = 40.0


class Soft(NamedTuple):
    """A label between 0 and 1, at ``distance`` from its hard label; shares of the cross-entropy, times pos_weight."""

    whole: Tensor
    rejected: Tensor
    distance: Tensor
    y: Tensor
    positive_share: Tensor


class Label(NamedTuple):
    """Labels: the nearest hard ones as 0 and 1, their sign 1 - 2y, and what else there is to them."""

    hard: Tensor
    sign: Tensor
    share: Tensor | None  # what multiplies the cross-entropy of a hard label
    soft: Soft | None


class Values(NamedTuple):
    """What a formula reads beside logits and labels: values by label, by row, and a table of its own."""

    by_label: Tensor | None  # [k, L]
    by_row: Tensor | None  # [...]
    table: Tensor | None


Factor = Tensor | float | None  # alpha, the weights and the scale of an element's loss, multiplied
Result = tuple[Tensor, Tensor | None]


def bce(v: Tensor, label: Label, values: Values, factor: Factor, *, slope: bool = True) -> Result:
    """``factor`` times binary cross-entropy, and its slope in v."""
    of = _logistic(v, slope)
    loss = weighted(_cross_entropy(v, of.softplus(), label), factor)
    return loss, weighted(_cross_entropy_slope(of.sigmoid(), label), factor) if slope else None


def poly(
    v: Tensor, label: Label, values: Values, factor: Factor, gamma: float, epsilon: float, *, slope: bool = True
) -> Result:
    """``factor`` times poly-1 on the focal loss, and its slope in v."""
    of = _logistic(v, slope)
    plain = label.soft is None and label.share is None and not epsilon
    if slope and plain and not of.is_compiled and 0 < gamma <= LARGEST_GAMMA_BY_LERP:
        return _focal_by_lerp(of, factor, gamma)
    ce, q = _cross_entropy(v, of.softplus(), label), of.sigmoid()
    if label.soft is None:
        m = q
        modulation = power(q, gamma, lambda: -of.softplus_of_minus())
    else:
        p, distance = of.sigmoid_of_minus(), label.soft.distance
        m = (q + distance * (p - q)).clamp_min(torch.finfo(v.dtype).tiny)
        modulation = power(m, gamma, lambda: m.log())
    modulation = weighted(modulation, factor)
    loss = modulation * (ce + epsilon * m if epsilon else ce)
    if not slope:
        return loss, None
    growth = of.sigmoid_of_minus() if label.soft is None else p * q * (1 - 2 * distance) / m
    ce_slope = _cross_entropy_slope(q, label)
    if epsilon:
        ce_slope = ce_slope + (epsilon * (gamma + 1)) * (growth * m)
    # In place from here: who asks for a slope records no graph. An infinite logit has p = 0 and an infinite loss, whose
    # product is 0.
    growth *= ce.clamp_max_(torch.finfo(v.dtype).max)
    torch.add(ce_slope, growth, alpha=gamma, out=growth)
    return loss, growth.mul_(modulation)


def _focal_by_lerp(of: _Torchs | _OfOneExponential, factor: Factor, gamma: float) -> Result:
    """The focal loss of hard labels, and its slope modulation * (gamma * p * ce + q), where passes are what costs.

    In the slope p is 1 - q, which is off by up to gamma * ln(1 / p) / 2 units in q's last place.
    """
    q = of.sigmoid()
    modulation = weighted(power(q, gamma, lambda: -of.softplus_of_minus()), factor)
    loss = of.softplus().mul_(modulation)
    # Where the loss is infinite, or infinity times a weight of 0, p is 0.
    limit = torch.finfo(q.dtype).max
    weighed = (loss * gamma).nan_to_num_(0.0, limit, -limit)
    return loss, torch.lerp(weighed, modulation, q, out=weighed)


def focal(v: Tensor, label: Label, values: Values, factor: Factor, gamma: float, *, slope: bool = True) -> Result:
    """``factor`` times the focal loss, and its slope in v."""
    return poly(v, label, values, factor, gamma, 0.0, slope=slope)


def asymmetric(
    v: Tensor,
    label: Label,
    values: Values,
    factor: Factor,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    detached: bool,
    *,
    slope: bool = True,
) -> Result:
    """``factor`` times the asymmetric loss, and its slope in v."""
    # In x: the two labels' terms are not each other's mirror image.
    of = _logistic(label.sign * v, slope)
    p, not_p = of.sigmoid(), of.sigmoid_of_minus()
    r = (p - clip).clamp_min(0.0) if clip else p
    nlr = -torch.log1p(-r) if clip else of.softplus()
    nlp = of.softplus_of_minus()
    y, y_share = label.hard, label.hard
    if label.soft is not None:
        y, y_share = label.soft.y, label.soft.positive_share
    elif label.share is not None:
        y_share = label.hard * label.share
    # No infinity is multiplied by 0.
    ce = torch.where(y_share == 0, 0.0, y_share * nlp) + torch.where(y == 1, 0.0, (1 - y) * nlr)
    base = y * not_p + (1 - y) * r
    exponent = gamma_pos * y + gamma_neg * (1 - y)
    safe_base = torch.where(base == 0, 1.0, base)
    modulation = torch.where(base == 0, (exponent == 0).to(v.dtype), torch.exp(exponent * safe_base.log()))
    modulation = weighted(modulation.detach() if detached else modulation, factor)
    loss = modulation * ce
    if not slope:
        return loss, None
    r_slope = torch.where(r > 0, p * not_p, 0.0) if clip else p * not_p
    nlr_slope = r_slope / (1 - r) if clip else p
    result = (1 - y) * nlr_slope - y_share * not_p
    if not detached:
        relative = ((1 - y) * r_slope - y * (p * not_p)) / safe_base
        result += exponent * ce.clamp_max(torch.finfo(v.dtype).max) * relative
    return loss, result.mul_(modulation).mul_(label.sign)


def balanced(
    v: Tensor,
    label: Label,
    values: Values,
    factor: Factor,
    gamma: float,
    balance: float,
    neg_scale: float,
    map_alpha: float,
    map_beta: float,
    map_mu: float,
    *,
    slope: bool = True,
) -> Result:
    """``factor`` times the distribution-balanced loss, and its slope in v."""
    assert values.by_label is not None
    assert values.by_row is not None
    inverse, shift = values.by_label.to(v.dtype)
    rate = values.by_row.to(v.dtype).unsqueeze(-1)
    weight = balance * (torch.sigmoid(map_beta * (inverse / rate - map_mu)) + map_alpha)
    factor = weighted(weight, factor)
    if label.soft is None:
        positive = label.hard > 0.5
        logit = torch.where(positive, v - shift, neg_scale * (v + shift))
        loss, loss_slope = focal(logit, label, values, factor, gamma, slope=slope)
        return torch.where(positive, loss, loss / neg_scale), loss_slope
    x = label.sign * v + shift
    hard = label._replace(share=None, soft=None)
    y, y_share = label.soft.y, label.soft.positive_share
    of_positive, slope_of_positive = focal(-x, hard, values, factor, gamma, slope=slope)
    of_negative, slope_of_negative = focal(neg_scale * x, hard, values, factor, gamma, slope=slope)
    # No infinity is multiplied by 0.
    loss = torch.where(y_share == 0, 0.0, y_share * of_positive)
    loss = loss + torch.where(y == 1, 0.0, (1 - y) * of_negative / neg_scale)
    if slope_of_positive is None or slope_of_negative is None:
        return loss, None
    return loss, ((1 - y) * slope_of_negative - y_share * slope_of_positive) * label.sign


def gradient_bin(q: Tensor, label: Label, bins: int) -> Tensor:
    """Which of the bins of GHM an element's |sigmoid(x) - y| falls in."""
    norm = q if label.soft is None else (q - label.soft.distance).abs()
    return (norm * bins).nan_to_num(nan=0.0).clamp(0, bins - 1).long()


def ghm(v: Tensor, label: Label, values: Values, factor: Factor, bins: int, *, slope: bool = True) -> Result:
    """``factor`` times cross-entropy, weighted by how many elements have a similar gradient, and its slope in v."""
    assert values.table is not None
    weight = values.table.to(v.dtype)[gradient_bin(torch.sigmoid(v.detach()), label, bins)]
    return bce(v, label, values, weighted(weight, factor), slope=slope)


def weighted(value: Tensor, factor: Factor) -> Tensor:
    return value if factor is None else value * factor


def softplus_of(v: Tensor, beta: int = 1) -> Tensor:
    return softplus(v, beta, _LINEAR)


class _Torchs:
    """Sigmoid and softplus of v and of -v as torch has them: on the CPU its fastest, and differentiable."""

    is_compiled = False

    def __init__(self, v: Tensor) -> None:
        self._v = v

    def sigmoid(self) -> Tensor:
        return torch.sigmoid(self._v)

    def sigmoid_of_minus(self) -> Tensor:
        return torch.neg(self._v).sigmoid_()

    def softplus(self) -> Tensor:
        return softplus_of(self._v)

    def softplus_of_minus(self) -> Tensor:
        return softplus_of(-self._v)


class _OfOneExponential:
    """The same for a compiler, which drops what nobody asks for. Not for autograd: it has no derivative at v = 0."""

    is_compiled = True

    def __init__(self, v: Tensor) -> None:
        e = torch.exp(-v.abs())
        greater = 1 / (1 + e)
        smaller = e * greater
        self._v, self._above, self._log = v, v > 0, _log1p(e)
        self._greater, self._smaller = greater, smaller

    def sigmoid(self) -> Tensor:
        return torch.where(self._above, self._greater, self._smaller)

    def sigmoid_of_minus(self) -> Tensor:
        return torch.where(self._above, self._smaller, self._greater)

    def softplus(self) -> Tensor:
        return self._v.clamp_min(0.0) + self._log

    def softplus_of_minus(self) -> Tensor:
        return self._log - self._v.clamp_max(0.0)


def _log1p(e: Tensor) -> Tensor:
    """log(1 + e) for e from 0 to 1: in float32 by the series of 2 artanh(e / (2 + e)), which is faster."""
    if e.dtype != torch.float32:
        return torch.log1p(e)
    t = e / (2 + e)
    square = t * t
    series = torch.full_like(e, 1 / 13)
    for divisor in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / divisor
    return 2 * t * series


def _logistic(v: Tensor, slope: bool) -> _Torchs | _OfOneExponential:
    # Who asks for a slope takes no derivative.
    return _OfOneExponential(v) if slope and torch.compiler.is_compiling() else _Torchs(v)


def _cross_entropy(v: Tensor, loss: Tensor, label: Label) -> Tensor:
    if label.soft is None:
        return weighted(loss, label.share)
    soft = label.soft
    # At an infinite logit the two terms would be inf - inf, or 0 * inf: only what its label asks for counts there.
    linear = torch.where(v > 0, soft.whole - soft.rejected, -soft.rejected)
    limit = torch.where(linear == 0, 0.0, linear * v)
    return torch.where(v.isinf(), limit, soft.whole * loss - soft.rejected * v)


def _cross_entropy_slope(q: Tensor, label: Label) -> Tensor:
    return weighted(q, label.share) if label.soft is None else label.soft.whole * q - label.soft.rejected


def power(base: Tensor, exponent: float, log_base: Callable[[], Tensor]) -> Tensor:
    """base ** exponent by products for small integers, so that 0 ** 0 is 1 and no derivative divides by a zero base."""
    if exponent == 0:
        return torch.ones_like(base)
    if exponent in (1, 2, 3, 4):
        return base if exponent == 1 else base * base if exponent == 2 else base ** int(exponent)
    return torch.exp(exponent * log_base())


FORMULAS: dict[str, Callable[..., Result]] = {
    "bce": bce,
    "focal": focal,
    "poly": poly,
    "asymmetric": asymmetric,
    "balanced": balanced,
    "ghm": ghm,
}
