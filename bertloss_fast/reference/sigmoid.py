"""The multi-label family in plain PyTorch: the eager backend, and every derivative beyond the first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import FORMULAS, Factor, Label, Result, Soft, Values, gradient_bin, weighted

# A smaller alpha loses its digits where it is made of 1 - alpha.
LEAST_ALPHA_OF_A_LINE = 0.2


class Spec(NamedTuple):
    """What a loss is, apart from its tensors."""

    formula: str
    params: tuple[float, ...]
    alpha: float | None
    smoothing: float
    ignored: float | None
    reduction: str
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype
    soft: bool | None = None  # whether targets are other than 0 and 1; None where nobody has looked
    guarded: bool = False  # for a compiler, whose pass the spec is the key of: other targets make the loss NaN


class Operands(NamedTuple):
    """The tensors of a call. Targets are dense, or else labels in CSR; what formulas read beside them is contiguous."""

    inputs: Tensor  # [..., L]
    targets: Tensor | None = None  # [..., L]
    crow: Tensor | None = None  # [N + 1]
    col: Tensor | None = None  # [nnz]
    alpha: Tensor | None = None  # [L] or a scalar
    weight: Tensor | None = None  # broadcastable to the inputs
    pos_weight: Tensor | None = None  # [L] or a scalar
    sample_weight: Tensor | None = None  # [...]
    mask: Tensor | None = None  # [..., L]
    normalizer: Tensor | None = None  # []
    by_label: Tensor | None = None  # [k, L]
    by_row: Tensor | None = None  # [...]
    table: Tensor | None = None  # [bins]
    places: Tensor | None = None  # [P], of dense targets other than 0, row after row, where somebody found few


def elementwise(
    spec: Spec,
    operands: Operands,
    *,
    scale: float | Tensor = 1.0,
    upstream: float | None = None,
    soft: bool,
    zeros: bool = False,
    slope: bool = False,
    out: Tensor | None = None,
) -> Result:
    """``scale`` times the loss of every element, and on request its derivative in ``inputs`` (which ``out`` can take).

    The derivative is multiplied by an ``upstream`` gradient.
    ``zeros`` is for targets that are all 0, and need not be there. ``soft=False`` promises that every target that
    counts is 0 or 1, and is a shorter formula. Hard labels are selected by arithmetic: it is exact, and on the CPU
    several times as fast as ``torch.where`` on a mask.
    """
    x, y, kept = _elements(spec, operands, zeros)
    label = _zero(x) if y is None else _label(spec, y, operands.pos_weight, soft)
    # A number is folded into alpha's two values.
    number = 1.0 if isinstance(scale, Tensor) else scale
    factor = _class_weight(spec, operands, y if label.soft is None else label.soft.y, number)
    if operands.weight is not None:
        factor = weighted(operands.weight.to(spec.compute_dtype), factor)
    if operands.sample_weight is not None:
        factor = weighted(operands.sample_weight.to(spec.compute_dtype).unsqueeze(-1), factor)
    if isinstance(scale, Tensor):
        factor = weighted(scale, factor)
    values = Values(operands.by_label, operands.by_row, operands.table)
    v = x if y is None else label.sign * x
    loss, loss_slope = FORMULAS[spec.formula](v, label, values, factor, *spec.params, slope=slope)
    if upstream is not None and upstream != 1 and loss_slope is not None:
        loss_slope = loss_slope.mul_(upstream)
    if kept is not None:
        loss = torch.where(kept, loss, 0.0)
        loss_slope = None if loss_slope is None else torch.where(kept, loss_slope, 0.0)
    return loss, None if loss_slope is None else torch.mul(loss_slope, label.sign, out=out)


def _class_weight(spec: Spec, operands: Operands, y: Tensor | None, number: float) -> Factor:
    """What alpha multiplies a label's loss by, times a number."""
    if spec.alpha is None and operands.alpha is None:
        return number if number != 1 else None
    if operands.alpha is not None:
        alpha = operands.alpha.to(spec.compute_dtype)
        of_negatives = (1 - alpha) * number
        return of_negatives if y is None else y * (alpha * number) + (1 - y) * of_negatives
    assert spec.alpha is not None
    of_positive, of_negative = spec.alpha * number, (1 - spec.alpha) * number
    if y is None:
        return of_negative
    if spec.alpha >= LEAST_ALPHA_OF_A_LINE:
        return torch.rsub(y, of_negative, alpha=of_negative - of_positive)
    return y * of_positive + (1 - y) * of_negative


