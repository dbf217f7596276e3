"""What the losses are measured against: their definitions, in float64 under autograd or in mpmath."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor
from torch.nn import functional as F


def reduce(loss: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The five reductions, spelled out."""
    if reduction == "none":
        return loss
    count = {
        "sum": 1,
        "mean": max(loss.numel(), 1),
        "batchmean": max(loss.shape[:-1].numel(), 1),
        "mean_positive": max(float(targets.detach().sum()), 1),
    }
    return loss.sum() / count[reduction]


def sigmoid_focal(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The focal loss as its papers and torchvision state it, with torch's own cross-entropy; right for |x| <= 15."""
    targets = targets.to(inputs.dtype)
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none", pos_weight=pos_weight)
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha is not None:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return reduce(loss if weight is None else loss * weight, targets, reduction)


def binary_cross_entropy(
    inputs: Tensor,
    targets: Tensor,
    reduction: str = "none",
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """torch's own function, element by element."""
    targets = targets.to(inputs.dtype)
    loss = F.binary_cross_entropy_with_logits(inputs, targets, weight, reduction="none", pos_weight=pos_weight)
    return reduce(loss, targets, reduction)


def exact_focal(x: float, y: float, gamma: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Focal loss of one logit with a label from 0 to 1, and its derivative, at 60 digits."""
    with mpmath.workdps(60):

        def loss(logit: mpmath.mpf) -> mpmath.mpf:
            p, not_p = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
            ce = -y * mpmath.log(p) - (1 - y) * mpmath.log(not_p)
            return (y * not_p + (1 - y) * p) ** gamma * ce

        step = mpmath.mpf(10) ** -20
        value = mpmath.mpf(x)
        return loss(value), (loss(value + step) - loss(value - step)) / (2 * step)
