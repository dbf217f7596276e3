"""What the losses of rows are measured against: torch's functions, or their definitions in float64 under autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def reduce(
    losses: Tensor,
    kept: Tensor,
    reduction: str,
    *,
    sample_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    mean_over: Tensor | None = None,
) -> Tensor:
    """The four reductions, spelled out."""
    losses = losses if sample_weight is None else losses * sample_weight
    losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    rows = float(kept.sum()) if mean_over is None else float(mean_over)
    count = {"sum": 1, "mean": rows or 1, "batchmean": max(kept.numel(), 1)}[reduction]
    return losses.sum() / (count if normalizer is None else normalizer)


def _log_p(x: Tensor) -> Tensor:
    return F.log_softmax(x, -1)


def _hot(x: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The smoothed target, and which rows count."""
    if target.is_floating_point():
        hot, kept = target, torch.ones(target.shape[:-1], dtype=torch.bool, device=x.device)
    else:
        kept = target != ignore_index
        hot = F.one_hot(torch.where(kept, target, 0).long(), x.shape[-1]).to(x.dtype)
    return hot * (1 - label_smoothing) + label_smoothing / x.shape[-1], kept


def _weight_of(target: Tensor, kept: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None or target.is_floating_point():
        return kept.double()
    return torch.where(kept, weight[torch.where(kept, target, 0).long()], 0)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """torch's, and what Liger and others add to it."""
    if logit_softcap is not None:
        x = torch.where(x == -torch.inf, x, logit_softcap * torch.tanh(x / logit_softcap))
    long = target if target.is_floating_point() else target.long()
    losses = F.cross_entropy(x, long, weight, None, ignore_index, None, "none", label_smoothing)
    kept = _hot(x, target, 0.0, ignore_index)[1]
    of_weights = _weight_of(target, kept, weight).sum()
    loss = reduce(losses, kept, reduction, mean_over=of_weights if not target.is_floating_point() else None, **options)
    z = z_loss * x.logsumexp(-1).square()
    return loss + reduce(z, kept, reduction, normalizer=options.get("normalizer")) if z_loss else loss


def softmax_focal(
    x: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    hot, kept = _hot(x, target, label_smoothing, ignore_index)
    p_t = (_log_p(x).exp() * _hot(x, target, 0.0, ignore_index)[0]).sum(-1)
    losses = (1 - p_t) ** gamma * -(hot * _log_p(x)).sum(-1)
    losses = losses * _weight_of(target, kept, weight) * _weight_of(target, kept, alpha)
    return reduce(losses, kept, reduction, **options)


def poly(
    x: Tensor,
    target: Tensor,
    *,
    epsilon: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    hot, kept = _hot(x, target, label_smoothing, ignore_index)
    hot = hot if weight is None else hot * weight
    log_p = _log_p(x)
    return reduce((hot * (-log_p + epsilon * (1 - log_p.exp()))).sum(-1), kept, reduction, **options)


def ldam(
    x: Tensor, target: Tensor, counts: Any, *, max_margin: float = 0.5, scale: float = 30.0, **options: Any
) -> Tensor:
    """The official implementation's margins, and their shift of one logit."""
    margins = 1 / torch.as_tensor(counts, dtype=torch.float64, device=x.device).sqrt().sqrt()
    margins = margins * max_margin / margins.max()
    hot = _hot(x, target, 0.0, options.get("ignore_index", -100))[0]
    return softmax_focal(scale * (x - hot * margins), target, gamma=0.0, **options)


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return (p * (log_p - log_q)).sum(-1)


def distillation(
    x: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    log_p, log_q = _log_p(x / temperature), _log_p(teacher.detach() / temperature)
    losses = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if target is None:
        return reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction, **options)
    nll = F.cross_entropy(x, target.long(), ignore_index=ignore_index, reduction="none")
    return reduce(alpha * losses + (1 - alpha) * nll, target != ignore_index, reduction, **options)


def r_drop(
    a: Tensor,
    b: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    log_p, log_q = _log_p(a), _log_p(b)
    both = kl(log_p.exp(), log_p, log_q) + kl(log_q.exp(), log_q, log_p)
    nll = [F.cross_entropy(x, target.long(), ignore_index=ignore_index, reduction="none") for x in (a, b)]
    return reduce(0.5 * (nll[0] + nll[1] + alpha * both), target != ignore_index, reduction, **options)


def js(a: Tensor, b: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    m = (0.5 * (p + q)).log()
    losses = 0.5 * (kl(p, p.log(), m) + kl(q, q.log(), m))
    return reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction, **options)


def margin_mse(scores: Tensor, teacher: Tensor, *, reduction: str = "mean", **options: Any) -> Tensor:
    """torch's mean squared error of the margins, which sentence-transformers takes too."""
    if teacher.shape == scores.shape:
        teacher = teacher[..., :1] - teacher[..., 1:]
    margins = scores[..., :1] - scores[..., 1:]
    losses = F.mse_loss(margins, teacher, reduction="none").sum(-1)
    kept = torch.ones_like(losses, dtype=torch.bool)
    return reduce(losses, kept, reduction, mean_over=torch.tensor(margins.numel()), **options)


Oracle = Callable[..., Tensor]
