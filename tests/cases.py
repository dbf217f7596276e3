"""The losses under test, each beside its oracle, and the arguments that they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import torch
from torch import Tensor

import bertloss_fast as bf

REDUCTIONS = ("none", "sum", "mean", "batchmean", "mean_positive")
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.7)
LABELS = 7
DOUBLE = {"atol": 1e-12, "rtol": 1e-10}


class Loss(NamedTuple):
    """A public loss beside its oracle, which takes the same options."""

    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    options: dict[str, Any]


LOSSES = {
    "bce": Loss(bf.binary_cross_entropy_with_logits, oracles.binary_cross_entropy, {}),
    **{
        f"focal-{gamma}": Loss(bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"gamma": gamma, "alpha": 0.3})
        for gamma in GAMMAS
    },
    "focal-unweighted": Loss(bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": None}),
    "focal-by-label": Loss(
        bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": torch.linspace(0, 1, LABELS, dtype=torch.float64)}
    ),
}
# Each regime catches what the others let through: hard labels take the short formula, soft ones the long one.
TARGETS = {
    "bool": lambda uniform: uniform < 0.3,
    "uint8": lambda uniform: (uniform < 0.3).to(torch.uint8),
    "int64": lambda uniform: (uniform < 0.3).to(torch.int64),
    "float-hard": lambda uniform: (uniform < 0.3).to(torch.float64),
    "float-soft": lambda uniform: uniform,
}
WEIGHTS = {
    "unweighted": {},
    "weight-of-label": {"weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64)},
    "weight-of-element": {"weight": torch.linspace(0, 3, 5 * LABELS, dtype=torch.float64).reshape(5, LABELS)},
    "pos-weight": {"pos_weight": torch.linspace(0.2, 9, LABELS, dtype=torch.float64)},
    "both": {
        "weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64),
        "pos_weight": torch.tensor(3.0, dtype=torch.float64),
    },
}


def logits(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()


def uniform(*shape: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def to(options: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {key: value.to(device, dtype) if isinstance(value, Tensor) else value for key, value in options.items()}


def value_and_grad(loss: Tensor, inputs: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


# Rounding of the result and, in 16 bits, of the approximate units; both sides get the same logits.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-8},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
