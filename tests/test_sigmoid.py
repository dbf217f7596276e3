"""The multi-label family: values and gradients against oracles, in the interpreter or on a GPU, and in eager."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import oracles
import pytest
import torch
from hypothesis import given
from torch import Tensor

import bertloss_fast as bf
from bertloss_fast.ops import sigmoid

REDUCTIONS = ("none", "sum", "mean", "batchmean", "mean_positive")
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.7)
LABELS = 7
DOUBLE = {"atol": 1e-12, "rtol": 1e-10}


class Loss(NamedTuple):
    """A public loss beside its oracle, which takes the same options."""

    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    options: dict[str, Any]


LOSSES = {
    "bce": Loss(bf.binary_cross_entropy_with_logits, oracles.binary_cross_entropy, {}),
    **{
        f"focal-{gamma}": Loss(bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"gamma": gamma, "alpha": 0.3})
        for gamma in GAMMAS
    },
    "focal-unweighted": Loss(bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": None}),
    "focal-by-label": Loss(
        bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": torch.linspace(0, 1, LABELS, dtype=torch.float64)}
    ),
}
# Each regime catches what the others let through: hard labels take the short formula, soft ones the long one.
TARGETS = {
    "bool": lambda uniform: uniform < 0.3,
    "uint8": lambda uniform: (uniform < 0.3).to(torch.uint8),
    "int64": lambda uniform: (uniform < 0.3).to(torch.int64),
    "float-hard": lambda uniform: (uniform < 0.3).to(torch.float64),
    "float-soft": lambda uniform: uniform,
}
WEIGHTS = {
    "unweighted": {},
    "weight-of-label": {"weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64)},
    "weight-of-element": {"weight": torch.linspace(0, 3, 5 * LABELS, dtype=torch.float64).reshape(5, LABELS)},
    "pos-weight": {"pos_weight": torch.linspace(0.2, 9, LABELS, dtype=torch.float64)},
    "both": {
        "weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64),
        "pos_weight": torch.tensor(3.0, dtype=torch.float64),
    },
}


def logits(*shape: int, device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()


def uniform(*shape: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def to(options: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {key: value.to(device, dtype) if isinstance(value, Tensor) else value for key, value in options.items()}


def value_and_grad(loss: Tensor, inputs: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_definition(loss: str, target: str, weights: str, backend: str, device: torch.device) -> None:
    x = logits(5, LABELS, device=device)
    y = TARGETS[target](uniform(5, LABELS, device=device))
    function, oracle, options = LOSSES[loss]
    options = to({**options, **WEIGHTS[weights]}, device)
    for reduction in REDUCTIONS:
        upstream = torch.tensor(0.7, dtype=torch.float64, device=device)
        if reduction == "none":
            upstream = uniform(5, LABELS, device=device, seed=2) - 0.5
        ours = value_and_grad(function(x, y, reduction=reduction, backend=backend, **options), x, upstream)
        theirs = value_and_grad(oracle(x, y, reduction=reduction, **options), x, upstream)
        torch.testing.assert_close(ours, theirs, **DOUBLE, msg=lambda text, r=reduction: f"{r}: {text}")


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


@pytest.mark.parametrize("loss", LOSSES)
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


def test_a_negation_that_torch_has_put_off(backend: str, device: torch.device) -> None:
    x = torch.complex(*logits(2, 4, LABELS, device=device).detach()).conj().imag
    assert x.is_neg()
    y = uniform(4, LABELS, device=device) < 0.3
    leaf = x.requires_grad_()
    ours = value_and_grad(bf.sigmoid_focal_loss(leaf, y, backend=backend), leaf, x.detach())
    torch.testing.assert_close(ours, value_and_grad(oracles.sigmoid_focal(leaf, y), leaf, x.detach()), **DOUBLE)


shapes = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(1, 70)),
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(1, 300)),
    st.just(()),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
# The same values under other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "row-sliced": lambda tensor: torch.cat([tensor, tensor], dim=-1).chunk(2, dim=-1)[0] if tensor.dim() else tensor,
    "column-sliced": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}
layouts = st.sampled_from(sorted(LAYOUTS))


# Rounding of the result and, in 16 bits, of the approximate units; both sides get the same logits.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-8},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}


@given(data=st.data(), shape=shapes, dtype=dtypes, layout=layouts, reduction=st.sampled_from(REDUCTIONS))
@pytest.mark.parametrize("formula", ["focal", "bce"])
def test_equals_the_definition_on_drawn_arguments(
    formula: str,
    device: torch.device,
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    reduction: str,
) -> None:
    x = LAYOUTS[layout](logits(*shape, device=device, dtype=dtype).detach()).requires_grad_()
    y = TARGETS[data.draw(st.sampled_from(sorted(TARGETS)), label="targets")](uniform(*shape, device=device))
    if y.is_floating_point():
        y = y.to(data.draw(st.sampled_from([dtype, torch.float32]), label="target dtype"))
    y = LAYOUTS[data.draw(layouts, label="target layout")](y)
    options: dict[str, Any] = {}
    if formula == "focal":
        options["gamma"] = data.draw(st.sampled_from([0, 0.5, 1, 2, 3, 5, 2.5]), label="gamma")
        options["alpha"] = data.draw(st.sampled_from([None, 0.3, 0.0, 1.0, "by label"]), label="alpha")
        if options["alpha"] == "by label":
            options["alpha"] = uniform(*shape[-1:], device=device, seed=3)
    if data.draw(st.booleans(), label="pos_weight"):
        options["pos_weight"] = 3 * uniform(*data.draw(st.sampled_from([(), shape[-1:]])), device=device, seed=4)
    kind = data.draw(st.sampled_from(["none", "label", "element"]), label="weight")
    if kind != "none":
        options["weight"] = uniform(*(shape if kind == "element" else shape[-1:]), device=device, seed=5)
    backend = data.draw(st.sampled_from(["triton", "eager"]), label="backend")

    function = bf.sigmoid_focal_loss if formula == "focal" else bf.binary_cross_entropy_with_logits
    oracle = oracles.sigmoid_focal if formula == "focal" else oracles.binary_cross_entropy
    loss, grad = value_and_grad(function(x, y, reduction=reduction, backend=backend, **options), x)
    exact = x.detach().double().requires_grad_()
    true_loss, true_grad = value_and_grad(oracle(exact, y, reduction=reduction, **options), exact)
    assert grad.dtype == x.dtype
    torch.testing.assert_close(grad, true_grad.to(grad.dtype), **TOLERANCE[dtype])
    torch.testing.assert_close(
        loss, true_loss.to(loss.dtype), **TOLERANCE[min(dtype, loss.dtype, key=lambda d: d.itemsize)]
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_dtype_of_the_loss(reduction: str, backend: str, device: torch.device) -> None:
    pairs = itertools.product([torch.float16, torch.bfloat16, torch.float32, torch.float64], repeat=2)
    for of_inputs, of_targets in pairs:
        x, y = torch.zeros(2, 3, dtype=of_inputs, device=device), torch.ones(2, 3, dtype=of_targets, device=device)
        ours = bf.binary_cross_entropy_with_logits(x, y, reduction=reduction, backend=backend)
        assert ours.dtype == torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction=reduction).dtype
        focal = bf.sigmoid_focal_loss(x, y, reduction=reduction, backend=backend)
        promoted = torch.promote_types(of_inputs, of_targets)
        assert focal.dtype == (promoted if reduction == "none" else torch.promote_types(promoted, torch.float32))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_every_integer_dtype(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, y = logits(6, 50, device=device), uniform(6, 50, device=device) < 0.3
    ours = value_and_grad(bf.sigmoid_focal_loss(x, y.to(dtype), reduction="mean_positive", backend=backend), x)
    theirs = value_and_grad(oracles.sigmoid_focal(x, y, reduction="mean_positive"), x)
    torch.testing.assert_close(ours, theirs, **DOUBLE)


# One tile is 1024 elements in 16 bits, 512 in fp32: below, at, above, and many with a rest.
@pytest.mark.parametrize("shape", [(1, 1), (1, 511), (2, 256), (3, 1001), (64, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_around_the_edges_of_a_tile(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = logits(*shape, device=device, dtype=dtype)
    y = uniform(*shape, device=device) < 0.3
    exact = x.detach().double().requires_grad_()
    ours = value_and_grad(bf.sigmoid_focal_loss(x, y, reduction="sum", backend="triton"), x)
    loss, grad = value_and_grad(oracles.sigmoid_focal(exact, y, reduction="sum"), exact)
    torch.testing.assert_close(ours, (loss.float(), grad.to(dtype)), rtol=TOLERANCE[dtype]["rtol"], atol=1e-6)


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
    run = sigmoid._FORWARD[backend]

    def spy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        loss, grad = run(*args, **kwargs)
        gradients.append(grad)
        return loss, grad

    monkeypatch.setitem(sigmoid._FORWARD, backend, spy)
    with torch.no_grad():
        loss = bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend)
    assert gradients == [None]
    torch.testing.assert_close(loss, oracles.sigmoid_focal(x, y, reduction="mean").detach(), **DOUBLE)


def test_broadcast_weights_as_torch_has_them(backend: str, device: torch.device) -> None:
    x, y = logits(4, 5, device=device), uniform(4, 5, device=device)
    for shape in [(), (1,), (4, 1), (1, 5), (5,), (4, 5)]:
        weight = uniform(*shape, device=device, seed=7)
        ours = value_and_grad(bf.binary_cross_entropy_with_logits(x, y, weight, backend=backend), x)
        theirs = value_and_grad(torch.nn.functional.binary_cross_entropy_with_logits(x, y, weight), x)
        torch.testing.assert_close(ours, theirs, **DOUBLE)


def test_a_block_boundary_inside_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager backend's blocks: rows in groups, rows in parts, and a rest in both directions."""
    monkeypatch.setattr("bertloss_fast.ops.sigmoid._SMALL", 0)
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for shape in [(7, 5), (3, 37), (1, 16), (50, 1)]:
        x, y = logits(*shape, device=torch.device("cpu")), uniform(*shape, device=torch.device("cpu"))
        weight = uniform(*shape, device=torch.device("cpu"), seed=3)
        options = {"reduction": "sum", "weight": weight, "pos_weight": weight[0], "alpha": weight[0] / 2}
        ours = value_and_grad(bf.sigmoid_focal_loss(x, y, backend="eager", **options), x)
        torch.testing.assert_close(ours, value_and_grad(oracles.sigmoid_focal(x, y, **options), x), **DOUBLE)


def test_rows_further_apart_than_32_bits_count(device: torch.device) -> None:
    """Offsets past 2^31 in a small call: the storage is reserved, and but a few of its pages are touched."""
    rows = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device).as_strided((2, 600), (2**31, 1))
    rows.copy_(logits(2, 600, device=device, dtype=torch.bfloat16).detach())
    x, y = rows.requires_grad_(), uniform(2, 600, device=device) < 0.3
    exact = x.detach().double().requires_grad_()
    ours = value_and_grad(bf.sigmoid_focal_loss(x, y, reduction="sum", backend="triton"), x)
    loss, grad = value_and_grad(oracles.sigmoid_focal(exact, y, reduction="sum"), exact)
    torch.testing.assert_close(ours, (loss.float(), grad.bfloat16()), rtol=2**-8, atol=1e-6)
