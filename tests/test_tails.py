"""Far from 0, against mpmath: no clamp, no eps, no dead zone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import oracles
import pytest
import torch

import bertloss_fast as bf
from bertloss_fast.reference import sigmoid as reference

GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 3.7, 4.0)
# Every third of an integer, and both sides of where a formula changes over: the series at q = 2^-5, softplus at 40.
LOGITS = sorted({*(n / 3 for n in range(-240, 241)), -3.46, -3.44, -3.43, -3.42, 3.43, -40.01, 40.01, -1e-3, 1e-3})


@functools.cache
def exact(gamma: float, label: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, losses and derivatives; the logits are what the dtype can hold."""
    x = torch.tensor(LOGITS, dtype=torch.float64).to(dtype).unique()
    pairs = [oracles.exact_focal(value, label, gamma) for value in x.tolist()]
    loss, grad = (torch.tensor([float(pair[i]) for pair in pairs], dtype=torch.float64) for i in range(2))
    return x, loss, grad


def relative_error(ours: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Where the true value is a normal number of our dtype; elsewhere nothing is promised."""
    normal = (true.abs() >= torch.finfo(ours.dtype).tiny) & (true.abs() <= torch.finfo(ours.dtype).max)
    return torch.where(normal, (ours.cpu().double() - true).abs() / true.abs(), 0.0)


def bound(gamma: float, x: torch.Tensor) -> torch.Tensor:
    if gamma != int(gamma):
        return torch.full_like(x, 2e-5)
    return torch.where(x.abs() <= 20, 2e-6, 1e-5)


def loss_and_grad(
    x: torch.Tensor, positive: bool, gamma: float, backend: str, target_dtype: torch.dtype, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = torch.full(x.shape, positive, dtype=target_dtype, device=x.device)
    if gamma == 0:
        loss = bf.binary_cross_entropy_with_logits(x, y, reduction=reduction, backend=backend)
    else:
        loss = bf.sigmoid_focal_loss(x, y, None, gamma, reduction, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_fp32(gamma: float, positive: bool, target_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, true_loss, true_grad = exact(gamma, positive, torch.float32)
    loss, grad = loss_and_grad(x.to(device), positive, gamma, backend, target_dtype, "none")
    limit = bound(gamma, x.double())
    for name, ours, true in (("loss", loss, true_loss), ("gradient", grad, true_grad)):
        excess = relative_error(ours, true) / limit
        worst = int(excess.argmax())
        assert excess[worst] <= 1, f"{name} at {x[worst]}: {ours[worst]} instead of {true[worst]}"


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_fp32_differentiated_by_torch(gamma: float, positive: bool, device: torch.device) -> None:
    x, _, true_grad = exact(gamma, positive, torch.float32)
    leaf = x.clone().to(device).requires_grad_()
    loss = bf.sigmoid_focal_loss(leaf, torch.full_like(leaf, positive).detach(), None, gamma, backend="eager")
    (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    limit = 4e-6 if gamma in (3, 4) else 0.0
    assert (relative_error(grad.detach(), true_grad) / bound(gamma, x.double()).clamp_min(limit)).max() <= 1


ASL = {"timm's": (4.0, 1.0, 0.05), "unclipped": (2.0, 0.0, 0.0), "fractions": (0.5, 2.5, 0.1)}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("params", ASL)
def test_asymmetric_in_fp32(params: str, positive: bool, backend: str, device: torch.device) -> None:
    gamma_neg, gamma_pos, clip = ASL[params]
    x = torch.tensor([v for v in LOGITS if positive or not clip or v > -2], dtype=torch.float32)
    clip_of_fp32 = float(torch.tensor(clip))
    pairs = [oracles.exact_asymmetric(v, positive, gamma_neg, gamma_pos, clip_of_fp32) for v in x.tolist()]
    true_loss, true_grad = (torch.tensor([float(pair[i]) for pair in pairs], dtype=torch.float64) for i in range(2))
    leaf = x.to(device).requires_grad_()
    loss = bf.asymmetric_loss(
        leaf, torch.full_like(leaf, positive).bool(), gamma_neg, gamma_pos, clip, "none", backend=backend
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    # From x = -2 on, p - clip cancels no more than one digit.
    assert relative_error(loss.detach(), true_loss).max() <= 2e-5
    assert relative_error(grad, true_grad).max() <= 2e-5


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", ASL)
def test_asymmetric_in_16_bits(
    params: str, dtype: torch.dtype, positive: bool, backend: str, device: torch.device
) -> None:
    """Also where a negative is sure to be wrong: what is left of its probability is the slope."""
    gamma_neg, gamma_pos, clip = ASL[params]
    x = torch.tensor([v for v in LOGITS if positive or not clip or v > -1], dtype=dtype).unique()
    clip_of_fp32 = float(torch.tensor(clip))
    pairs = [oracles.exact_asymmetric(v, positive, gamma_neg, gamma_pos, clip_of_fp32) for v in x.tolist()]
    true_grad = torch.tensor([float(grad) for _, grad in pairs], dtype=torch.float64)
    leaf = x.to(device).requires_grad_()
    targets = torch.full(x.shape, positive, device=device)
    loss = bf.asymmetric_loss(leaf, targets, gamma_neg, gamma_pos, clip, "sum", backend=backend)
    limit = {torch.bfloat16: 2**-8 + 1e-4, torch.float16: 2**-11 + 2e-4}[dtype]
    assert relative_error(torch.autograd.grad(loss, leaf)[0], true_grad).max() <= limit


def test_asymmetric_at_a_missed_positive(backend: str, device: torch.device) -> None:
    """Where a clamped logarithm has no gradient left."""
    x = torch.tensor([-25.0], device=device, requires_grad=True)
    y = torch.ones(1, dtype=torch.bool, device=device)
    (grad,) = torch.autograd.grad(bf.asymmetric_loss(x, y, reduction="sum", backend=backend), x)
    torch.testing.assert_close(grad.cpu(), torch.tensor([-1.0]))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("gamma", "epsilon"), [(0.0, 2.0), (2.0, 1.0), (1.5, 0.5)])
def test_poly_in_fp32(gamma: float, epsilon: float, positive: bool, backend: str, device: torch.device) -> None:
    x = torch.tensor(LOGITS, dtype=torch.float32)
    pairs = [oracles.exact_focal(v, positive, gamma, epsilon) for v in x.tolist()]
    true_loss, true_grad = (torch.tensor([float(pair[i]) for pair in pairs], dtype=torch.float64) for i in range(2))
    leaf = x.to(device).requires_grad_()
    targets = torch.full_like(leaf, positive).bool()
    loss = bf.poly_focal_loss(leaf, targets, epsilon, gamma, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert (relative_error(loss.detach(), true_loss) / bound(gamma, x.double())).max() <= 1
    assert (relative_error(grad, true_grad) / bound(gamma, x.double())).max() <= 1


@pytest.mark.parametrize("x", [float("inf"), float("-inf")])
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("loss", [bf.asymmetric_loss, bf.poly_focal_loss, bf.ghm_loss])
def test_the_other_losses_at_infinity(
    loss: Callable[..., torch.Tensor], target_dtype: torch.dtype, x: float, backend: str, device: torch.device
) -> None:
    """A right label has no loss; of a wrong one, the gradient stays finite."""
    leaf = torch.tensor([x, x], device=device, requires_grad=True)
    y = torch.tensor([x > 0, x < 0], device=device).to(target_dtype)
    value = loss(leaf, y, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert value[0] == grad[0] == 0
    assert value[1] > 1
    assert grad.isfinite().all()


@pytest.mark.parametrize("label", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_soft_labels_in_fp32(gamma: float, label: float, backend: str, device: torch.device) -> None:
    """The gradient passes through 0, so that its error is held against the slope of the cross-entropy around it."""
    label = float(torch.tensor(label))
    x, true_loss, true_grad = exact(gamma, label, torch.float32)
    leaf = x.to(device).requires_grad_()
    loss = bf.sigmoid_focal_loss(leaf, torch.full_like(leaf, label).detach(), None, gamma, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert relative_error(loss.detach(), true_loss).max() <= 2e-5
    assert ((grad.cpu().double() - true_grad).abs() / (true_grad.abs() + 0.1**gamma)).max() <= 2e-5


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_soft_formula_at_hard_labels(gamma: float, positive: bool) -> None:
    """What runs where a look at the labels would cost: on a GPU in eager, compiled, under create_graph."""
    x, true_loss, true_grad = exact(gamma, positive, torch.float32)
    spec = reference.Spec("focal", (gamma,), None, 0.0, None, "none", torch.float32, torch.float32)
    operands = reference.Operands(x, torch.full_like(x, positive))
    loss, grad = reference.elementwise(spec, operands, soft=True, slope=True)
    assert (relative_error(loss, true_loss) / bound(gamma, x.double())).max() <= 1
    assert (relative_error(grad, true_grad) / bound(gamma, x.double())).max() <= 1


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_16_bit(
    gamma: float, dtype: torch.dtype, positive: bool, reduction: str, backend: str, device: torch.device
) -> None:
    x, true_loss, true_grad = exact(gamma, positive, dtype)
    loss, grad = loss_and_grad(x.to(device), positive, gamma, backend, torch.uint8, reduction)
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-4}[dtype]  # the rounding, and what fp16 has left
    assert relative_error(grad, true_grad).max() <= limit
    if reduction == "none":
        assert relative_error(loss, true_loss).max() <= limit


@pytest.mark.parametrize("logit", [-70.0, -40.0, -16.0, -9.0, -7.0, -5.0, -3.5, -3.375, -1.0, 0.0, 2.0, 20.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_reduced_loss_has_more_digits_than_its_16_bit_logits(
    gamma: float, logit: float, backend: str, device: torch.device
) -> None:
    """Thousands of well-classified labels, each wrong in the same direction, would bias the loss that is logged."""
    x = torch.tensor([logit], dtype=torch.bfloat16, device=device)
    loss = bf.sigmoid_focal_loss(x, torch.zeros_like(x, dtype=torch.bool), None, gamma, "sum", backend=backend)
    true = torch.tensor(float(oracles.exact_focal(logit, False, gamma)[0]), dtype=torch.float64)
    assert relative_error(loss, true) <= 1e-4


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_infinite_and_missing_logits(
    dtype: torch.dtype, gamma: float, target: str, backend: str, device: torch.device
) -> None:
    infinity = math.inf
    x = torch.tensor([infinity, -infinity, infinity, -infinity, math.nan, math.nan], dtype=dtype, device=device)
    y = torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.uint8 if target == "hard" else dtype, device=device)
    x.requires_grad_()
    loss = bf.sigmoid_focal_loss(x, y, None, gamma, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.tolist()[:4] == [0, 0, infinity, infinity]
    assert grad.tolist()[:4] == [0, 0, 1, -1]
    assert loss[4:].isnan().all()
    assert grad[4:].isnan().all()
    weighed = bf.sigmoid_focal_loss(x, y, None, gamma, weight=torch.zeros_like(x).detach(), backend=backend)
    (grad,) = torch.autograd.grad(weighed.sum(), x)
    assert grad.tolist()[:4] == [0, 0, 0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_logits_of_soft_labels(dtype: torch.dtype, gamma: float, backend: str, device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf], dtype=dtype, device=device).requires_grad_()
    y = torch.tensor([0.25, 0.25], dtype=dtype, device=device)
    loss = bf.sigmoid_focal_loss(x, y, None, gamma, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.tolist() == [math.inf, math.inf]
    expected = torch.tensor([0.75**gamma * 0.75, -(0.25**gamma) * 0.25], dtype=dtype, device=device)
    torch.testing.assert_close(grad, expected)
    if gamma == 0:
        bce = bf.binary_cross_entropy_with_logits(x, y, reduction="none", backend=backend)
        assert bce.tolist() == [math.inf, math.inf]
        torch.testing.assert_close(torch.autograd.grad(bce.sum(), x)[0], expected)


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-8])
def test_a_small_alpha_keeps_its_digits(share: float, backend: str, device: torch.device) -> None:
    x = torch.tensor([-2.0, 0.5, 7.0], device=device).requires_grad_()
    y = torch.ones_like(x, dtype=torch.bool)
    whole = bf.sigmoid_focal_loss(x, y, None, backend=backend)
    torch.testing.assert_close(bf.sigmoid_focal_loss(x, y, share, backend=backend), whole * share, rtol=1e-6, atol=0)
    weighted = bf.sigmoid_focal_loss(x, y, None, pos_weight=torch.tensor(share, device=device), backend=backend)
    torch.testing.assert_close(weighted, whole * share, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_large_finite_logits(gamma: float, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x = torch.tensor([90.0, 1e4, 3e38, -90.0, -1e4, -3e38], dtype=dtype, device=device).requires_grad_()
    loss = bf.sigmoid_focal_loss(x, torch.zeros_like(x, dtype=torch.bool), None, gamma, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss[:3], x[:3].detach())
    assert grad[:3].tolist() == [1, 1, 1]
    assert loss[3:].max() < 1e-18
    assert grad.isfinite().all()
