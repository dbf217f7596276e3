"""What weights each element by its batch or by the training set: GHM's memory, counts, and timm's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import LABELS, logits, uniform, value_and_grad
from oracles import timm_file
from torch import nn

import bertloss_fast as bf

COUNTS = torch.tensor([500, 200, 100, 30, 5, 1, 0])


def test_running_counts_as_mmdetection_keeps_them(backend: str, device: torch.device) -> None:
    """Three batches by hand: a bin that is empty in a batch keeps its mean, and its weight is never asked for."""
    bins, momentum = 5, 0.75
    module = bf.GHMLoss(bins, momentum, backend=backend).to(device)
    mean = torch.zeros(bins, dtype=torch.float64, device=device)
    for seed in range(3):
        x, y = logits(6, LABELS, device=device, seed=seed), uniform(6, LABELS, device=device, seed=seed) < 0.3
        index = ((x.sigmoid() - y.double()).abs() * bins).long().clamp_max(bins - 1)
        count = index.flatten().bincount(minlength=bins)
        mean = torch.where(count > 0, momentum * mean + (1 - momentum) * count, mean)
        weight = (x.numel() / mean / (count > 0).sum())[index]
        ce = nn.functional.binary_cross_entropy_with_logits(x, y.double(), reduction="none")
        expected = value_and_grad((ce * weight.detach()).mean(), x)
        ours = value_and_grad(module(x, y), x)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)  # the memory is fp32
        torch.testing.assert_close(module.running_counts, mean.float())
    assert torch.equal(module.state_dict()["running_counts"], module.running_counts)
    before = module.running_counts.clone()
    module.eval()(x, y)
    assert torch.equal(module.running_counts, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ghm_in_every_dtype(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Logits whose gradients lie in the middle of a bin: at an edge, a rounding decides."""
    bins = 10
    norm = (torch.randint(bins, (9, LABELS), generator=torch.Generator().manual_seed(0)) + 0.5) / bins
    y = torch.rand(9, LABELS, generator=torch.Generator().manual_seed(1)) < 0.3
    x = torch.where(y, -torch.logit(norm), torch.logit(norm)).to(device, dtype).requires_grad_()
    y = y.to(device)
    exact = x.detach().double().requires_grad_()
    value, grad = value_and_grad(bf.ghm_loss(x, y, bins, backend=backend), x)
    true_value, true_grad = value_and_grad(oracles.ghm(exact, y, reduction="mean", bins=bins), exact)
    torch.testing.assert_close(value, true_value.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(grad, true_grad.to(dtype), rtol=2**-7, atol=1e-6)


TIMM: dict[str, tuple[str, Callable[..., nn.Module], str, tuple[Any, ...], dict[str, Any]]] = {
    "asl": ("asymmetric_loss", bf.AsymmetricLossMultiLabel, "AsymmetricLossMultiLabel", (), {}),
    "asl by position": (
        "asymmetric_loss",
        bf.AsymmetricLossMultiLabel,
        "AsymmetricLossMultiLabel",
        (3.0, 0.5, 0.1, 1e-12, True, 0.2, "sum", torch.linspace(0.5, 2, LABELS), 2.0),
        {},
    ),
    "poly": ("poly_loss", bf.PolyBinaryCrossEntropy, "PolyBinaryCrossEntropy", (), {}),
    "poly by position": (
        "poly_loss",
        bf.PolyBinaryCrossEntropy,
        "PolyBinaryCrossEntropy",
        (1.5, 2.0, 0.3, 0.1, "batchmean"),
        {},
    ),
    "balanced": (
        "distribution_balanced_loss",
        bf.DistributionBalancedLoss,
        "DistributionBalancedLoss",
        (COUNTS, 600),
        {},
    ),
    "balanced by position": (
        "distribution_balanced_loss",
        bf.DistributionBalancedLoss,
        "DistributionBalancedLoss",
        (COUNTS, 600, 0.2, 5.0, 0.3, 3.0, 0.1, 1.5, 1.2, 0.1, "sum"),
        {},
    ),
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("case", TIMM)
def test_equals_timm(case: str, soft: bool, backend: str, device: torch.device) -> None:
    file, ours, name, args, kwargs = TIMM[case]
    theirs = getattr(timm_file(file), name)(*args, **kwargs).to(device)
    module = ours(*args, **kwargs, backend=backend).to(device)
    module.load_state_dict(theirs.state_dict())
    x = logits(6, LABELS, device=device, dtype=torch.float32).detach().clamp(-15, 15).requires_grad_()
    y = uniform(6, LABELS, device=device).float()
    y = y if soft else (y < 0.3).float()
    torch.testing.assert_close(value_and_grad(module(x, y), x), value_and_grad(theirs(x, y), x), rtol=1e-5, atol=1e-5)


def test_weights_from_counts() -> None:
    counts, beta, num_samples = [1000, 10, 1, 0], 0.99, 2000
    effective = [(1 - beta ** max(n, 1)) / (1 - beta) for n in counts]
    weight = torch.tensor([1 / e for e in effective], dtype=torch.float64)
    torch.testing.assert_close(bf.class_balanced_weight(counts, beta), (weight / weight.sum() * 4).float())
    assert torch.equal(bf.class_balanced_weight(counts, 0.0), torch.ones(4))
    torch.testing.assert_close(
        bf.pos_weight_from_counts(torch.tensor(counts), num_samples), torch.tensor([1.0, 199.0, 1999.0, 1999.0])
    )
    bias = bf.prior_bias([1000, 10, 2000, 0], num_samples)
    torch.testing.assert_close(bias.sigmoid(), torch.tensor([0.5, 0.005, 0.9995, 0.0005]))


def test_label_counts() -> None:
    y = uniform(9, LABELS, device=torch.device("cpu")) < 0.4
    expected = torch.tensor([int(column.sum()) for column in y.T])
    for targets in (y, y.long(), y.float(), bf.SparseLabels.from_dense(y), y.float().to_sparse_csr()):
        assert torch.equal(bf.label_counts(targets), expected)
