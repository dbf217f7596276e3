"""The multi-label family in plain PyTorch: the eager backend, and every derivative beyond the first.

The mathematics is that of ``kernels/sigmoid.py``: v = (1 - 2y) x for the hard label nearest to y, q = sigmoid(v) the
probability of the wrong label and p = sigmoid(-v) that of the right one. Neither is ever taken as 1 minus the other, so
both keep their relative accuracy. Autograd through the values is right to second order at any finite logit; at an
infinite one it multiplies 0 by infinity, and only the slopes that are spelled out here give the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Beyond it softplus is the identity: at 20, torch's default, that costs a double its last digits.
_LINEAR = 40.0


class Soft(NamedTuple):
    """A label between 0 and 1, at ``distance`` from its hard label; shares of the cross-entropy, times pos_weight."""

    whole: Tensor
    rejected: Tensor
    distance: Tensor


Factor = Tensor | float | None  # alpha, the weights and the scale of an element's loss, multiplied


def bce(v: Tensor, soft: Soft | None, factor: Factor, slope: bool = True) -> tuple[Tensor, Tensor | None]:
    """``factor`` times binary cross-entropy, and its slope in v."""
    loss = _weighted(_cross_entropy(v, soft), factor)
    return loss, _weighted(_cross_entropy_slope(torch.sigmoid(v), soft), factor) if slope else None


def focal(
    v: Tensor, soft: Soft | None, factor: Factor, gamma: float, slope: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``factor`` times the focal loss, and its slope in v."""
    ce = _cross_entropy(v, soft)
    q, p = torch.sigmoid(v), torch.sigmoid(-v)
    if soft is None:
        modulation = _power(q, gamma, lambda: -softplus(-v, threshold=_LINEAR))
        growth = p
    else:
        m = (q + soft.distance * (p - q)).clamp_min(torch.finfo(v.dtype).tiny)
        modulation = _power(m, gamma, lambda: m.log())
        growth = p * q * (1 - 2 * soft.distance) / m
    modulation = _weighted(modulation, factor)
    loss = modulation * ce
    if not slope:
        return loss, None
    # In place from here: who asks for a slope records no graph. An infinite logit has p = 0 and an infinite loss, whose
    # product is 0.
    growth *= ce.clamp_max_(torch.finfo(v.dtype).max)
    torch.add(_cross_entropy_slope(q, soft), growth, alpha=gamma, out=growth)
    return loss, growth.mul_(modulation)


def _weighted(value: Tensor, factor: Factor) -> Tensor:
    return value if factor is None else value * factor


def _cross_entropy(v: Tensor, soft: Soft | None) -> Tensor:
    loss = softplus(v, threshold=_LINEAR)
    if soft is None:
        return loss
    # At an infinite logit the two terms would be inf - inf, or 0 * inf: only what its label asks for counts there.
    linear = torch.where(v > 0, soft.whole - soft.rejected, -soft.rejected)
    limit = torch.where(linear == 0, 0.0, linear * v)
    return torch.where(v.isinf(), limit, soft.whole * loss - soft.rejected * v)


def _cross_entropy_slope(q: Tensor, soft: Soft | None) -> Tensor:
    return q if soft is None else soft.whole * q - soft.rejected


def _power(base: Tensor, exponent: float, log_base: Callable[[], Tensor]) -> Tensor:
    """base ** exponent by products for small integers, so that 0 ** 0 is 1 and no derivative divides by a zero base."""
    if exponent == 0:
        return torch.ones_like(base)
    if exponent in (1, 2, 3, 4):
        return base if exponent == 1 else base * base if exponent == 2 else base ** int(exponent)
    return torch.exp(exponent * log_base())


FORMULAS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {"bce": bce, "focal": focal}


def elementwise(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor,
    *,
    alpha: float | Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype,
    soft: bool,
    slope: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``scale`` times the loss of every element, and on request its derivative in ``inputs`` (which ``out`` can take).

    ``soft=False`` promises that every target is 0 or 1, and is a shorter formula. Hard labels are selected by
    arithmetic: it is exact, and on the CPU several times as fast as ``torch.where`` on a mask.
    """
    x, y = _as(inputs, dtype), _as(targets, dtype)
    labels = None
    if soft:
        hard = (y > 0.5).to(dtype)
        sign = torch.rsub(hard, 1.0, alpha=2)
        labels = _soft(y, hard, sign, pos_weight)
    else:
        sign = torch.rsub(y, 1.0, alpha=2)
    # A number is folded into alpha's two values. An upstream gradient is not: it may be infinite, and 0 * inf is NaN.
    number = 1.0 if isinstance(scale, Tensor) else scale
    factor: Factor = number if number != 1 else None
    if isinstance(alpha, float) and alpha >= 0.1:
        factor = y * ((2 * alpha - 1) * number) + (1 - alpha) * number
    elif alpha is not None:
        # A smaller alpha would lose its digits to that sum.
        alpha = alpha.to(dtype) if isinstance(alpha, Tensor) else alpha
        factor = y * (alpha * number) + (1 - y) * ((1 - alpha) * number)
    if weight is not None:
        factor = _weighted(weight.to(dtype), factor)
    if pos_weight is not None and not soft:
        factor = _weighted(y * pos_weight.to(dtype) + (1 - y), factor)
    if isinstance(scale, Tensor):
        factor = _weighted(scale, factor)
    loss, loss_slope = FORMULAS[formula](sign * x, labels, factor, *params, slope=slope)
    return loss, None if loss_slope is None else torch.mul(loss_slope, sign, out=out)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call of to() costs even where it does nothing


def _soft(y: Tensor, hard: Tensor, sign: Tensor, pos_weight: Tensor | None) -> Soft:
    distance = (y - hard) * sign
    if pos_weight is None:
        return Soft(torch.ones_like(y), distance, distance)
    positive_share = y * pos_weight.to(y.dtype)
    return Soft(positive_share + (1 - y), torch.lerp(positive_share, 1 - y, hard), distance)


def loss(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor,
    *,
    alpha: float | Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    dtype: torch.dtype,
    soft: bool,
) -> Tensor:
    """The loss as differentiable operations, for what no kernel can serve: torch.func, compile, second derivatives."""
    values, _ = elementwise(
        formula,
        params,
        inputs,
        targets,
        alpha=alpha,
        weight=weight,
        pos_weight=pos_weight,
        dtype=dtype,
        soft=soft,
    )
    if reduction == "none":
        return values
    if reduction == "mean" and values.numel():
        return values.mean()
    return values.sum() / denominator(reduction, inputs, targets, dtype)


def denominator(reduction: str, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> int | Tensor:
    """What the sum of the losses is divided by: at least 1, so that an empty batch has a loss of 0."""
    if reduction == "mean":
        return max(inputs.numel(), 1)
    if reduction == "batchmean":
        return max(inputs.shape[:-1].numel(), 1)
    if reduction == "mean_positive":
        return targets.sum(dtype=dtype).clamp_min(1)
    return 1
