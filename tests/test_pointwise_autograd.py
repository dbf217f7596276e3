"""Squared error and KL divergence under autograd: every derivative, upstream and transform, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DOUBLE, uniform
from pointwise_cases import (
    CASES,
    INFINITY,
    LOSSES,
    MODULES,
    OPTIONS,
    SHAPE,
    assert_rounded,
    batch,
    options_of,
    oracle,
    values_and_grads,
)
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf
from bertloss_fast.ops import pointwise
from bertloss_fast.ops.families import Saved


@pytest.mark.parametrize("option", ["none", "mask"])
@pytest.mark.parametrize(("loss", "reduction"), CASES)
def test_gradcheck(loss: str, reduction: str, option: str, backend: str, device: torch.device) -> None:
    function, fixed = LOSSES[loss]
    options = options_of(OPTIONS[option], device)

    def both(x: Tensor, t: Tensor) -> Tensor:
        return function(x, t, reduction=reduction, backend=backend, **fixed, **options)

    x, t = batch(loss, SHAPE, device)
    t = (t.detach() + (0.1 if loss == "kl" else 0)).requires_grad_()  # away from 0, where the logarithm bends
    assert torch.autograd.gradcheck(both, (x, t), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (x, t), fast_mode=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_learned_weight(reduction: str, backend: str, device: torch.device) -> None:
    x, t = batch("mse", SHAPE, device)
    weight = uniform(*SHAPE, device=device, seed=5).requires_grad_()

    def grads(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, t, weight))

    ours = grads(bf.mse_loss(x, t, reduction=reduction, weight=weight, backend=backend))
    torch.testing.assert_close(ours, grads(F.mse_loss(x, t, reduction=reduction, weight=weight)), **DOUBLE)


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0, -3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_gradients(loss: str, dtype: torch.dtype, upstream: float, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    x, t = batch(loss, (9, 40), device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, t)]
    value = function(x, t, reduction="mean", backend=backend, **options)
    ours = torch.autograd.grad(value, (x, t), torch.tensor(upstream, dtype=value.dtype, device=device))
    theirs = torch.autograd.grad(oracle(loss, *exact, "mean", **options), exact)
    if upstream == INFINITY and backend == "eager":
        # In torch too, terms of the targets' derivative that are infinite have no sum.
        assert not ours[1].isfinite().any()
        ours, theirs = ours[:1], theirs[:1]
    assert_rounded(ours, tuple(grad * upstream for grad in theirs), equal_nan=True)


@pytest.mark.parametrize("expand", ["one value", "a column"])
def test_expanded_upstream_of_an_unreduced_loss(expand: str, backend: str, device: torch.device) -> None:
    x, t = batch("kl", (9, 40), device)
    upstream = {"one value": torch.tensor(0.3), "a column": torch.arange(9.0)[:, None]}[expand]
    upstream = upstream.double().to(device).expand(9, 40)
    ours = values_and_grads(bf.kl_div(x, t, reduction="none", backend=backend), x, t, upstream)
    torch.testing.assert_close(ours, values_and_grads(oracle("kl", x, t, "none"), x, t, upstream), **DOUBLE)


def test_batched_gradients(backend: str, device: torch.device) -> None:
    x, t = batch("kl", SHAPE, device)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
    losses = bf.kl_div(x, t, reduction="sum", backend=backend), oracle("kl", x, t, "sum")
    ours, theirs = (torch.autograd.grad(loss, (x, t), upstream, is_grads_batched=True) for loss in losses)
    torch.testing.assert_close(ours, theirs, **DOUBLE)


@pytest.mark.parametrize(("loss", "reduction"), CASES)
def test_two_backwards_and_no_side_effects(loss: str, reduction: str, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    x, t = batch(loss, (9, 40), device)
    before = x.detach().clone(), t.detach().clone()
    _, *expected = values_and_grads(oracle(loss, x, t, reduction, **options).sum(), x, t)
    value = function(x, t, reduction=reduction, backend=backend, **options)
    first = torch.autograd.grad(value.sum(), (x, t), retain_graph=True)
    torch.testing.assert_close(list(first), expected, **DOUBLE)
    for grad in first:
        grad.mul_(10)  # who was handed a gradient may write to it
    (value.sum() * 2).backward(retain_graph=True)
    value.sum().backward()
    torch.testing.assert_close([x.grad, t.grad], [3 * grad for grad in expected], **DOUBLE)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


@pytest.mark.parametrize(("loss", "reduction"), CASES)
def test_repetition_is_bitwise_the_same(loss: str, reduction: str, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    x, t = batch(loss, (33, 101), device, torch.float32)
    runs = [values_and_grads(function(x, t, reduction=reduction, backend=backend, **options), x, t) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("loss", MODULES)
def test_a_module_expects_the_upstream_that_came_last(
    loss: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward leaves both gradients alone where it was right: what a test writes into them comes back."""
    module = MODULES[loss][0](reduction="mean", backend="triton")
    forward = pointwise.FAMILY.forward

    def spy(*arguments: Any) -> tuple[Tensor, Saved]:
        value, saved = forward(*arguments)
        for grad in saved.grads[:2]:
            grad.fill_(7)
        return value, saved

    monkeypatch.setattr(pointwise, "FAMILY", pointwise.FAMILY._replace(forward=spy))
    found = []
    for step, factor in enumerate((1.0, 0.25, 0.25, 1.0, 1.0)):
        x, t = batch(loss, SHAPE, device, seed=step)
        grads = torch.autograd.grad(factor * module(x, t), (x, t))
        written = [bool((grad == 7).all()) for grad in grads]
        assert written[0] == written[1]
        found.append(written[0])
        if not written[0]:
            theirs = torch.autograd.grad(factor * oracle(loss, x, t), (x, t))
            torch.testing.assert_close(grads, theirs, **DOUBLE)
    assert found == [True, False, True, False, True]


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_gradients_that_are_wanted(loss: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    function, options = LOSSES[loss]
    saves: list[list[bool]] = []
    forward = pointwise.FAMILY.forward

    def spy(*arguments: Any) -> tuple[Tensor, Saved]:
        value, saved = forward(*arguments)
        saves.append([grad is not None for grad in saved.grads[:2]])
        return value, saved

    monkeypatch.setattr(pointwise, "FAMILY", pointwise.FAMILY._replace(forward=spy))
    x, t = batch(loss, SHAPE, device)
    true = torch.autograd.grad(oracle(loss, x, t, **options), (x, t))
    for inputs, targets, grad in ((x, t.detach(), true[0]), (x.detach(), t, true[1])):
        value = function(inputs, targets, backend="triton", **options)
        (found,) = torch.autograd.grad(2 * value, inputs if inputs.requires_grad else targets)
        torch.testing.assert_close(found, 2 * grad, **DOUBLE)
    value = function(x, t, backend="triton", **options)
    for tensor, grad in ((t, true[1]), (x, true[0])):  # one after the other
        torch.testing.assert_close(torch.autograd.grad(value, tensor, retain_graph=True)[0], grad, **DOUBLE)
    with torch.no_grad():
        function(x, t, backend="triton", **options)
    assert saves == [[True, False], [False, True], [True, True], [False, False]]


@pytest.mark.parametrize("option", ["none", "mask"])
@pytest.mark.parametrize(("loss", "reduction"), [("mse", "mean"), ("kl", "batchmean"), ("kl of logs", "none")])
def test_compiled(loss: str, reduction: str, option: str, backend: str, device: torch.device) -> None:
    """The kernels stay whole, as operators, and have the gradients of inputs and targets."""
    function, fixed = LOSSES[loss]
    options = {**fixed, **options_of(OPTIONS[option], device), "reduction": reduction}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, t: function(x, t, backend=backend, **options), fullgraph=True, backend="aot_eager"
    )
    x, t = batch(loss, SHAPE, device)
    theirs = values_and_grads(oracle(loss, x, t, **options), x, t)
    torch.testing.assert_close(values_and_grads(compiled(x, t), x, t), theirs, **DOUBLE)


@pytest.mark.parametrize("loss", LOSSES)
def test_transforms(loss: str, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    x, t = (tensor.detach() for tensor in batch(loss, SHAPE, device))

    def ours(x: Tensor, t: Tensor) -> Tensor:
        return function(x, t, reduction="sum", backend=backend, **options)

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        return (F.mse_loss if loss == "mse" else F.kl_div)(x, t, reduction="sum", **options)

    for transform in (
        lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1)))(x, t),
        lambda f: torch.func.jvp(f, (x, t), (x.cos(), t.sin())),
        lambda f: torch.func.hessian(f)(x[0], t[0]),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), **DOUBLE)
