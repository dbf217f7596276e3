"""ZLPR and two-way in plain PyTorch: the eager backend, and every derivative beyond the first.

The mathematics is that of ``kernels/lines.py``. Classes are selected by arithmetic on 0 and 1: on the CPU that is
several times as fast as ``torch.where``, and no exponential of -inf is taken, which is slower still.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .sigmoid import Operands, Spec, keep

_FAR = 2.0**125  # 4e37: what is as far from 0 counts as infinite; six times as much is still finite in fp32
_NEAR = 20.0  # exponents up to here need no reference point, and so no difference that rounds


class Classes(NamedTuple):
    """Elements [..., N, L] in their classes."""

    tv: Tensor  # x of negatives, -x of positives
    negative: Tensor  # 1 or 0
    positive: Tensor
    kept: Tensor | None  # what counts; None for all


class Sums(NamedTuple):
    """Of a class in each line the greatest tv, and the sum of e^(v - top / t), which is 0 where there is none."""

    top: Tensor
    total: Tensor


def _labels(operands: Operands) -> Tensor:
    targets = operands.targets
    assert targets is not None
    return targets > 0.5 if targets.is_floating_point() else targets != 0


def classes(spec: Spec, operands: Operands) -> Classes:
    """Which element is of which class; what does not count is of neither."""
    kept = keep(spec, operands)
    labels = _labels(operands)
    positive = (labels if kept is None else labels & kept).to(spec.compute_dtype)
    x = operands.inputs.to(spec.compute_dtype)
    if kept is None:
        return Classes((x * (1 - 2 * positive)).clamp(-_FAR, _FAR), 1 - positive, positive, None)
    x = torch.where(kept, x, 0.0)  # what does not count is no source of NaN
    tv = torch.where(kept, (x * (1 - 2 * positive)).clamp(-_FAR, _FAR), -3 * _FAR)
    return Classes(tv, kept.to(spec.compute_dtype) - positive, positive, kept)


def line_sums(of: Classes, temperatures: tuple[float, ...], dim: int) -> tuple[Sums, Sums, Tensor]:
    """Sums over negatives and positives of the lines along a dimension, which stays as 1; and the exponentials."""
    tv = of.tv.detach()
    negative_top = (tv - 2 * _FAR * of.positive).amax(dim, keepdim=True)  # below that of any member
    positive_top = (tv - 2 * _FAR * of.negative).amax(dim, keepdim=True)
    negative_shift, negative_factor = _shift(negative_top, temperatures[0])
    positive_shift, positive_factor = _shift(positive_top, temperatures[1])
    e = _exponentials(of, temperatures, negative_shift, positive_shift)
    negative_total = (e * of.negative).sum(dim, keepdim=True) * negative_factor
    positive_total = (e * of.positive).sum(dim, keepdim=True) * positive_factor
    return Sums(negative_top, negative_total), Sums(positive_top, positive_total), e


def _shift(top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The reference point of a line's exponentials, and the factor that makes them relative to the top."""
    shift = torch.where(top.abs() <= _NEAR * temperature, 0.0, top)
    return shift, torch.exp((shift - top) / temperature)


def _exponentials(
    of: Classes, temperatures: tuple[float, ...], negative_shift: Tensor, positive_shift: Tensor
) -> Tensor:
    """e^(v - shift / t) with the shift of the class that an element is of."""
    distance = of.tv - torch.lerp(negative_shift, positive_shift, of.positive)
    if temperatures != (1.0, 1.0):
        of_negative, of_positive = 1 / temperatures[0], 1 / temperatures[1]
        distance = distance * (of_negative + (of_positive - of_negative) * of.positive)
    return torch.exp(distance)


def add_sums(one: Sums, other: Sums, temperature: float) -> Sums:
    """Sums over the elements of both."""
    top = torch.maximum(one.top, other.top)
    of_one = one.total * torch.exp((one.top - top) / temperature)
    return Sums(top, of_one + other.total * torch.exp((other.top - top) / temperature))


