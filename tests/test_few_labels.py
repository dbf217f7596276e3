"""The eager backend's ways round its blocks: few labels by themselves, and small batches without a Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import logits
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import bertloss_fast as bf
from bertloss_fast.ops.blocks import block_size
from bertloss_fast.ops.few_labels import _FEW, find_few, take_apart
from bertloss_fast.ops.small import small_cross_entropy
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


def hard(**options: Any) -> Tensor:
    return (torch.arange(12).view(3, 4) % 5 == 0).to(**{"dtype": torch.float32, **options})


def test_a_small_batch_goes_straight_to_torch_s_autograd() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    for module in (bf.BCEWithLogitsLoss(backend="eager"), bf.BCEWithLogitsLoss(backend="eager", reduction="sum")):
        loss = module(x, hard())
        assert loss.grad_fn is not None
        assert loss.grad_fn.name() in ("MeanBackward0", "SumBackward0")


@pytest.mark.parametrize(
    ("x", "y", "reduction"),
    [
        (torch.zeros(3, 4), hard(), "none"),
        (torch.zeros(3, 4), hard(dtype=torch.float64), "mean"),
        (torch.zeros(3, 4).bfloat16(), hard().bfloat16(), "mean"),
        (torch.zeros(3, 4), hard().requires_grad_(), "mean"),
        (torch.zeros(3, 4), hard() / 2, "mean"),
        (torch.zeros(4), hard(), "mean"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "mean"),
        (torch.zeros(()), torch.zeros(()), "mean"),
        (torch.zeros(100, 100), torch.zeros(100, 100), "mean"),
        (torch.zeros(3, 4).to_sparse(), hard(), "mean"),
        (torch.nested.nested_tensor([torch.zeros(2)]), torch.nested.nested_tensor([torch.zeros(2)]), "mean"),
        (torch.zeros(3, 4), bf.SparseLabels.from_dense(hard()), "mean"),
        ([0.0], hard(), "mean"),
    ],
)
def test_what_goes_the_general_way(x: Any, y: Any, reduction: str) -> None:
    assert small_cross_entropy(x, y, reduction, "eager") is None


def test_the_general_way_under_autocast_and_transforms() -> None:
    x, found = torch.zeros(3, 4), []

    def ask(x: Tensor) -> Tensor:
        found.append(small_cross_entropy(x, hard(), "mean", "eager"))
        return x.sum()

    with torch.autocast("cpu", torch.bfloat16):
        ask(x)
    torch.func.grad(ask)(x)
    assert found == [None, None]


@pytest.mark.parametrize("options", [{"label_smoothing": False}, {"label_smoothing": 2.0}, {"upstream_memory": 1}])
def test_what_is_wrong_with_a_small_batch_is_told(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        bf.binary_cross_entropy_with_logits(torch.zeros(3, 4), hard(), backend="eager", **options)


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


LATE = ("eager", "inductor")


def crowded() -> tuple[Tensor, Tensor]:
    """Of a little more than a block, with so many labels that each block is looked at when it is computed."""
    x, y = batch()
    return x, (logits(*y.shape, device=CPU, dtype=torch.float32).detach() > 0).float()


@pytest.mark.parametrize("backend", LATE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["focal", "bce"])
def test_soft_labels_that_are_seen_late(loss: str, reduction: str, backend: str) -> None:
    x, y = crowded()
    y[-1, -1] = 0.3
    assert find_few(y, later=True) == (None, None)
    function, oracle, options = {
        "focal": (bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": 0.25, "gamma": 2.0}),
        "bce": (
            bf.binary_cross_entropy_with_logits,
            torch.nn.functional.binary_cross_entropy_with_logits,
            {},
        ),
    }[loss]
    exact = x.detach().double().requires_grad_()
    ours = function(x, y, reduction=reduction, backend=backend, **options)
    theirs = oracle(exact, y.double(), reduction=reduction, **options)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-12)
    grads = torch.autograd.grad(ours.sum(), x)[0].double(), torch.autograd.grad(theirs.sum(), exact)[0]
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("backend", LATE)
@pytest.mark.parametrize("value", [1.5, -0.25])
def test_no_probability_that_is_seen_late(value: float, backend: str) -> None:
    """An error, but where it does not count, or where torch takes it."""
    x, y = crowded()
    hard = y.clone()
    y[-1, -1] = value
    with pytest.raises(ValueError, match=rf"^targets: expected values from 0 to 1, got {value:g}$"):
        bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend)
    ours = bf.binary_cross_entropy_with_logits(x, y, backend=backend)
    torch.testing.assert_close(ours, torch.nn.functional.binary_cross_entropy_with_logits(x, y))
    mask = torch.ones_like(y, dtype=torch.bool)
    mask[-1, -1] = False
    losses = [bf.sigmoid_focal_loss(x, t, reduction="mean", mask=mask, backend=backend) for t in (y, hard)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("backend", LATE)
def test_a_logit_that_is_nan_among_hard_labels(backend: str) -> None:
    x, y = crowded()
    with torch.no_grad():
        x[-1, -1] = torch.nan
    loss = bf.sigmoid_focal_loss(x, y, reduction="sum", backend=backend)
    grad = torch.autograd.grad(loss, x)[0]
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[len(x) - 1, 499]]


@pytest.mark.parametrize("logit", [100.0, 3e38, float("inf")])
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("few", [True, False])
def test_logits_whose_exponential_is_infinite(logit: float, label: float, few: bool) -> None:
    """A block with one goes the longer way; the limit's loss and slope, and the others' as without it."""
    x, y = batch() if few else crowded()
    y[3, 4] = label
    rest = torch.autograd.grad(bf.sigmoid_focal_loss(x, y, reduction="sum", backend="eager"), x)[0]
    for sign in (1, -1):
        with torch.no_grad():
            x[3, 4] = sign * logit
        loss = bf.sigmoid_focal_loss(x, y, reduction="none", backend="eager")
        total = bf.sigmoid_focal_loss(x, y, reduction="sum", backend="eager")
        grad = torch.autograd.grad(total, x)[0]
        wrong = (label == 0) == (sign == 1)
        weight = 0.25 if label else 0.75
        assert loss[3, 4].item() == (torch.tensor(weight) * logit if wrong else 0)
        assert total.isinf() == (wrong and logit == torch.inf)
        expected = torch.tensor((weight if label == 0 else -weight) if wrong else 0.0)
        torch.testing.assert_close(grad[3, 4], expected)
        others = torch.ones_like(y, dtype=torch.bool)
        others[3, 4] = False
        torch.testing.assert_close(grad[others], rest[others], rtol=1e-5, atol=1e-9)
