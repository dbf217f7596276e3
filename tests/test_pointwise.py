"""Squared error and KL divergence against torch's own functions, in float64 under autograd."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DOUBLE, TOLERANCE, logits, uniform
from torch import Tensor, nn
from torch.nn import functional as F

import bertloss_fast as bf
from bertloss_fast.ops import pointwise
from bertloss_fast.ops.families import Saved

SHAPE = (5, 7)
INFINITY = float("inf")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = {"mse": ("none", "sum", "mean"), "kl": ("none", "sum", "mean", "batchmean")}
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mse": (bf.mse_loss, {}),
    "kl": (bf.kl_div, {}),
    "kl of logs": (bf.kl_div, {"log_target": True}),
}
CASES = [(loss, reduction) for loss in LOSSES for reduction in REDUCTIONS[loss.split()[0]]]


def oracle(
    loss: str,
    x: Tensor,
    t: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """torch's function, of the elements that count."""
    function = F.mse_loss if loss == "mse" else F.kl_div
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    options |= {} if weight is None else {"weight": weight[kept]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kl_div's mean
        if reduction == "none":
            of_kept = function(x[kept], t[kept], reduction="none", **options)
            return torch.zeros_like(x, dtype=of_kept.dtype).masked_scatter(kept, of_kept)
        if normalizer is None and reduction != "batchmean":
            return function(x[kept], t[kept], reduction=reduction, **options)
        total = function(x[kept], t[kept], reduction="sum", **options)
        return total / (x.shape[0] if normalizer is None else normalizer)


def batch(
    loss: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs and targets that require a gradient: log-probabilities and probabilities of every size, and some 0."""
    x, t = logits(*shape, device=device, seed=seed).detach(), logits(*shape, device=device, seed=seed + 1).detach()
    if loss != "mse":
        x, t = (-values.abs() for values in (x, t))
    if loss == "kl":
        t = t.exp()
    return x.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()


def values_and_grads(
    loss: Tensor, x: Tensor, t: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.autograd.grad(loss, (x, t), torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), *grads


def assert_rounded(found: tuple[Tensor, ...], true: tuple[Tensor, ...], **options: Any) -> None:
    """What is rounded to a dtype is as far from the true value as that allows."""
    for ours, exact in zip(found, true, strict=True):
        torch.testing.assert_close(ours.to(exact.dtype), exact, **TOLERANCE[ours.dtype], **options)


# Each for itself, and those that meet in one denominator.
OPTIONS = {
    "none": (),
    "mask": ("mask",),
    "normalizer": ("normalizer",),
    "masked normalizer": ("mask", "normalizer"),
    "weight": ("weight",),
    "weight and mask": ("weight", "mask"),
    "all": ("weight", "mask", "normalizer"),
}


def options_of(names: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    values = {
        "weight": 0.01 * uniform(*SHAPE, device=device, seed=5),  # less than 1 in all
        "mask": uniform(*SHAPE, device=device, seed=6) < 0.6,
        "normalizer": torch.tensor(7, device=device),
    }
    return {name: values[name] for name in names}


CALLS = [
    (loss, reduction, option)
    for (loss, reduction), (option, names) in itertools.product(CASES, OPTIONS.items())
    if not (loss != "mse" and "weight" in names) and not (reduction == "none" and "normalizer" in names)
]


@pytest.mark.parametrize(("loss", "reduction", "option"), CALLS)
def test_equals_torch(loss: str, reduction: str, option: str, backend: str, device: torch.device) -> None:
    function, fixed = LOSSES[loss]
    options = options_of(OPTIONS[option], device)
    x, t = batch(loss, SHAPE, device)
    upstream = torch.tensor(0.7, dtype=torch.float64, device=device)
    if reduction == "none":
        upstream = uniform(*SHAPE, device=device, seed=2) - 0.5
    ours = values_and_grads(function(x, t, reduction=reduction, backend=backend, **fixed, **options), x, t, upstream)
    theirs = values_and_grads(oracle(loss, x, t, reduction, **fixed, **options), x, t, upstream)
    torch.testing.assert_close(ours, theirs, **DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_pair_of_dtypes(loss: str, reduction: str, backend: str, device: torch.device) -> None:
    """The loss has torch's dtype, each gradient its tensor's; both are rounded once."""
    function, options = LOSSES[loss]
    for of_inputs, of_targets in itertools.product(FLOATING, FLOATING):
        x, t = batch(loss, (3, 33), device)
        x, t = (tensor.detach().to(d).requires_grad_() for tensor, d in ((x, of_inputs), (t, of_targets)))
        exact = [tensor.detach().double().requires_grad_() for tensor in (x, t)]
        ours = values_and_grads(function(x, t, reduction=reduction, backend=backend, **options), x, t)
        theirs = values_and_grads(oracle(loss, *exact, reduction, **options), *exact)
        assert ours[0].dtype == oracle(loss, x, t, reduction, **options).dtype
        assert [grad.dtype for grad in ours[1:]] == [of_inputs, of_targets]
        for found, true in zip(ours, theirs, strict=True):
            tolerance = TOLERANCE[found.dtype]
            if of_inputs.itemsize == 2:  # the approximate units
                tolerance = {"rtol": max(tolerance["rtol"], 2e-5), "atol": max(tolerance["atol"], 1e-6)}
            torch.testing.assert_close(found.double(), true, **tolerance)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.bool, torch.int64])
def test_dtypes_of_a_weight(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, t = batch("mse", SHAPE, device, torch.bfloat16)
    weight = (3 * uniform(*SHAPE, device=device, seed=5)).to(dtype)
    for reduction in REDUCTIONS["mse"]:
        ours = bf.mse_loss(x, t, reduction=reduction, weight=weight, backend=backend)
        assert ours.dtype == F.mse_loss(x, t, reduction=reduction, weight=weight).dtype
        assert_rounded((ours,), (oracle("mse", x.double(), t.double(), reduction, weight.double()),))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_integer_targets_of_a_squared_error(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Ratings are stored so; torch takes them too."""
    x, t = logits(4, 9, device=device), (5 * uniform(4, 9, device=device)).to(dtype)
    ours, theirs = bf.mse_loss(x, t, backend=backend), F.mse_loss(x, t)
    assert ours.dtype == theirs.dtype
    (grad,), (true,) = torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x)
    torch.testing.assert_close((ours, grad), (theirs, true), **DOUBLE)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_gives_torch_s_dtype(loss: str, backend: str, device: torch.device) -> None:
    function, options = LOSSES[loss]
    x, t = batch(loss, SHAPE, device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours, theirs = function(x, t, backend=backend, **options), oracle(loss, x, t, **options)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# The same values under other strides; a target may be one row for all.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "row-sliced": lambda tensor: torch.cat([tensor, tensor], dim=-1).chunk(2, dim=-1)[0],
    "column-sliced": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
    "permuted": lambda tensor: tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "negated": lambda tensor: torch.complex(tensor, -tensor).conj().imag,
}


@pytest.mark.parametrize("of_targets", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("of_inputs", LAYOUTS)
def test_strides(of_inputs: str, of_targets: str, backend: str, device: torch.device) -> None:
    x, t = (tensor.detach() for tensor in batch("kl", (4, 3, 37), device))
    t = t[:, :1].expand(4, 3, 37) if of_targets == "expanded" else LAYOUTS[of_targets](t)
    x, t = LAYOUTS[of_inputs](x).requires_grad_(), t.requires_grad_()
    mask = LAYOUTS["transposed"](uniform(4, 3, 37, device=device, seed=3) < 0.7)
    for loss, reduction in (("kl", "mean"), ("mse", "none")):
        function, _ = LOSSES[loss]
        ours = values_and_grads(function(x, t, reduction=reduction, mask=mask, backend=backend), x, t)
        torch.testing.assert_close(ours, values_and_grads(oracle(loss, x, t, reduction, mask=mask), x, t), **DOUBLE)


# One tile is 1024 elements in 16 bits, 512 in fp32: below, at, above, and many with a rest.
@pytest.mark.parametrize("shape", [(), (1,), (511,), (2, 256), (3, 1001), (2, 3, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_and_the_edges_of_a_tile(
    loss: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    function, options = LOSSES[loss]
    x, t = batch(loss, shape, device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, t)]
    true = values_and_grads(oracle(loss, *exact, "mean", **options), *exact)
    for backend in ("triton", "eager"):
        ours = values_and_grads(function(x, t, backend=backend, **options), x, t)
        assert_rounded(ours, true)


def test_batchmean_of_a_number_divides_by_nothing(backend: str, device: torch.device) -> None:
    x, t = batch("kl", (), device)
    ours = bf.kl_div(x, t, reduction="batchmean", backend=backend)
    torch.testing.assert_close(ours, F.kl_div(x, t, reduction="batchmean"), **DOUBLE)


def test_rows_further_apart_than_32_bits_count(device: torch.device) -> None:
    """Offsets past 2^31 in a small call: the storage is reserved, and but a few of its pages are touched."""
    near, t = batch("mse", (2, 600), device, torch.bfloat16)
    x = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device).as_strided((2, 600), (2**31, 1))
    x = x.copy_(near.detach()).requires_grad_()
    ours = values_and_grads(bf.mse_loss(x, t, reduction="sum", backend="triton"), x, t)
    exact = [tensor.detach().double().requires_grad_() for tensor in (near, t)]
    theirs = values_and_grads(oracle("mse", *exact, "sum"), *exact)
    assert_rounded(ours, theirs)


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


MODULES: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "mse": (bf.MSELoss, nn.MSELoss),
    "kl": (bf.KLDivLoss, nn.KLDivLoss),
}


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


@pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False), (True, False)])
@pytest.mark.parametrize("loss", MODULES)
def test_deprecated_arguments_as_in_torch(
    loss: str, size_average: bool | None, reduce: bool | None, device: torch.device
) -> None:
    x, t = batch(loss, SHAPE, device)
    ours, theirs = (
        [kind(size_average, reduce), kind(size_average=size_average, reduce=reduce)] for kind in MODULES[loss]
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine(x, t), other(x, t), **DOUBLE)
    function, torchs = (bf.mse_loss, F.mse_loss) if loss == "mse" else (bf.kl_div, F.kl_div)
    torch.testing.assert_close(function(x, t, size_average, reduce), torchs(x, t, size_average, reduce), **DOUBLE)


