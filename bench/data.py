"""Inputs and targets of a case, and one pass of a loss over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bertloss_fast.targets import SparseLabels

from .cases import TWIN, Case, MeanLoss


class OfLayer(NamedTuple):
    """What comes after the hidden states that a linear layer is given."""

    weight: Tensor  # [L, D]
    targets: Tensor | SparseLabels


Targets = Tensor | SparseLabels | OfLayer

# Beyond it timm, which clamps probabilities at 1e-8, computes another loss: the figure for the tails says so.
_LARGEST = 18.0


def make_data(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Targets]:
    """Logits up to ±18, so that saturation is met, and the targets."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.features is not None:
        return _behind_layer(case, generator)
    inputs = torch.empty(case.shape, dtype=case.dtype, device=device).normal_(0, 4, generator=generator)
    inputs.clamp_(-_LARGEST, _LARGEST)
    if case.suite == "listwise":
        # Distinct, so that nobody's way to rank equal ones matters.
        ranks = inputs.argsort(dim=1).argsort(dim=1)
        inputs = (ranks * (8 / case.shape[1]) - 4).to(case.dtype)
    if case.targets == "teacher":
        targets: Tensor | SparseLabels = torch.empty_like(inputs).normal_(0, 4, generator=generator)
    else:
        targets = _make_targets(case, generator)
    return inputs.requires_grad_(), targets


def _behind_layer(case: Case, generator: torch.Generator) -> tuple[Tensor, Targets]:
    """Hidden states and a weight that make such logits."""
    (rows, labels), device = case.shape, generator.device
    assert case.features is not None
    hidden = torch.empty(rows, case.features, dtype=case.dtype, device=device).normal_(generator=generator)
    weight = torch.empty(labels, case.features, dtype=case.dtype, device=device)
    weight.normal_(0, 4 / case.features**0.5, generator=generator)
    return hidden.requires_grad_(), OfLayer(weight.requires_grad_(), _make_targets(case, generator))


def _make_targets(case: Case, generator: torch.Generator) -> Tensor | SparseLabels:
    device = generator.device
    if case.targets == "classes":
        return torch.randint(case.shape[1], case.shape[:1], device=device, generator=generator)
    if case.targets in ("relevant", "graded"):
        levels = torch.randint(10, case.shape, device=device, generator=generator)
        return (levels == 9).long() if case.targets == "relevant" else (levels - 6).clamp_min(0)
    if case.labels_per_row is None:
        dense = torch.empty(case.shape, dtype=case.target_dtype or TWIN, device=device)
        dense.bernoulli_(0.1, generator=generator)
        return dense if case.target_dtype else SparseLabels.from_dense(dense)
    (rows, num_labels), count = case.shape, case.labels_per_row
    drawn = torch.randint(num_labels - count + 1, (rows, count), device=device, generator=generator)
    distinct = drawn.sort(dim=1).values + torch.arange(count, device=device)
    labels = SparseLabels.from_padded(distinct, num_labels)
    return labels.to_dense(case.target_dtype) if case.target_dtype else labels


def as_tensor(targets: Targets) -> Tensor | OfLayer:
    """What a peer is given."""
    if isinstance(targets, OfLayer):
        dense = as_tensor(targets.targets)
        assert isinstance(dense, Tensor)
        return targets._replace(targets=dense)
    return targets.to_dense(TWIN) if isinstance(targets, SparseLabels) else targets


def leaves(inputs: Tensor, targets: Targets) -> list[Tensor]:
    """What gradients are computed of."""
    return [inputs, targets.weight] if isinstance(targets, OfLayer) else [inputs]


def forget(inputs: Tensor, targets: Targets) -> None:
    """Drop the gradients of the pass before."""
    for leaf in leaves(inputs, targets):
        leaf.grad = None


def step(case: Case, loss: MeanLoss, inputs: Tensor, targets: Targets) -> Tensor:
    """One forward pass, and the backward pass of a case that has one."""
    forget(inputs, targets)
    if not case.backward:
        with torch.no_grad():
            return loss(inputs, targets)
    value = loss(inputs, targets)
    value.backward(None if case.upstream == 1 else torch.full_like(value, case.upstream))
    return value.detach()
