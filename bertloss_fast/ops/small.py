"""Batches so small that a call's checks cost more than its arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..reference.formulas import Label, Values, focal, softplus_of
from . import dispatch
from .few_passes import has_few_passes

# 32 x 100 takes 1.45 times the time of torch's cross-entropy with it, and 2.2 without, and a focal loss two thirds of a
# Function's; a larger batch has less to gain.
_SMALL = 8192
_ONE = torch.ones((), dtype=torch.float32, device="cpu")
_HALF = _ONE / 2


def small_cross_entropy(inputs: Any, targets: Any, reduction: str, backend: str | None) -> Tensor | None:
    """Binary cross-entropy of a small float32 batch on the CPU, as operations that torch's autograd differentiates.

    None for all else, soft labels and whatever is wrong included: the general way takes it, or tells.
    """
    if not _serves(inputs, targets, reduction, backend):
        return None
    losses = softplus_of(torch.sub(_ONE, targets, alpha=2) * inputs)  # torch.rsub takes twice as long
    return losses.mean() if reduction == "mean" else losses.sum()


def small_focal_loss(
    inputs: Any, targets: Any, alpha: float | Tensor | None, gamma: float, reduction: str, backend: str | None
) -> Tensor | None:
    """The focal loss likewise.

    None also where it is infinite, whose derivative by autograd would be infinity times 0, or a label, whose square is
    infinity too.
    """
    if not _serves(inputs, targets, reduction, backend) or gamma.__class__ not in (int, float):
        return None
    if not (alpha is None or isinstance(alpha, float)) or not has_few_passes("focal", (gamma,), alpha):
        return None
    sign = torch.sub(_ONE, targets, alpha=2)
    weight = None if alpha is None else torch.add(_HALF, sign, alpha=0.5 - alpha)
    label = Label(targets, sign, None, None)
    losses, _ = focal(sign * inputs, label, Values(None, None, None), weight, gamma, slope=False)
    loss = losses.mean() if reduction == "mean" else losses.sum()
    return loss if math.isfinite(loss.item() + targets.sum().item()) else None


def _serves(inputs: Any, targets: Any, reduction: str, backend: str | None) -> bool:
    """Small and hard; the first check is first so that a compiler sees no other."""
    if dispatch.needs_plain_operations() or reduction not in ("mean", "sum"):
        return False
    if not (_is_plain(inputs) and _is_plain(targets)) or inputs.shape != targets.shape:
        return False
    if not inputs.dim() or not 0 < inputs.numel() <= _SMALL or targets.requires_grad:
        return False
    return dispatch.resolve(backend, inputs.device) == "eager" and targets.mul(targets).equal(targets)


def _is_plain(tensor: Any) -> bool:
    return (
        tensor.__class__ in (Tensor, Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )
