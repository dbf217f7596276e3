"""The pointwise family in plain PyTorch: the eager backend, and every derivative beyond the first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sigmoid import as_dtype


class Spec(NamedTuple):
    """What a loss is, apart from its tensors."""

    formula: str
    params: tuple[float, ...]
    reduction: str
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype


class Operands(NamedTuple):
    """The tensors of a call, all of one shape."""

    inputs: Tensor
    targets: Tensor
    weight: Tensor | None = None
    mask: Tensor | None = None
    normalizer: Tensor | None = None  # []


def squared_error(x: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(x, t, reduction="none")


def kl_divergence(x: Tensor, t: Tensor) -> Tensor:
    """t (log t - x), where the target 0 has neither loss nor derivatives."""
    counts = t != 0
    return t * (torch.where(counts, t, 1.0).log() - torch.where(counts, x, 0.0))


def kl_divergence_of_logs(x: Tensor, t: Tensor) -> Tensor:
    """exp(t) (t - x), where the probability 0 has neither loss nor derivatives."""
    p = t.exp()
    counts = p != 0
    return p * (torch.where(counts, t, 0.0) - torch.where(counts, x, 0.0))


FORMULAS = {"mse": squared_error, "kl": kl_divergence, "kl of logs": kl_divergence_of_logs}


def loss(spec: Spec, operands: Operands) -> Tensor:
    """The loss as differentiable operations."""
    x, t, weight = (_counted(tensor, operands.mask, spec.compute_dtype) for tensor in operands[:3])
    assert x is not None
    assert t is not None
    values = FORMULAS[spec.formula](x, t)
    if weight is not None:
        values = values * weight
    if spec.reduction != "none":
        values = values.sum() / denominator(spec, operands)
    return as_dtype(values, spec.loss_dtype)


def _counted(tensor: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the dtype of the computation, with 0 for what does not count: an input of 0 and a target of 0 have no loss."""
    if tensor is None:
        return None
    return as_dtype(tensor, dtype) if mask is None else torch.where(mask, as_dtype(tensor, dtype), 0.0)


def is_counted(spec: Spec, operands: Operands) -> bool:
    """Whether the denominator depends on data."""
    may_vary = operands.mask is not None or operands.weight is not None
    return spec.reduction == "mean" and operands.normalizer is None and may_vary


def denominator(spec: Spec, operands: Operands) -> int | Tensor:
    """What the sum of the losses is divided by; never 0 by itself, so that nothing that counts has a loss of 0."""
    inputs, _, weight, mask, normalizer = operands
    if normalizer is not None:
        return normalizer.to(spec.compute_dtype)
    if spec.reduction == "batchmean":
        return max(inputs.shape[0], 1) if inputs.dim() else 1
    if spec.reduction != "mean":
        return 1
    if weight is not None:
        return or_one(torch.sum(_counted(weight, mask, spec.compute_dtype)))  # type: ignore[arg-type]
    return max(inputs.numel(), 1) if mask is None else mask.sum(dtype=spec.compute_dtype).clamp_min(1)


def or_one(total: Tensor) -> Tensor:
    """Of weights, which may be less than 1."""
    return torch.where(total == 0, 1.0, total)
