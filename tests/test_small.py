"""The eager backend's ways round its blocks for small batches, whose operations torch's own autograd differentiates."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

import bertloss_fast as bf
from bertloss_fast.ops.small import (
    small_binary_cross_entropy,
    small_cross_entropy,
    small_focal_loss,
    small_softmax_focal_loss,
)


def hard(**options: Any) -> Tensor:
    return (torch.arange(12).view(3, 4) % 5 == 0).to(**{"dtype": torch.float32, **options})


SMALL: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "bce": (bf.BCEWithLogitsLoss, torch.nn.functional.binary_cross_entropy_with_logits),
    "gamma 1": (partial(bf.SigmoidFocalLoss, alpha=None, gamma=1), partial(oracles.sigmoid_focal, alpha=None, gamma=1)),
    "gamma 2": (partial(bf.SigmoidFocalLoss, alpha=0.25), partial(oracles.sigmoid_focal, alpha=0.25, gamma=2.0)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", SMALL)
def test_a_small_batch_goes_straight_to_torch_s_autograd(loss: str, reduction: str) -> None:
    made, oracle = SMALL[loss]
    x = torch.linspace(-20, 20, 12).view(3, 4).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = made(backend="eager", reduction=reduction)(x, hard())
    true = oracle(exact, hard().double(), reduction=reduction)
    assert found.grad_fn is not None
    assert found.grad_fn.name() == "MulBackward0"
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(found / 3, x), torch.autograd.grad(true / 3, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_small_batch_of_infinite_logits(alpha: float | None, reduction: str) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.inf, -torch.inf, 1.5, -0.5]], requires_grad=True)
    y = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]])
    loss = bf.sigmoid_focal_loss(x, y, alpha, 2.0, reduction, backend="eager")
    assert loss == torch.inf
    exact = torch.where(x.isinf(), x.sign() * 700, x).detach().double().requires_grad_()
    true = bf.sigmoid_focal_loss(exact, y.double(), alpha, 2.0, reduction, backend="eager")
    (ours,), (theirs,) = torch.autograd.grad(loss, x), torch.autograd.grad(true, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.1}, {"alpha": torch.full((4,), 0.5)}, {"gamma": 1.5}, {"weight": torch.ones(4)}]
)
def test_options_of_the_general_way(options: dict[str, Any]) -> None:
    loss = bf.sigmoid_focal_loss(
        torch.randn(3, 4, requires_grad=True), hard(), reduction="mean", backend="eager", **options
    )
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == "_LossBackward"


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
    assert small_binary_cross_entropy(x, y, reduction, "eager") is None
    assert small_focal_loss(x, y, 0.25, 2.0, reduction, "eager") is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_classes_of_a_small_batch_go_straight_to_torch_s_kernel(reduction: str) -> None:
    x, classes = torch.linspace(-9, 9, 12).view(3, 4).requires_grad_(), torch.tensor([3, 0, 2])
    exact = x.detach().double().requires_grad_()
    found = bf.CrossEntropyLoss(reduction=reduction, backend="eager")(x, classes)
    true = torch.nn.functional.cross_entropy(exact, classes, reduction=reduction)
    assert found.grad_fn is not None
    assert found.grad_fn.name() == "NllLossBackward0"
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y, v)[0].double() for y, v in ((found, x), (true, exact))))


@pytest.mark.parametrize(
    ("x", "classes"),
    [
        (torch.zeros(3, 4), torch.tensor([0, -100, 2])),
        (torch.zeros(3, 4), torch.tensor([0, 4, 2])),
        (torch.zeros(3, 4), torch.tensor([0, 1])),
        (torch.zeros(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)),
        (torch.zeros(3, 4), torch.zeros(3, 4)),
        (torch.zeros(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])),
        (torch.zeros(3, 4, 2), torch.zeros(3, 2, dtype=torch.int64)),
        (torch.zeros(4), torch.tensor(0)),
        (torch.zeros(100, 100), torch.zeros(100, dtype=torch.int64)),
        (torch.zeros(3, 4), [0, 1, 2]),
    ],
)
def test_classes_that_go_the_general_way(x: Tensor, classes: Any) -> None:
    assert small_cross_entropy(x, classes, "mean", "eager") is None
    assert small_softmax_focal_loss(x, classes, 2.0, "mean", "eager") is None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_small_focal_loss_of_classes(gamma: float, reduction: str) -> None:
    x, classes = torch.linspace(-9, 9, 12).view(3, 4).requires_grad_(), torch.tensor([3, 0, 2])
    exact = x.detach().double().requires_grad_()
    found = bf.SoftmaxFocalLoss(gamma, reduction=reduction, backend="eager")(x, classes)
    ce = torch.nn.functional.cross_entropy(exact, classes, reduction="none")
    true = getattr((1 - torch.exp(-ce)) ** gamma * ce, reduction)()
    torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, v)[0].double() for y, v in ((found, x), (true, exact))), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize(("gamma", "logit"), [(2.0, -25.0), (1.0, -40.0), (0.5, -55.0), (3.7, -17.0), (2.0, 80.0)])
def test_the_tails_of_a_small_focal_loss_of_classes(gamma: float, logit: float) -> None:
    """Two equal logits beside that of the class, 0."""
    x = torch.tensor([[0.0, logit, logit]], requires_grad=True)
    found = bf.softmax_focal_loss(x, torch.tensor([0]), gamma, backend="eager")
    (grad,) = torch.autograd.grad(found, x)

    def loss(logit: mpmath.mpf) -> mpmath.mpf:
        others = 2 * mpmath.exp(logit)
        return (others / (1 + others)) ** gamma * mpmath.log1p(others)

    with mpmath.workdps(60):
        true, slope = float(loss(mpmath.mpf(logit))), float(mpmath.diff(loss, mpmath.mpf(logit)))
    assert found.item() == pytest.approx(true, rel=1e-6)
    assert grad[0].tolist() == pytest.approx([-slope, slope / 2, slope / 2], rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("logits", "classes", "loss", "slopes"),
    [
        ([0.0, -torch.inf, 0.0], 0, 0.25 * math.log(2), None),
        ([0.0, -torch.inf, -torch.inf], 0, 0.0, [0.0, 0.0, 0.0]),
        ([torch.inf, 0.0, 0.0], 0, 0.0, [0.0, 0.0, 0.0]),
        ([0.0, 3e38, 0.0], 0, 3e38, [-1.0, 1.0, 0.0]),
        ([7.0], 0, 0.0, [0.0]),
    ],
    ids=["a class without a logit", "but one", "a sure one", "a huge one", "one class"],
)
def test_the_ends_of_a_small_focal_loss_of_classes(
    logits: list[float], classes: int, loss: float, slopes: list[float] | None
) -> None:
    x = torch.tensor([logits], requires_grad=True)
    found = bf.softmax_focal_loss(x, torch.tensor([classes]), backend="eager")
    (grad,) = torch.autograd.grad(found, x)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    if slopes is None:
        assert grad.isfinite().all()
        assert grad[0, 1] == 0
    else:
        torch.testing.assert_close(grad, torch.tensor([slopes]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [small_binary_cross_entropy, partial(small_focal_loss, alpha=0.25, gamma=2.0)])
def test_transforms_and_autocast(loss: Callable[..., Tensor | None]) -> None:
    found, x = [], torch.randn(3, 4)

    def ask(x: Tensor) -> Tensor:
        found.append(loss(x, hard(), reduction="mean", backend="eager"))
        return x.sum()

    torch.func.grad(ask)(x)
    assert found == [None]
    with torch.autocast("cpu", torch.bfloat16):
        ask(x)
    torch.testing.assert_close(found[1], loss(x, hard(), reduction="mean", backend="eager"), rtol=0, atol=0)


def test_sizes_share_a_graph() -> None:
    """The limit of small batches is no guard of a compiler."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(
        partial(bf.sigmoid_focal_loss, reduction="mean", backend="eager"), backend=count, dynamic=True
    )
    for rows in (32, 200):
        compiled(torch.randn(rows, 100), torch.zeros(rows, 100))
    assert graphs == 1


