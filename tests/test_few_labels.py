"""The eager backend's way round its blocks where labels are few: they go by themselves."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from cases import logits
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import bertloss_fast as bf
from bertloss_fast.ops.blocks import block_size
from bertloss_fast.ops.few_labels import _FEW, find_few, take_apart
from bertloss_fast.reference.sigmoid import Operands

CPU = torch.device("cpu")


def batch(more: int = 0) -> tuple[Tensor, Tensor]:
    """Of a little more than a block, with as many labels as are few, or some more."""
    rows = block_size(torch.empty(0)) // 500 + 1
    x = logits(rows, 500, device=CPU, dtype=torch.float32)
    y = torch.zeros(rows, 500)
    y.view(-1)[torch.randperm(y.numel(), generator=torch.Generator().manual_seed(0))[: y.numel() // _FEW + more]] = 1
    return x, y


@pytest.mark.parametrize("few", [True, False])
def test_few_and_one_too_many(few: bool) -> None:
    """Dense and sparse alike, and both as float64 has it."""
    x, y = batch(more=0 if few else 1)
    labels = bf.SparseLabels.from_dense(y)
    dense = Operands(x, y, places=find_few(y).places)
    sparse = Operands(x, crow=labels.crow_indices, col=labels.col_indices)
    assert [take_apart(operands) is not None for operands in (dense, sparse)] == [few, few]
    found = []
    for targets in (y, labels):
        loss = bf.sigmoid_focal_loss(x, targets, reduction="mean", backend="eager")
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(map(torch.equal, *found))
    exact = x.detach().double().requires_grad_()
    true = oracles.sigmoid_focal(exact, y.double(), alpha=0.25, gamma=2.0, reduction="mean")
    torch.testing.assert_close(found[0][0].double(), true.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1].double(), torch.autograd.grad(true, exact)[0], rtol=3e-6, atol=1e-12)


def test_a_label_that_comes_twice_counts_once() -> None:
    x, y = batch()
    labels = bf.SparseLabels.from_dense(y)
    counts = labels.crow_indices.diff()
    twice = bf.SparseLabels(
        torch.nn.functional.pad((2 * counts).cumsum(0), (1, 0)), labels.col_indices.repeat_interleave(2), labels.shape
    )
    some = twice[:200]  # twice as many are no longer few
    losses = [bf.sigmoid_focal_loss(x[:200], some, reduction="sum", backend="eager")]
    losses.append(bf.sigmoid_focal_loss(x[:200], labels[:200], reduction="sum", backend="eager"))
    assert take_apart(Operands(x, crow=some.crow_indices, col=some.col_indices)) is not None
    assert torch.equal(*losses)


@pytest.mark.parametrize("values", [(0.3,), (1.0, 0.5), (-0.0, 1.0)])
def test_few_soft_labels(values: tuple[float, ...]) -> None:
    x, y = batch()
    y[y == 1] = torch.tensor(values).repeat(int(y.sum()) // len(values) + 1)[: int(y.sum())]
    assert find_few(y).places is not None
    assert find_few(y).soft == bool({0.3, 0.5} & set(values))
    exact = x.detach().double().requires_grad_()
    loss = bf.binary_cross_entropy_with_logits(x, y, backend="eager")
    true = torch.nn.functional.binary_cross_entropy_with_logits(exact, y.double())
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=0)
    ours, theirs = torch.autograd.grad(loss, x)[0], torch.autograd.grad(true, exact)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-12)


def test_tensors_that_numpy_cannot_read() -> None:
    x, y = batch()
    loss = bf.sigmoid_focal_loss(TwoTensor(x, x), TwoTensor(y, y), reduction="mean", backend="eager")
    torch.testing.assert_close(loss.a, bf.sigmoid_focal_loss(x, y, reduction="mean", backend="eager"))


def test_tensors_are_made_where_the_batch_is() -> None:
    x, y = batch()
    expected = bf.sigmoid_focal_loss(x, y, reduction="mean", backend="eager")
    with torch.device("meta"):
        found = [
            bf.sigmoid_focal_loss(x, targets, reduction="mean", backend="eager")
            for targets in (y, bf.SparseLabels.from_dense(y))
        ]
    assert all(torch.equal(loss, expected) for loss in found)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: x[:, 1:]])
def test_any_strides(make: Callable[[Tensor], Tensor]) -> None:
    x, y = batch()
    x, y = make(x.detach()).requires_grad_(), make(y)
    found = bf.sigmoid_focal_loss(x, y, reduction="sum", backend="eager")
    exact = x.detach().double().requires_grad_()
    true = oracles.sigmoid_focal(exact, y.double(), alpha=0.25, gamma=2.0, reduction="sum")
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, leaf)[0].double() for loss, leaf in ((found, x), (true, exact))]
    torch.testing.assert_close(*grads, rtol=3e-6, atol=1e-9)
