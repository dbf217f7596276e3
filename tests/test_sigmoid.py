"""The multi-label family: values and gradients against oracles, in the interpreter or on a GPU, and in eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import oracles
import pytest
import torch
from cases import (
    DOUBLE,
    LABELS,
    LOSSES,
    REDUCTIONS,
    TARGETS,
    TOLERANCE,
    WEIGHTS,
    logits,
    to,
    uniform,
    value_and_grad,
)
from hypothesis import given
from torch import Tensor

import bertloss_fast as bf


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
