"""What the losses are measured against: their definitions, in float64 under autograd or in mpmath."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bertloss_fast import SparseLabels


def reduce(loss: Tensor, targets: Tensor, kept: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The five reductions, spelled out."""
    if reduction == "none":
        return loss
    count = {
        "sum": 1,
        "mean": max(int(kept.sum()), 1),
        "batchmean": max(loss.shape[:-1].numel(), 1),
        "mean_positive": max(float(targets.detach()[kept].sum()), 1),
    }
    return loss.sum() / (count[reduction] if normalizer is None else normalizer)


def with_options(element: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What every loss takes, around the loss of an element: ``element(x, y, pos_weight, given, kept, **params)``."""

    def oracle(
        inputs: Tensor,
        targets: Tensor | SparseLabels,
        reduction: str = "none",
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        normalizer: float | Tensor | None = None,
        **params: Any,
    ) -> Tensor:
        if isinstance(targets, SparseLabels) or targets.layout == torch.sparse_csr:
            targets = targets.to_dense().reshape(inputs.shape)
        kept = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask
        if ignore_index is not None:
            kept = kept & (targets != ignore_index)
        x = torch.where(kept, inputs, 0.0)
        given = torch.where(kept, targets.to(inputs.dtype), 0.0)
        y = given * (1 - label_smoothing) + 0.5 * label_smoothing
        loss = element(x, y, pos_weight=pos_weight, given=given, kept=kept, **params)
        if weight is not None:
            loss = loss * weight
        if sample_weight is not None:
            loss = loss * sample_weight.unsqueeze(-1)
        return reduce(torch.where(kept, loss, 0.0), given, kept, reduction, normalizer)

    return oracle


def _cross_entropy(x: Tensor, y: Tensor, pos_weight: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y, reduction="none", pos_weight=pos_weight)


@with_options
def binary_cross_entropy(x: Tensor, y: Tensor, pos_weight: Tensor | None, **_: Any) -> Tensor:
    """torch's own function."""
    return _cross_entropy(x, y, pos_weight)


@with_options
def sigmoid_focal(
    x: Tensor,
    y: Tensor,
    pos_weight: Tensor | None,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    epsilon: float = 0.0,
    **_: Any,
) -> Tensor:
    """The focal loss as its papers and torchvision state it, and timm's poly-1 term; right for |x| <= 15."""
    p = torch.sigmoid(x)
    wrong = 1 - (p * y + (1 - p) * (1 - y))
    loss = _cross_entropy(x, y, pos_weight) * wrong**gamma + epsilon * wrong ** (gamma + 1)
    return loss if alpha is None else (alpha * y + (1 - alpha) * (1 - y)) * loss


@with_options
def asymmetric(
    x: Tensor,
    y: Tensor,
    pos_weight: Tensor | None,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_focal_weight: bool = False,
    **_: Any,
) -> Tensor:
    """The asymmetric loss as its paper and timm state it."""
    p = torch.sigmoid(x)
    not_p = (1 - p + clip).clamp(max=1)
    positive = y * p.log()
    if pos_weight is not None:
        positive = positive * pos_weight
    base = 1 - (p * y + not_p * (1 - y))
    exponent = gamma_pos * y + gamma_neg * (1 - y)
    # 0 ** 0 is 1, and autograd's derivative of a power at 0 is not asked for.
    modulation = torch.where(base > 0, base.clamp_min(1e-300) ** exponent, (exponent == 0).to(x.dtype))
    if detach_focal_weight:
        modulation = modulation.detach()
    return -(positive + (1 - y) * not_p.log()) * modulation


@with_options
def distribution_balanced(
    x: Tensor,
    y: Tensor,
    pos_weight: Tensor | None,
    given: Tensor,
    class_counts: Tensor,
    num_samples: int,
    neg_scale: float = 2.0,
    focal_gamma: float = 2.0,
    **_: Any,
) -> Tensor:
    """The distribution-balanced loss as its paper and timm state it, with the values that timm has by default."""
    counts = class_counts.to(x.dtype).clamp(1, num_samples - 1)
    inverse = (1 / counts).to(x.dtype)
    shift = (-(num_samples / counts - 1).log() * 0.05 / neg_scale).to(x.dtype)
    rate = (given.detach() * inverse).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    weight = torch.sigmoid(10 * (inverse / rate - 0.2)) + 0.1
    z = x + shift
    positive = y * F.softplus(-z, threshold=40) * torch.sigmoid(-z) ** focal_gamma
    if pos_weight is not None:
        positive = positive * pos_weight
    negative = F.softplus(neg_scale * z, threshold=40) / neg_scale * torch.sigmoid(neg_scale * z) ** focal_gamma
    return weight * (2.0 if focal_gamma else 1.0) * (positive + (1 - y) * negative)


@with_options
def ghm(x: Tensor, y: Tensor, pos_weight: Tensor | None, kept: Tensor, bins: int = 30, **_: Any) -> Tensor:
    """GHM-C as mmdetection computes it, bin by bin, without a memory."""
    norm = (torch.sigmoid(x) - y).abs().detach()
    edges = torch.arange(bins + 1, dtype=x.dtype) / bins
    edges[-1] += 1e-6
    weight = torch.zeros_like(x)
    filled = 0
    for low, high in itertools.pairwise(edges.tolist()):
        inside = (norm >= low) & (norm < high) & kept
        if inside.any():
            weight[inside] = kept.sum().to(x.dtype) / inside.sum()
            filled += 1
    return _cross_entropy(x, y, pos_weight) * weight / max(filled, 1)


def exact_derivative(loss: Callable[[mpmath.mpf], mpmath.mpf], x: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """A function of one logit and its derivative, at 60 digits."""
    with mpmath.workdps(60):
        step = mpmath.mpf(10) ** -20
        value = mpmath.mpf(x)
        return loss(value), (loss(value + step) - loss(value - step)) / (2 * step)


def exact_focal(x: float, y: float, gamma: float, epsilon: float = 0.0) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Focal loss of one logit with a label from 0 to 1, with poly-1's term, and its derivative."""

    def loss(logit: mpmath.mpf) -> mpmath.mpf:
        p, not_p = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
        ce = -y * mpmath.log(p) - (1 - y) * mpmath.log(not_p)
        wrong = y * not_p + (1 - y) * p
        return wrong**gamma * (ce + epsilon * wrong)

    return exact_derivative(loss, x)


def exact_asymmetric(
    x: float, positive: bool, gamma_neg: float, gamma_pos: float, clip: float
) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Asymmetric loss of one logit, and its derivative."""

    def loss(logit: mpmath.mpf) -> mpmath.mpf:
        p, not_p = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
        if positive:
            return -(not_p**gamma_pos) * mpmath.log(p)
        r = mpmath.mpf(max(p - mpmath.mpf(clip), 0))
        return -(r**gamma_neg) * mpmath.log(1 - r)

    return exact_derivative(loss, x)


def as_hard(targets: Tensor | SparseLabels, shape: torch.Size) -> Tensor:
    if isinstance(targets, SparseLabels) or targets.layout == torch.sparse_csr:
        targets = targets.to_dense().reshape(shape)
    return targets > 0.5


def zlpr(
    x: Tensor,
    targets: Tensor | SparseLabels,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The definition, row by row, over the elements that count."""
    positive = as_hard(targets, x.shape)
    kept = torch.ones_like(positive) if mask is None else mask
    if ignore_index is not None:
        kept = kept & (targets != ignore_index)
    losses = []
    for row, is_positive, counts in zip(x, positive, kept, strict=True):
        negatives, positives = row[counts & ~is_positive], row[counts & is_positive]
        losses.append(torch.log1p(negatives.exp().sum()) + torch.log1p((-positives).exp().sum()))
    loss = torch.stack(losses)
    if sample_weight is not None:
        loss = loss * sample_weight
    if reduction == "none":
        return loss
    rows = max(int(kept.any(1).sum()), 1)
    count = {"sum": 1, "mean": rows, "batchmean": rows, "mean_positive": max(int((positive & kept).sum()), 1)}
    return loss.sum() / (count[reduction] if normalizer is None else normalizer)


def two_way(
    x: Tensor,
    targets: Tensor | SparseLabels,
    tp: float = 4.0,
    tn: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """The definition, line by line: rows, and then columns."""
    positive = as_hard(targets, x.shape)
    kept = torch.ones_like(positive) if mask is None else mask
    if ignore_index is not None:
        kept = kept & (targets != ignore_index)
    total = 0 * x.sum()
    for values, is_positive, counts in ((x, positive, kept), (x.T, positive.T, kept.T)):
        losses = []
        for line, p, k in zip(values, is_positive, counts, strict=True):
            if (p & k).any() and (~p & k).any():
                hardest = tp * torch.logsumexp(-line[p & k] / tp, 0) + tn * torch.logsumexp(line[~p & k] / tn, 0)
                losses.append(F.softplus(hardest, threshold=40))
        lines = int((is_positive & counts).any(1).sum())
        total = total + (torch.stack(losses).sum() if losses else 0.0) / max(lines, 1)
    return total


def timm_file(name: str) -> ModuleType:
    """One file of timm's losses: importing timm itself would ask for torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    path = f"{spec.submodule_search_locations[0]}/loss/{name}.py"
    file_spec = importlib.util.spec_from_file_location(f"timm_{name}", path)
    assert file_spec is not None
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module
