"""Squared error and KL divergence of nothing, of what is masked, and of values at the ends of what floats are."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DOUBLE, logits, uniform
from pointwise_cases import CASES, FLOATING, INFINITY, LOSSES, SHAPE, batch, oracle, values_and_grads
from torch.nn import functional as F

import bertloss_fast as bf


@pytest.mark.parametrize("shape", [(0, 5), (0,), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize(("loss", "reduction"), CASES)
def test_an_empty_batch_has_an_attached_loss_of_zero(
    loss: str, reduction: str, shape: tuple[int, ...], backend: str, device: torch.device
) -> None:
    function, options = LOSSES[loss]
    x = torch.empty(shape, device=device, requires_grad=True)
    value = function(x, torch.empty(shape, device=device), reduction=reduction, backend=backend, **options)
    assert value.shape == (shape if reduction == "none" else ())
    assert not value.any()
    value.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize(("loss", "reduction"), CASES)
def test_nothing_that_counts(loss: str, reduction: str, backend: str, device: torch.device) -> None:
    """All masked, with anything in it; or of weight 0, where torch's mean divides by 0."""
    function, options = LOSSES[loss]
    x, t = batch(loss, SHAPE, device)
    nan = torch.full_like(t, float("nan")).requires_grad_()
    nothing = torch.zeros(SHAPE, dtype=torch.bool, device=device)
    calls = [((x, nan), {"mask": nothing}), ((nan, t), {"mask": nothing})]
    if loss == "mse":
        calls += [((x, t), {"weight": nothing}), ((x, nan), {"mask": nothing, "weight": nan.detach()})]
    for tensors, kept in calls:
        value = function(*tensors, reduction=reduction, backend=backend, **options, **kept)
        assert not value.any()
        assert not any(grad.any() for grad in torch.autograd.grad(value.sum(), tensors))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_masked_may_hold_anything(loss: str, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    mask = uniform(*SHAPE, device=device, seed=6) < 0.6
    x, t = batch(loss, SHAPE, device)
    weight = {"weight": uniform(*SHAPE, device=device, seed=5)} if loss == "mse" else {}
    expected = values_and_grads(oracle(loss, x, t, mask=mask, **weight, **options), x, t)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = [torch.where(mask, tensor.detach(), value).requires_grad_() for tensor in (x, t)]
        weight = {name: torch.where(mask, tensor, value) for name, tensor in weight.items()}
        ours = values_and_grads(function(*bad, mask=mask, backend=backend, **weight, **options), *bad)
        torch.testing.assert_close(ours, expected, **DOUBLE)


@pytest.mark.parametrize("dtype", FLOATING)
def test_targets_of_probability_0(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """No loss and no gradient, also where the input is -inf, of a masked logit: torch has NaN."""
    x = torch.tensor([-1.0, -INFINITY, -INFINITY, -0.5], dtype=dtype, device=device, requires_grad=True)
    for log_target in (False, True):
        t = torch.tensor([0, 0, 0.5, 0.25], dtype=dtype, device=device)
        t = (t.log() if log_target else t).requires_grad_()
        found = values_and_grads(bf.kl_div(x, t, reduction="none", log_target=log_target, backend=backend), x, t)
        loss = 0.25 * (math.log(0.25) + 0.5)
        slope = loss + 0.25 if log_target else 4 * loss + 1
        for ours, last_two in zip(found, ((INFINITY, loss), (-0.5, -0.25), (INFINITY, slope)), strict=True):
            expected = torch.tensor([0, 0, *last_two], dtype=dtype, device=device)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=torch.finfo(dtype).eps)


def test_a_softmax_that_underflows_gets_a_gradient(backend: str, device: torch.device) -> None:
    """What reaches the logits of targets is that of their logarithms, which torch's kl_div wants for it."""
    z = torch.tensor([[0.0, -200.0, 1.0], [3.0, 2.0, -90.0]], device=device, requires_grad=True)
    x = logits(2, 3, device=device, dtype=torch.float32).detach().log_softmax(-1)
    ours = bf.kl_div(x, z.softmax(-1), reduction="sum", backend=backend)
    theirs = F.kl_div(x, z.log_softmax(-1), reduction="sum", log_target=True)
    (grad,), (true,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    torch.testing.assert_close((ours, grad), (theirs, true), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_subnormal_targets(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The approximate logarithm takes them for 0, and times it they would be infinite."""
    x = torch.full((3,), -2.0, dtype=dtype, device=device)
    t = torch.tensor([1e-39, 1e-45, 1e-37], device=device)
    value = bf.kl_div(x, t, reduction="none", backend=backend)
    torch.testing.assert_close(value, F.kl_div(x.float(), t, reduction="none"), rtol=1e-5, atol=1e-36)


def test_nan_and_values_beyond_what_a_probability_is(backend: str, device: torch.device) -> None:
    """As torch has them: NaN of NaN, and of the logarithm of a negative number."""
    x = torch.tensor([-1.0, -1.0, float("nan"), 2.0], device=device)
    t = torch.tensor([float("nan"), -0.5, 0.5, 3.0], device=device)
    for dtype in (torch.float32, torch.float16):
        ours = bf.kl_div(x.to(dtype), t.to(dtype), reduction="none", backend=backend)
        theirs = F.kl_div(x.to(dtype), t.to(dtype), reduction="none")
        torch.testing.assert_close(ours, theirs, equal_nan=True)