def zlpr(negative: Sums, positive: Sums, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each line, and its slopes in the two totals."""
    of_negative, negative_slope = _zero_bounded(negative)
    of_positive, positive_slope = _zero_bounded(positive)
    return of_negative + of_positive, negative_slope, positive_slope


def _zero_bounded(sums: Sums) -> tuple[Tensor, Tensor]:
    """log(1 + sum), and its derivative in the total."""
    above = sums.top > 0
    e = torch.exp(-sums.top.abs())
    rest = torch.where(above, (sums.total - 1) + e, sums.total * e)
    loss = sums.top.clamp_min(0) + torch.log1p(rest)
    return torch.where(sums.top >= _FAR, torch.inf, loss), torch.where(above, 1.0, e) / (1 + rest)


def two_way(negative: Sums, positive: Sums, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """As ``zlpr``; a line without one of the classes has no loss."""
    both = (negative.total != 0) & (positive.total != 0)
    negative_total = torch.where(both, negative.total, 1.0)
    positive_total = torch.where(both, positive.total, 1.0)
    tops, low = _two_sum(negative.top, positive.top)
    rest = temperatures[0] * negative_total.log() + temperatures[1] * positive_total.log()
    u = tops + rest
    low = low + _two_sum(tops, rest.detach())[1]
    slope = torch.sigmoid(u)
    loss = softplus(u, threshold=2 * _NEAR) + slope * low  # softplus(u + low)
    loss = torch.where((negative.top >= _FAR) | (positive.top >= _FAR), torch.inf, loss)
    slope = torch.where(both, slope + slope * torch.sigmoid(-u) * low, 0.0)
    return torch.where(both, loss, 0.0), slope / negative_total, slope / positive_total


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what the rounding lost (D. Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


FORMULAS = {"zlpr": zlpr, "two_way": two_way}


class Slopes(NamedTuple):
    """What the gradient needs of each line: its elements have slope times e^(v - shift / t)."""

    negative_shift: Tensor
    negative: Tensor
    positive_shift: Tensor
    positive: Tensor

    def divided_by(self, count: Tensor) -> Slopes:
        return self._replace(negative=self.negative / count, positive=self.positive / count)


def line_losses(spec: Spec, negative: Sums, positive: Sums) -> tuple[Tensor, Slopes]:
    """The loss of each line, and its slopes."""
    losses, negative_slope, positive_slope = FORMULAS[spec.formula](negative, positive, spec.params)
    negative_shift, negative_factor = _shift(negative.top, spec.params[0])
    positive_shift, positive_factor = _shift(positive.top, spec.params[1])
    slopes = Slopes(negative_shift, negative_slope * negative_factor, positive_shift, positive_slope * positive_factor)
    return losses, slopes


def gradient(of: Classes, temperatures: tuple[float, ...], slopes: Slopes, e: Tensor | None = None) -> Tensor:
    """What lines of one direction add to the gradient; ``e`` are their exponentials, where they are known."""
    if e is None:
        e = _exponentials(of, temperatures, slopes.negative_shift, slopes.positive_shift)
    return e.mul_(torch.lerp(slopes.negative, -slopes.positive, of.positive))


def loss(spec: Spec, operands: Operands) -> Tensor:
    """The loss as differentiable operations, for what no kernel can serve: torch.func, compile, second derivatives."""
    inputs = operands.inputs
    if inputs.numel() == 0:
        return (inputs.sum(-1) if spec.reduction == "none" else inputs.sum()).to(spec.loss_dtype)
    of = classes(spec, operands)
    if spec.formula == "two_way":
        of = Classes(*(part if part is None else part.reshape(-1, inputs.shape[-1]) for part in of))  # type: ignore[arg-type]
        return (_two_way_mean(of, spec, 0) + _two_way_mean(of, spec, 1)).to(spec.loss_dtype)
    negative, positive, _ = line_sums(of, spec.params, -1)
    losses = zlpr(negative, positive, spec.params)[0].squeeze(-1)
    if operands.sample_weight is not None:
        losses = losses * operands.sample_weight.to(losses.dtype)
    if spec.reduction != "none":
        known = known_denominator(spec, operands)
        losses = losses.sum() / (count(spec, operands).clamp_min(1) if known is None else known)
    return losses.to(spec.loss_dtype)


def _two_way_mean(of: Classes, spec: Spec, dim: int) -> Tensor:
    negative, positive, _ = line_sums(of, spec.params, dim)
    losses = two_way(negative, positive, spec.params)[0]
    return losses.sum() / (positive.total != 0).sum().clamp_min(1)


def known_denominator(spec: Spec, operands: Operands) -> int | Tensor | None:
    """What the sum of ZLPR's losses is divided by; None where that is to be counted."""
    if operands.normalizer is not None:
        return operands.normalizer.to(spec.compute_dtype)
    if spec.reduction in ("none", "sum"):
        return 1
    if spec.reduction == "mean_positive":
        return None if operands.col is None or operands.mask is not None else max(len(operands.col), 1)
    if operands.mask is None and spec.ignored is None:
        return max(operands.inputs.shape[:-1].numel(), 1)
    return None


def count(spec: Spec, operands: Operands) -> Tensor:
    """The denominator where it is to be counted: the number of positives, or of rows that have any element."""
    kept = keep(spec, operands)
    if spec.reduction == "mean_positive":
        labels = _labels(operands)
        return (labels if kept is None else labels & kept).sum()
    assert kept is not None
    return kept.any(-1).sum()
