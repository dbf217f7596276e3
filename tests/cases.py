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
    "poly": Loss(bf.poly_focal_loss, oracles.sigmoid_focal, {"epsilon": 2.0, "gamma": 0.0, "alpha": None}),
    "poly-focal": Loss(bf.poly_focal_loss, oracles.sigmoid_focal, {"epsilon": -0.7, "gamma": 1.5, "alpha": 0.3}),
    "asl": Loss(bf.asymmetric_loss, oracles.asymmetric, {}),
    "asl-unclipped": Loss(bf.asymmetric_loss, oracles.asymmetric, {"clip": 0.0, "gamma_pos": 0.0, "gamma_neg": 2.0}),
    "asl-fractions": Loss(bf.asymmetric_loss, oracles.asymmetric, {"clip": 0.2, "gamma_pos": 2.5, "gamma_neg": 0.7}),
    "asl-detached": Loss(bf.asymmetric_loss, oracles.asymmetric, {"detach_focal_weight": True}),
    "balanced": Loss(
        bf.distribution_balanced_loss,
        oracles.distribution_balanced,
        {"class_counts": torch.tensor([500, 200, 100, 30, 5, 1, 0][:LABELS]), "num_samples": 600},
    ),
    "balanced-bce": Loss(
        bf.distribution_balanced_loss,
        oracles.distribution_balanced,
        {
            "class_counts": torch.tensor([5, 20, 10, 30, 5, 1, 9][:LABELS]),
            "num_samples": 60,
            "focal_gamma": 0.0,
            "neg_scale": 3.0,
        },
    ),
    "ghm": Loss(bf.ghm_loss, oracles.ghm, {"bins": 11}),
}
ROWWISE = {
    "zlpr": Loss(bf.zlpr_loss, oracles.zlpr, {}),
    "two-way": Loss(bf.two_way_loss, oracles.two_way, {}),
    "two-way-scaled": Loss(bf.two_way_loss, oracles.two_way, {"tp": 2.0, "tn": 0.5}),
}
# Losses with weights that follow the batch: no function of one logit and one label.
OF_THE_BATCH = ("balanced", "balanced-bce", "ghm")
# Each regime catches what the others let through: hard labels take the short formula, soft ones the long one.
TARGETS = {
    "bool": lambda uniform: uniform < 0.3,
    "uint8": lambda uniform: (uniform < 0.3).to(torch.uint8),
    "int64": lambda uniform: (uniform < 0.3).to(torch.int64),
    "float-hard": lambda uniform: (uniform < 0.3).to(torch.float64),
    "float-soft": lambda uniform: uniform,
    "sparse": lambda uniform: bf.SparseLabels.from_dense((uniform < 0.3).reshape(-1, *uniform.shape[-1:])),
    "sparse-csr": lambda uniform: (uniform < 0.3).double().reshape(-1, *uniform.shape[-1:]).to_sparse_csr(),
}
_ROWS = 5
OPTIONS = {
    "none": {},
    "weight-of-label": {"weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64)},
    "weight-of-element": {"weight": torch.linspace(0, 3, _ROWS * LABELS, dtype=torch.float64).reshape(_ROWS, LABELS)},
    "pos-weight": {"pos_weight": torch.linspace(0.2, 9, LABELS, dtype=torch.float64)},
    "sample-weight": {"sample_weight": torch.linspace(0, 2, _ROWS, dtype=torch.float64)},
    "mask": {"mask": torch.arange(_ROWS * LABELS).reshape(_ROWS, LABELS) % 3 > 0},
    "smoothing": {"label_smoothing": 0.3},
    "normalizer": {"normalizer": 3.5},
    "all": {
        "weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64),
        "pos_weight": torch.tensor(3.0, dtype=torch.float64),
        "sample_weight": torch.linspace(0.5, 2, _ROWS, dtype=torch.float64),
        "mask": torch.arange(_ROWS * LABELS).reshape(_ROWS, LABELS) % 4 > 0,
        "label_smoothing": 0.1,
        "normalizer": torch.tensor(7.25),
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
