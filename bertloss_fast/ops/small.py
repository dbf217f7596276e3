"""Batches so small that a call's checks cost more than its arithmetic."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from ..reference.formulas import FORMULAS, Label, Values, softplus_of
from . import dispatch
from .few_passes import is_short

# 32 x 100 takes 1.45 times the time of torch's cross-entropy with it, and 2.2 without, and a focal loss two thirds of a
# Function's; a larger batch has less to gain.
_SMALL = 8192
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


def small_loss(
    formula: str,
    params: tuple[float, ...],
    inputs: object,
    targets: object,
    alpha: float | Tensor | None,
    reduction: str,
    backend: str | None,
) -> Tensor | None:
    """The loss of a small float32 batch on the CPU, as operations that torch's autograd differentiates.

    None for all else, soft labels and whatever is wrong included: the general way takes it, or tells. So it does where
    a focal loss is infinite: its derivative by autograd would be infinity times 0.
    """
    if not (_is_plain(inputs) and _is_plain(targets)) or reduction not in ("mean", "sum"):
        return None
    if inputs.shape != targets.shape or not inputs.dim() or not 0 < inputs.numel() <= _SMALL or targets.requires_grad:
        return None
    if dispatch.needs_plain_operations() or dispatch.resolve(backend, inputs.device) != "eager":
        return None
    if not (alpha is None or isinstance(alpha, float)) or any(
        number.__class__ not in (int, float) for number in params
    ):
        return None
    if not is_short(formula, params, alpha) or not targets.mul(targets).equal(targets):
        return None
    sign = torch.sub(_ONE, targets, alpha=2)  # torch.rsub takes twice as long
    v = sign * inputs
    if formula == "bce":
        losses = softplus_of(v)  # to ask the formula for it costs a tenth of the call
    else:
        weight = None if alpha is None else torch.rsub(targets, 1 - alpha, alpha=1 - 2 * alpha)
        label = Label(targets, sign, None, None)
        losses, _ = FORMULAS[formula](v, label, Values(None, None, None), weight, *params, slope=False)
    loss = losses.mean() if reduction == "mean" else losses.sum()
    return loss if formula == "bce" or math.isfinite(loss.item()) else None


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    return (
        tensor.__class__ in (Tensor, Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )
