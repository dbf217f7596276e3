"""The multi-label family: values and gradients against oracles, in the interpreter or on a GPU, and in eager."""

from __future__ import annotations

import functools
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
    OPTIONS,
    REDUCTIONS,
    TARGETS,
    TOLERANCE,
    logits,
    to,
    uniform,
    value_and_grad,
)
from hypothesis import given
from torch import Tensor

import bertloss_fast as bf


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_definition(loss: str, target: str, backend: str, device: torch.device) -> None:
    x = logits(5, LABELS, device=device)
    y = TARGETS[target](uniform(5, LABELS, device=device))
    function, oracle, fixed = LOSSES[loss]
    names = OPTIONS if target in ("uint8", "float-soft", "sparse") else ("none", "all")
    turn = list(LOSSES).index(loss) + list(TARGETS).index(target)  # over losses and targets, all pairs have theirs
    for number, name in enumerate(names):
        options = to({**fixed, **OPTIONS[name]}, device)
        reduction = REDUCTIONS[(turn + number) % len(REDUCTIONS)]
        if reduction == "none":
            options.pop("normalizer", None)
            upstream = uniform(5, LABELS, device=device, seed=2) - 0.5
        else:
            upstream = torch.tensor(0.7, dtype=torch.float64, device=device)
        ours = value_and_grad(function(x, y, reduction=reduction, backend=backend, **options), x, upstream)
        theirs = value_and_grad(oracle(x, y, reduction=reduction, **options), x, upstream)
        torch.testing.assert_close(ours, theirs, **DOUBLE, msg=lambda text, c=(name, reduction): f"{c}: {text}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_elements(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """They may hold anything: the logit NaN, the target no label."""
    function, oracle, options = LOSSES[loss]
    values = logits(5, LABELS, device=device).detach()
    y = (uniform(5, LABELS, device=device) < 0.3).to(dtype)
    ignored = uniform(5, LABELS, device=device, seed=3) < 0.4
    y[ignored] = -100
    values[ignored] = float("nan")
    x = values.requires_grad_()
    for reduction in REDUCTIONS:
        options = {**options, "ignore_index": -100, "label_smoothing": 0.2, "reduction": reduction}
        loss_and_grad = value_and_grad(function(x, y, backend=backend, **to(options, device)), x)
        torch.testing.assert_close(loss_and_grad, value_and_grad(oracle(x, y, **to(options, device)), x), **DOUBLE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_that_counts(loss: str, reduction: str, backend: str, device: torch.device) -> None:
    """An attached 0 with a gradient of 0, where others give NaN."""
    function, _, options = LOSSES[loss]
    options = to({**options, "reduction": reduction, "backend": backend}, device)
    x, y = logits(4, LABELS, device=device), torch.full((4, LABELS), -100, device=device)
    empty = torch.empty(0, LABELS, device=device, requires_grad=True)
    calls = (
        (x, y, {"ignore_index": -100}),
        (x, y.abs().clamp_max(1), {"mask": torch.zeros_like(y, dtype=torch.bool)}),
        (empty, empty.detach().bool(), {}),
        (empty, bf.SparseLabels.from_lists([], LABELS).to(device), {}),
    )
    for inputs, targets, ignoring in calls:
        value, grad = value_and_grad(function(inputs, targets, **options, **ignoring), inputs)
        assert not value.any()
        assert grad.shape == inputs.shape
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_sparse_labels_are_their_dense_twin(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Bit for bit, but for the kernels' sums, whose order differs; labels doubled, unsorted, and rows without any."""
    function, _, options = LOSSES[loss]
    options = to(options, device, dtype if loss == "focal-by-label" else None)
    lists = [[3, 0, 3], [], [6, 5, 4, 3, 2, 1, 0], [], [1]] * 5
    targets = bf.SparseLabels.from_lists(lists, LABELS).to(device)
    for labels in (targets, targets[:0].cat([bf.SparseLabels.from_lists([[]] * 25, LABELS).to(device)])):
        x = logits(25, LABELS, device=device, dtype=dtype)
        for reduction in ("none", "mean", "mean_positive"):
            run = functools.partial(function, reduction=reduction, backend=backend, **options)
            value, grad = value_and_grad(run(x, labels), x)
            true_value, true_grad = value_and_grad(run(x, labels.to_dense()), x)
            assert torch.equal(grad, true_grad)
            if reduction == "none" or backend == "eager":
                assert torch.equal(value, true_value)
            else:
                torch.testing.assert_close(value, true_value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["balanced", "ghm"])
def test_sparse_labels_are_their_dense_twin_in_long_rows(loss: str, backend: str, device: torch.device) -> None:
    """What a batch or a row tells of its targets adds up to the same, bit for bit, in either form."""
    function = LOSSES[loss].function
    options = {"class_counts": torch.arange(1, 302), "num_samples": 400} if loss == "balanced" else {}
    dense = uniform(9, 301, device=device) < 0.1
    x = logits(9, 301, device=device, dtype=torch.float32)
    results = [
        value_and_grad(function(x, labels, reduction="none", backend=backend, **to(options, device)), x)
        for labels in (dense, bf.SparseLabels.from_dense(dense))
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("loss", ["bce", "focal-2.0", "balanced", "ghm"])
def test_what_is_masked_may_hold_anything(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """In eager but for rounding: other values than 0 and 1 go by another formula, or by themselves."""
    function, _, options = LOSSES[loss]
    mask = OPTIONS["mask"]["mask"].to(device)
    x, y = logits(*mask.shape, device=device), (uniform(*mask.shape, device=device) < 0.3).to(dtype)
    run = functools.partial(function, mask=mask, reduction="mean", backend=backend, **to(options, device))
    expected = value_and_grad(run(x, y), x)
    found = value_and_grad(run(x, torch.where(mask, y, -100)), x)
    rounding = {"rtol": 0, "atol": 0} if backend == "triton" else {"rtol": 1e-14, "atol": 1e-16}
    torch.testing.assert_close(found, expected, **rounding)


def test_a_normalizer_tensor_of_0_is_a_division_by_0(backend: str, device: torch.device) -> None:
    """Nobody looks into it: it may lie on a GPU."""
    x, zero = logits(2, 3, device=device, dtype=torch.float32), torch.zeros((), device=device)
    loss = bf.sigmoid_focal_loss(x, x.detach() > 0, reduction="sum", normalizer=zero, backend=backend)
    assert not loss.isfinite()


# Rows shorter and longer than a tile, labels at its edges, and more in it than are marked at a time.
@pytest.mark.parametrize(("num_labels", "every"), [(3, 2), (100, 7), (1000, 1), (2048, 64), (5000, 999), (4097, 3)])
def test_labels_of_a_tile(num_labels: int, every: int, device: torch.device) -> None:
    x = logits(5, num_labels, device=device, dtype=torch.float32)
    lists = [list(range(row % every, num_labels, every)) if row != 3 else [] for row in range(5)]
    labels = bf.SparseLabels.from_lists(lists, num_labels).to(device)
    value, grad = value_and_grad(bf.sigmoid_focal_loss(x, labels, reduction="sum", backend="triton"), x)
    exact = x.detach().double().requires_grad_()
    true_value, true_grad = value_and_grad(oracles.sigmoid_focal(exact, labels.to_dense(), reduction="sum"), exact)
    torch.testing.assert_close((value, grad), (true_value.float(), true_grad.float()), rtol=1e-5, atol=1e-7)


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


DRAWN = {
    "bce": (bf.binary_cross_entropy_with_logits, oracles.binary_cross_entropy),
    "focal": (bf.sigmoid_focal_loss, oracles.sigmoid_focal),
    "asl": (bf.asymmetric_loss, oracles.asymmetric),
    "poly": (bf.poly_focal_loss, oracles.sigmoid_focal),
}


def drawn_params(data: st.DataObject, formula: str, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    params: dict[str, Any] = {}
    gammas = st.sampled_from([0, 0.5, 1, 2, 3, 4, 5, 2.5])
    if formula in ("focal", "poly"):
        params["gamma"] = data.draw(gammas, label="gamma")
        params["alpha"] = data.draw(st.sampled_from([None, 0.3, 0.0, 1.0, "by label"]), label="alpha")
        if params["alpha"] == "by label":
            params["alpha"] = uniform(*shape[-1:], device=device, seed=3).float().double()
    if formula == "poly":
        params["epsilon"] = data.draw(st.sampled_from([2.0, -0.5, 0.0]), label="epsilon")
    if formula == "asl":
        params |= {name: data.draw(gammas, label=name) for name in ("gamma_neg", "gamma_pos")}
        params["clip"] = data.draw(st.sampled_from([0.0, 0.05, 0.3]), label="clip")
        params["detach_focal_weight"] = data.draw(st.booleans(), label="detached")
    return params


def drawn_options(data: st.DataObject, shape: tuple[int, ...], reduction: str, device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if data.draw(st.booleans(), label="pos_weight"):
        options["pos_weight"] = 3 * uniform(*data.draw(st.sampled_from([(), shape[-1:]])), device=device, seed=4)
    kind = data.draw(st.sampled_from(["none", "label", "element"]), label="weight")
    if kind != "none":
        options["weight"] = uniform(*(shape if kind == "element" else shape[-1:]), device=device, seed=5)
    if shape and data.draw(st.booleans(), label="sample_weight"):
        options["sample_weight"] = uniform(*shape[:-1], device=device, seed=6)
    if data.draw(st.booleans(), label="mask"):
        options["mask"] = LAYOUTS[data.draw(layouts, label="mask layout")](uniform(*shape, device=device, seed=7) < 0.7)
    options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.0, 0.1, 0.9]), label="smoothing")
    if reduction != "none":
        options["normalizer"] = data.draw(st.sampled_from([None, 7, 0.3, "tensor"]), label="normalizer")
        if options["normalizer"] == "tensor":
            options["normalizer"] = torch.tensor(12, device=device)
    return options


@given(data=st.data(), shape=shapes, dtype=dtypes, layout=layouts, reduction=st.sampled_from(REDUCTIONS))
@pytest.mark.parametrize("formula", DRAWN)
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
    kinds = sorted(TARGETS) if shape else [name for name in sorted(TARGETS) if not name.startswith("sparse")]
    y = TARGETS[data.draw(st.sampled_from(kinds), label="targets")](uniform(*shape, device=device))
    options = drawn_params(data, formula, shape, device) | drawn_options(data, shape, reduction, device)
    if isinstance(y, Tensor) and y.layout == torch.strided:
        if y.is_floating_point():
            y = y.to(data.draw(st.sampled_from([dtype, torch.float32]), label="target dtype"))
        y = LAYOUTS[data.draw(layouts, label="target layout")](y)
        if y.dtype in (torch.int64, torch.float32) and data.draw(st.booleans(), label="ignoring"):
            y = torch.where(uniform(*shape, device=device, seed=8) < 0.2, -100, y)
            options["ignore_index"] = -100
    backend = data.draw(st.sampled_from(["triton", "eager"]), label="backend")

    function, oracle = DRAWN[formula]
    loss, grad = value_and_grad(function(x, y, reduction=reduction, backend=backend, **options), x)
    exact = x.detach().double().requires_grad_()
    true_loss, true_grad = value_and_grad(oracle(exact, y, reduction=reduction, **options), exact)
    assert grad.dtype == x.dtype
    tolerance = TOLERANCE[dtype]
    if formula == "asl":  # r = p - clip cancels, to the absolute accuracy of p: 1e-5 in 16 bits
        tolerance = tolerance | {"rtol": 8 * tolerance["rtol"], "atol": max(tolerance["atol"], 2e-7)}
    torch.testing.assert_close(grad, true_grad.to(grad.dtype), **tolerance)
    if loss.dtype.itemsize > dtype.itemsize and formula != "asl":
        tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, true_loss.to(loss.dtype), **tolerance)


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
