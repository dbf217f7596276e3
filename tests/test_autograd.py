"""Gradients: gradcheck on the kernels, upstream gradients, reuse, and derivatives of higher order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import (
    DOUBLE,
    GAMMAS,
    LABELS,
    LOSSES,
    OF_THE_BATCH,
    OPTIONS,
    REDUCTIONS,
    TARGETS,
    TOLERANCE,
    logits,
    to,
    uniform,
    value_and_grad,
)
from torch import Tensor

import bertloss_fast as bf
from bertloss_fast.ops import sigmoid
from bertloss_fast.ops.families import Saved

ALPHAS = {"none": None, "number": 0.3, "by-label": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)}
GRADCHECK_WEIGHTS = {
    "unweighted": {},
    "weighted": {
        "weight": torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(4, 3),
        "pos_weight": torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64),
    },
}


@pytest.mark.parametrize("weights", GRADCHECK_WEIGHTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck_of_the_kernel(gamma: float, alpha: str, reduction: str, weights: str, device: torch.device) -> None:
    y = uniform(4, 3, device=device) < 0.4
    options = to({"alpha": ALPHAS[alpha], **GRADCHECK_WEIGHTS[weights]}, device)
    assert torch.autograd.gradcheck(
        lambda x: bf.sigmoid_focal_loss(x, y, gamma=gamma, reduction=reduction, backend="triton", **options),
        logits(4, 3, device=device),
        fast_mode=True,
    )


# Of the others, the gradient is not the derivative of the value: weights or a factor are constants to it.
CHECKED = [name for name in LOSSES if name not in ("ghm", "asl-detached")]


@pytest.mark.parametrize("target", ["bool", "float-soft", "sparse"])
@pytest.mark.parametrize("loss", [name for name in CHECKED if not name.startswith("focal")])
def test_gradcheck_of_the_other_kernels(loss: str, target: str, device: torch.device) -> None:
    function, _, fixed = LOSSES[loss]
    y = TARGETS[target](uniform(5, LABELS, device=device))
    for options in (OPTIONS["none"], OPTIONS["all"]):
        assert torch.autograd.gradcheck(
            lambda x, options=options: function(x, y, reduction="sum", backend="triton", **to(fixed | options, device)),
            logits(5, LABELS, device=device),
            fast_mode=True,
        )


@pytest.mark.parametrize("loss", [name for name in CHECKED if name not in OF_THE_BATCH])
def test_gradients_of_higher_order_and_of_soft_targets(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = LOSSES[loss]
    x = logits(3, LABELS, device=device)
    y = uniform(3, LABELS, device=device).requires_grad_()

    def both(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y, reduction="mean", backend=backend, **to(options, device))

    assert torch.autograd.gradcheck(both, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (x, y), fast_mode=True)


@pytest.mark.parametrize("loss", ["bce", "focal-2.0"])
def test_gradient_of_a_soft_target_that_happens_to_be_hard(loss: str, backend: str, device: torch.device) -> None:
    function, oracle, options = LOSSES[loss]
    x = logits(3, LABELS, device=device)
    y = (uniform(3, LABELS, device=device) < 0.5).double().requires_grad_()
    ours = torch.autograd.grad(function(x, y, reduction="mean", backend=backend, **options), (x, y))
    theirs = torch.autograd.grad(oracle(x, y, reduction="mean", **options), (x, y))
    torch.testing.assert_close(ours, theirs, **DOUBLE)


@pytest.mark.parametrize("loss", ["bce", "focal-2.0"])
def test_create_graph_stops_at_the_loss(loss: str, backend: str, device: torch.device) -> None:
    """What led to the logits is the outer graph's: its hooks fire once, and targets made of them are counted once."""
    function, oracle, options = LOSSES[loss]
    grads = []
    for call in (functools.partial(function, backend=backend, **options), functools.partial(oracle, **options)):
        x = logits(3, LABELS, device=device)
        z = 2 * x
        z.register_hook(lambda grad: 3 * grad)
        loss = call(z, torch.sigmoid(0.5 * z), reduction="sum")
        grads.append(torch.autograd.grad(loss, x, create_graph=True)[0])
    torch.testing.assert_close(*grads, **DOUBLE)


