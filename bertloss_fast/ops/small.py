"""Batches so small that a call's checks cost more than its arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.formulas import softplus_of
from . import dispatch

_SMALL = 8192


def small_cross_entropy(inputs: object, targets: object, reduction: str, backend: str | None) -> Tensor | None:
    """Binary cross-entropy of hard labels, as operations that torch's autograd differentiates in C++.

    None for all that is not small, in float32 on the CPU: the general way takes it, and tells what is wrong with it.
    """
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)) or reduction not in ("mean", "sum"):
        return None
    if not (inputs.dtype is targets.dtype is torch.float32 and inputs.shape == targets.shape and inputs.dim()):
        return None
    if not (0 < inputs.numel() <= _SMALL and inputs.is_cpu and targets.is_cpu) or targets.requires_grad:
        return None
    if inputs.layout is not torch.strided or targets.layout is not torch.strided:
        return None
    if dispatch.needs_plain_operations() or torch.is_autocast_enabled("cpu"):
        return None
    if dispatch.resolve(backend, inputs.device) != "eager" or not torch.equal(targets * targets, targets):
        return None
    losses = softplus_of(torch.rsub(targets, 1.0, alpha=2) * inputs)
    return losses.mean() if reduction == "mean" else losses.sum()