@pytest.mark.parametrize("numel", [3, 9000])
def test_an_infinite_label_is_no_probability(numel: int) -> None:
    with pytest.raises(ValueError, match=r"^targets: expected values from 0 to 1, got inf"):
        bf.sigmoid_focal_loss(torch.ones(1, numel), torch.full((1, numel), torch.inf), reduction="sum", backend="eager")


@pytest.mark.parametrize("options", [{"label_smoothing": False}, {"label_smoothing": 2.0}, {"upstream_memory": 1}])
@pytest.mark.parametrize("function", [bf.binary_cross_entropy_with_logits, bf.sigmoid_focal_loss])
def test_what_is_wrong_with_a_small_batch_is_told(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        function(torch.zeros(3, 4), hard(), reduction="mean", backend="eager", **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gamma": True}, TypeError),
        ({"gamma": -1.0}, ValueError),
        ({"alpha": True}, TypeError),
        ({"beta": None}, TypeError),
    ],
)
def test_what_is_wrong_with_a_small_focal_loss_too(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=f"^{name}: expected"):
        bf.sigmoid_focal_loss(torch.zeros(3, 4), hard(), reduction="mean", backend="eager", **options)


@pytest.mark.parametrize("name", ["reduction", "backend"])
@pytest.mark.parametrize("function", [bf.binary_cross_entropy_with_logits, bf.sigmoid_focal_loss])
def test_an_option_of_a_small_batch_is_a_string(function: Callable[..., Tensor], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        function(torch.zeros(3, 4), hard(), **{"reduction": "mean", name: np.array(["mean", "eager"])})


@pytest.mark.parametrize("numel", [2, 9000])
def test_an_infinite_label_of_a_cross_entropy_counts_as_in_torch(numel: int) -> None:
    x, y = torch.full((numel,), 2.0), hard().flatten()[:1].expand(numel).clone()
    y[0] = torch.inf
    found = bf.binary_cross_entropy_with_logits(x, y, backend="eager")
    assert found == torch.nn.functional.binary_cross_entropy_with_logits(x, y) == -torch.inf


@pytest.mark.parametrize("upstream", [1.0, 2.0**24])
@pytest.mark.parametrize("logit", [9e29, 1e34, 3e38])
def test_a_huge_logit_has_its_gradient(logit: float, upstream: float) -> None:
    x = torch.tensor([logit], requires_grad=True)
    loss = bf.sigmoid_focal_loss(x, torch.zeros(1), None, 2.0, "sum", backend="eager")
    (found,) = torch.autograd.grad(loss, x, torch.tensor(upstream))
    assert found == upstream


def test_a_first_import_among_fake_tensors() -> None:
    """As by an export that traces a module's forward."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    import bertloss_fast as bf
x, y = torch.zeros(3, 4), torch.zeros(3, 4)
print(bf.binary_cross_entropy_with_logits(x, y).item(), bf.sigmoid_focal_loss(x, y, reduction="mean").item())
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [float(loss) for loss in done.stdout.split()] == pytest.approx([math.log(2), 0.75 * 0.25 * math.log(2)])