def test_a_mean_does_not_warn(backend: str, device: torch.device) -> None:
    x, t = batch("kl", SHAPE, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bf.kl_div(x, t, reduction="mean", backend=backend)


X, T = torch.zeros(4, 5), torch.zeros(4, 5)
ERRORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "a broadcast target": (bf.mse_loss, (X, T[:, :1]), {}, ValueError, r"target: .*\(4, 5\) like input, got \(4, 1\)"),
    "a broadcast input": (bf.kl_div, (X[0], T), {}, ValueError, r"target: .*\(5,\) like input, got \(4, 5\)"),
    "an integer input": (bf.mse_loss, (X.long(), T), {}, TypeError, "input: expected float16.*float64, got int64"),
    "integer log-probabilities": (bf.kl_div, (X.long(), T), {}, TypeError, "input: expected float16.*got int64"),
    "integer probabilities": (bf.kl_div, (X, T.long()), {}, TypeError, "target: expected float16.*got int64"),
    "a complex target": (bf.mse_loss, (X, T.cfloat()), {}, TypeError, "target: expected bool, an.*got complex64"),
    "an 8-bit target": (bf.mse_loss, (X, T.to(torch.float8_e5m2)), {}, TypeError, "target: .*got float8_e5m2"),
    "no target": (bf.mse_loss, (X, 0.0), {}, TypeError, "target: expected a tensor, got float"),
    "a sparse target": (bf.kl_div, (X, T.to_sparse()), {}, TypeError, "target: expected a dense tensor, got"),
    "a target elsewhere": (bf.kl_div, (X, T.to("meta")), {}, ValueError, "target: .*'cpu' like input, got 'meta'"),
    "a weight of the columns": (bf.mse_loss, (X, T), {"weight": T[0]}, ValueError, r"weight: .*\(4, 5\).*\(5,\)"),
    "a complex weight": (bf.mse_loss, (X, T), {"weight": T.cfloat()}, TypeError, "weight: .*got complex64"),
    "a weight of kl": (bf.kl_div, (X, T), {"weight": T}, TypeError, "weight"),
    "a mask of numbers": (bf.mse_loss, (X, T), {"mask": T}, TypeError, "mask: expected bool, got float32"),
    "a mask of rows": (bf.kl_div, (X, T), {"mask": T[:1] > 0}, ValueError, r"mask: .*\(4, 5\).*\(1, 5\)"),
    "batchmean of mse": (bf.mse_loss, (X, T), {"reduction": "batchmean"}, ValueError, "reduction: .*mean, got 'batc"),
    "mean_positive": (bf.kl_div, (X, T), {"reduction": "mean_positive"}, ValueError, "reduction: .*batchmean, got"),
    "normalised losses": (bf.kl_div, (X, T), {"reduction": "none", "normalizer": 2}, ValueError, "normalizer: .*none"),
    "normalizer of 0": (bf.mse_loss, (X, T), {"normalizer": 0}, ValueError, "normalizer: expected a number > 0, got 0"),
    "a memory of another kind": (bf.kl_div, (X, T), {"upstream_memory": 3}, TypeError, "upstream_memory: .*got int"),
    "unknown backend": (bf.mse_loss, (X, T), {"backend": "cuda"}, ValueError, "backend: expected one of.*'cuda'"),
    "module: reduction": (bf.MSELoss, (), {"reduction": "batchmean"}, ValueError, "reduction: .*got 'batchmean'"),
    "module: reduction of kl": (bf.KLDivLoss, (), {"reduction": "avg"}, ValueError, "reduction: .*got 'avg'"),
    "module: backend": (bf.KLDivLoss, (), {"backend": "cuda"}, ValueError, "backend: expected one of.*'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_sentence_and_no_launch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        pytest.fail("computed before the arguments were checked")

    monkeypatch.setattr("bertloss_fast.functional.pointwise.pointwise_loss", never)
    function, args, options, error, sentence = ERRORS[case]
    with pytest.raises(error, match=sentence):
        function(*args, **options)