def test_batched_gradients(backend: str, device: torch.device) -> None:
    x, y = logits(3, LABELS, device=device), uniform(3, LABELS, device=device) < 0.3
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    ours, theirs = (
        torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
        for loss in (
            bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend),
            oracles.sigmoid_focal(x, y, reduction="mean"),
        )
    )
    torch.testing.assert_close(ours, theirs, **DOUBLE)


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0, -3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_upstream_gradients(upstream: float, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = logits(9, 40, device=device, dtype=dtype)
    y = uniform(9, 40, device=device) < 0.3
    exact = x.detach().double().requires_grad_()
    loss = bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend)
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(upstream, dtype=loss.dtype, device=device))
    (true_grad,) = torch.autograd.grad(oracles.sigmoid_focal(exact, y, reduction="mean"), exact)
    expected = (true_grad * upstream).to(dtype)
    torch.testing.assert_close(grad, expected, **TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize(
    "expand",
    [lambda up, x: up.expand(x.shape), lambda up, x: torch.arange(9.0, device=x.device)[:, None].expand(x.shape)],
)
def test_expanded_upstream_of_an_unreduced_loss(
    expand: Callable[..., Tensor], backend: str, device: torch.device
) -> None:
    x = logits(9, 40, device=device)
    y = uniform(9, 40, device=device) < 0.3
    upstream = expand(torch.tensor(0.3, device=device), x).double()
    ours = value_and_grad(bf.sigmoid_focal_loss(x, y, backend=backend), x, upstream)
    torch.testing.assert_close(ours, value_and_grad(oracles.sigmoid_focal(x, y), x, upstream), **DOUBLE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_backwards_and_no_side_effects(reduction: str, backend: str, device: torch.device) -> None:
    x, y = logits(9, 40, device=device), uniform(9, 40, device=device) < 0.3
    before = x.detach().clone(), y.clone()
    (expected,) = torch.autograd.grad(oracles.sigmoid_focal(x, y, reduction=reduction).sum(), x)
    loss = bf.sigmoid_focal_loss(x, y, reduction=reduction, backend=backend)
    (first,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    torch.testing.assert_close(first, expected, **DOUBLE)
    first.mul_(10)  # who was handed a gradient may write to it
    (loss.sum() * 2).backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * expected, **DOUBLE)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, 3 * expected, **DOUBLE)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repetition_is_bitwise_the_same(reduction: str, backend: str, device: torch.device) -> None:
    x, y = logits(33, 101, device=device, dtype=torch.float32), uniform(33, 101, device=device) < 0.3
    runs = [value_and_grad(bf.sigmoid_focal_loss(x, y, reduction=reduction, backend=backend), x) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (0,), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_batch_has_an_attached_loss_of_zero(
    shape: tuple[int, ...], reduction: str, backend: str, device: torch.device
) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    loss = bf.binary_cross_entropy_with_logits(
        x, torch.empty(shape, device=device), reduction=reduction, backend=backend
    )
    assert loss.shape == (shape if reduction == "none" else ())
    assert not loss.any()
    loss.sum().backward()
    assert x.grad.shape == shape


def test_without_a_gradient_to_come_none_is_computed(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = logits(4, 5, device=device), torch.zeros(4, 5, device=device)
    gradients = []
    run = sigmoid.FAMILY.forward

    def spy(*arguments: Any) -> tuple[Tensor, Saved]:
        loss, saved = run(*arguments)
        gradients.append(saved.grads.inputs)
        return loss, saved

    monkeypatch.setattr(sigmoid, "FAMILY", sigmoid.FAMILY._replace(forward=spy))
    with torch.no_grad():
        loss = bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend)
    assert gradients == [None]
    torch.testing.assert_close(loss, oracles.sigmoid_focal(x, y, reduction="mean").detach(), **DOUBLE)
