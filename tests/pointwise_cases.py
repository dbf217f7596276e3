"""What the tests of squared error and KL divergence share: the losses, their batches, options, and torch's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import TOLERANCE, logits, uniform
from torch import Tensor, nn
from torch.nn import functional as F

import bertloss_fast as bf

SHAPE = (5, 7)
INFINITY = float("inf")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = {"mse": ("none", "sum", "mean"), "kl": ("none", "sum", "mean", "batchmean")}
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mse": (bf.mse_loss, {}),
    "kl": (bf.kl_div, {}),
    "kl of logs": (bf.kl_div, {"log_target": True}),
}
MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "mse": (bf.MSELoss, nn.MSELoss),
    "kl": (bf.KLDivLoss, nn.KLDivLoss),
}
CASES = [(loss, reduction) for loss in LOSSES for reduction in REDUCTIONS[loss.split()[0]]]


def oracle(
    loss: str,
    x: Tensor,
    t: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """torch's function, of the elements that count."""
    function = F.mse_loss if loss == "mse" else F.kl_div
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    options |= {} if weight is None else {"weight": weight[kept]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kl_div's mean
        if reduction == "none":
            of_kept = function(x[kept], t[kept], reduction="none", **options)
            return torch.zeros_like(x, dtype=of_kept.dtype).masked_scatter(kept, of_kept)
        if normalizer is None and reduction != "batchmean":
            return function(x[kept], t[kept], reduction=reduction, **options)
        total = function(x[kept], t[kept], reduction="sum", **options)
        return total / (x.shape[0] if normalizer is None else normalizer)


def batch(
    loss: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs and targets that require a gradient: log-probabilities and probabilities of every size, and some 0."""
    x, t = logits(*shape, device=device, seed=seed).detach(), logits(*shape, device=device, seed=seed + 1).detach()
    if loss != "mse":
        x, t = (-values.abs() for values in (x, t))
    if loss == "kl":
        t = t.exp()
    return x.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()


def values_and_grads(
    loss: Tensor, x: Tensor, t: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.autograd.grad(loss, (x, t), torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), *grads


def assert_rounded(found: tuple[Tensor, ...], true: tuple[Tensor, ...], **options: Any) -> None:
    """What is rounded to a dtype is as far from the true value as that allows."""
    for ours, exact in zip(found, true, strict=True):
        torch.testing.assert_close(ours.to(exact.dtype), exact, **TOLERANCE[ours.dtype], **options)


# Each for itself, and those that meet in one denominator.
OPTIONS = {
    "none": (),
    "mask": ("mask",),
    "normalizer": ("normalizer",),
    "masked normalizer": ("mask", "normalizer"),
    "weight": ("weight",),
    "weight and mask": ("weight", "mask"),
    "all": ("weight", "mask", "normalizer"),
}


def options_of(names: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    values = {
        "weight": 0.01 * uniform(*SHAPE, device=device, seed=5),  # less than 1 in all
        "mask": uniform(*SHAPE, device=device, seed=6) < 0.6,
        "normalizer": torch.tensor(7, device=device),
    }
    return {name: values[name] for name in names}