def histogram(spec: Spec, operands: Operands, bins: int, *, soft: bool) -> Tensor:
    """How many elements have their |sigmoid(x) - y| in each of the bins, for GHM."""
    x, y, kept = _elements(spec, operands)
    assert y is not None
    label = _label(spec, y, None, soft)
    index = gradient_bin(torch.sigmoid(label.sign * x), label, bins)
    ones = torch.ones_like(index) if kept is None else kept.long()
    return torch.zeros(bins, dtype=torch.long, device=x.device).scatter_add(0, index.flatten(), ones.flatten())


def _elements(spec: Spec, operands: Operands, zeros: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits and targets in the dtype of the computation, None for zeros; and which of them count, None for all."""
    kept = keep(spec, operands)
    x = as_dtype(operands.inputs, spec.compute_dtype)
    if kept is not None:
        x = torch.where(kept, x, 0.0)  # what does not count is no source of NaN
    if zeros:
        return x, x.new_zeros(()) if spec.smoothing else None, kept
    assert operands.targets is not None
    y = as_dtype(operands.targets, spec.compute_dtype)
    return x, y if kept is None else torch.where(kept, y, 0.0), kept


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call of to() costs even where it does nothing


def _may_ignore(spec: Spec, operands: Operands) -> bool:
    return operands.mask is not None or spec.ignored is not None


def keep(spec: Spec, operands: Operands) -> Tensor | None:
    """Which elements count; None for all."""
    kept = operands.mask
    if spec.ignored is not None and operands.targets is not None:
        counts = operands.targets != spec.ignored
        kept = counts if kept is None else kept & counts
    return kept


def _zero(x: Tensor) -> Label:
    return Label(x.new_zeros(()), x.new_ones(()), None, None)


def _label(spec: Spec, y: Tensor, pos_weight: Tensor | None, soft: bool) -> Label:
    pos_weight = None if pos_weight is None else pos_weight.to(y.dtype)
    if not soft and not spec.smoothing:
        share = None if pos_weight is None else y * pos_weight + (1 - y)
        return Label(y, torch.rsub(y, 1.0, alpha=2), share, None)
    hard = (y > 0.5).to(y.dtype) if soft else y
    sign = torch.rsub(hard, 1.0, alpha=2)
    if spec.smoothing:
        y = y * (1 - spec.smoothing) + 0.5 * spec.smoothing
    distance = (y - hard) * sign
    if pos_weight is None:
        return Label(hard, sign, None, Soft(torch.ones_like(y), distance, distance, y, y))
    share = y * pos_weight
    return Label(hard, sign, None, Soft(share + (1 - y), torch.lerp(share, 1 - y, hard), distance, y, share))


def loss(spec: Spec, operands: Operands, *, soft: bool) -> Tensor:
    """The loss as differentiable operations, for what no kernel can serve: torch.func, compile, second derivatives."""
    values, _ = elementwise(spec, operands, soft=soft)
    if spec.reduction == "mean" and operands.normalizer is None and values.numel() and not _may_ignore(spec, operands):
        values = values.mean()
    elif spec.reduction != "none":
        values = values.sum() / denominator(spec, operands)
    return as_dtype(values, spec.loss_dtype)


def denominator(spec: Spec, operands: Operands) -> int | Tensor:
    """What the sum of the losses is divided by: at least 1, so that an empty batch has a loss of 0."""
    if operands.normalizer is not None:
        return operands.normalizer.to(spec.compute_dtype)
    inputs, targets = operands.inputs, operands.targets
    if spec.reduction == "batchmean":
        return max(inputs.shape[:-1].numel(), 1)
    kept = keep(spec, operands)
    if spec.reduction == "mean":
        return max(inputs.numel(), 1) if kept is None else kept.sum(dtype=spec.compute_dtype).clamp_min(1)
    if spec.reduction == "mean_positive" and targets is not None:
        counted = targets if kept is None else torch.where(kept, targets, 0)
        return counted.sum(dtype=spec.compute_dtype).clamp_min(1)
    return 1
