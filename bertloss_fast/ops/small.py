"""Batches so small that a call's checks cost more than its arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..reference.formulas import Label, Values, focal, power, softplus_of
from . import dispatch
from .few_passes import has_few_passes

# A binary cross-entropy of 32 x 100 takes 1.4 times the time of torch's with it, and 2.2 without, a focal loss two
# thirds of a Function's (docs/measured.md); a larger batch has less to gain.
_SMALL = 8192
# Times an upstream gradient of 2^24, and 2 for the slope of a square, it is still below the largest float32.
_LARGE = 1e30
with _disable_current_modes():  # a first import may come while FakeTensors are traced
    _MINUS_ONE = torch.full((), -1, dtype=torch.float32, device="cpu")
    _HALF = _MINUS_ONE / -2


def small_cross_entropy(inputs: Any, classes: Any, reduction: str, backend: str | None) -> Tensor | None:
    """Cross-entropy of a small float32 batch on the CPU, every row of which has a class: torch's kernel at once.

    None for all else, whatever is wrong included: the general way takes it, or tells.
    """
    if not _may_serve(inputs, reduction, backend) or not _are_classes(inputs, classes):
        return None
    return F.cross_entropy(inputs, classes, reduction=reduction)


def small_softmax_focal_loss(
    inputs: Any, classes: Any, gamma: float, reduction: str, backend: str | None
) -> Tensor | None:
    """The focal loss of classes likewise, in float64, where few operations keep the digits of sure rows.

    None also where a logit that counts is not finite.
    """
    if not _may_serve(inputs, reduction, backend) or not _are_classes(inputs, classes):
        return None
    logits, at = inputs.double(), classes.unsqueeze(1)
    u = (logits - logits.gather(1, at)).scatter(1, at, -math.inf).logsumexp(1)  # as in reference/softmax.py
    if not all(math.isfinite(end.item()) for end in u.aminmax()):
        return None
    losses = softplus_of(u) * power(torch.sigmoid(u), gamma, lambda: -softplus_of(-u))
    return _reduced(losses, reduction).float()


def small_binary_cross_entropy(inputs: Any, targets: Any, reduction: str, backend: str | None) -> Tensor | None:
    """Binary cross-entropy likewise, of hard labels: operations that torch's autograd differentiates."""
    sign = _sign_of_hard(inputs, targets) if _may_serve(inputs, reduction, backend) else None
    # Of -v with beta = -1, which gives -log(1 + e^v).
    return None if sign is None else _reduced(softplus_of(sign * inputs, -1), reduction, -1)


def small_focal_loss(
    inputs: Any, targets: Any, alpha: float | Tensor | None, gamma: float, reduction: str, backend: str | None
) -> Tensor | None:
    """The focal loss of labels likewise.

    None also where it is so large that autograd's derivative of it, times an upstream gradient, could be infinity
    times 0.
    """
    if not _may_serve(inputs, reduction, backend) or gamma.__class__ not in (int, float):
        return None
    if not (alpha is None or isinstance(alpha, float)) or not has_few_passes("focal", (gamma,), alpha):
        return None
    sign = _sign_of_hard(inputs, targets)
    if sign is None:
        return None
    sign = -sign  # as the formulas have it
    weight = None if alpha is None else torch.add(_HALF, sign, alpha=0.5 - alpha)
    label = Label(targets, sign, None, None)
    losses, _ = focal(sign * inputs, label, Values(None, None, None), weight, gamma, slope=False)
    loss = _reduced(losses, reduction)
    return loss if loss.item() < _LARGE else None


def _are_classes(inputs: Tensor, classes: Any) -> bool:
    """Whether they are a class for each row of a matrix."""
    if inputs.dim() != 2 or classes.__class__ is not Tensor or classes.dtype is not torch.int64:
        return False
    if classes.shape != inputs.shape[:1] or not classes.is_cpu or classes.layout is not torch.strided:
        return False
    low, high = classes.aminmax()
    return bool(low.item() >= 0 and high.item() < inputs.shape[1])


def _sign_of_hard(inputs: Tensor, targets: Any) -> Tensor | None:
    """2y - 1 of the targets y, if they are 0 and 1."""
    if not _is_plain(targets) or targets.requires_grad or targets.shape != inputs.shape:
        return None
    sign = torch.add(_MINUS_ONE, targets, alpha=2)
    # y / (2y - 1) is y for 0 and 1 alone, and NaN for an infinite y, where y^2 would be y too.
    return sign if torch.div(targets, sign).equal(targets) else None


def _may_serve(inputs: Any, reduction: str, backend: str | None) -> bool:
    """The first check is first so that a compiler sees no other."""
    if dispatch.needs_plain_operations() or reduction.__class__ is not str or reduction not in ("mean", "sum"):
        return False
    if not _is_plain(inputs) or not inputs.dim() or not 0 < inputs.numel() <= _SMALL:
        return False
    return dispatch.is_eager_on_cpu(backend)


def _reduced(losses: Tensor, reduction: str, times: int = 1) -> Tensor:
    # The backward of mean() would divide every element.
    return losses.sum() * (times / losses.numel() if reduction == "mean" else times)


def _is_plain(tensor: Any) -> bool:
    return (
        tensor.__class__ in (Tensor, Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )
