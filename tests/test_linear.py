"""A linear layer and its loss in one, against the definition of the loss on the layer's logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import row_oracles
import torch
from cases import DOUBLE, LOSSES, OPTIONS, REDUCTIONS, TARGETS, TOLERANCE, Loss, logits, to, uniform
from row_cases import ROW_LOSSES, RowLoss
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf
from bertloss_fast.ops import chunks, products

ROWS, FEATURES, LABELS = 5, 4, 7
# Chunks of one label or row; that do not divide 7 or 5; that do; of all; of more.
CHUNKS = (None, 1, 3, 5, 7, 100)


class Linear(NamedTuple):
    """A public function beside the definition of its loss."""

    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    options: dict[str, Any]


def beside(function: Callable[..., Tensor], found: Loss | RowLoss) -> Linear:
    """With the oracle and the options of a loss that is in the tests' tables."""
    options = found.options(LABELS) if callable(found.options) else found.options or {}
    return Linear(function, found.oracle, options)


OF_LABELS = {
    "bce": beside(bf.linear_binary_cross_entropy, LOSSES["bce"]),
    "focal": beside(bf.linear_sigmoid_focal_loss, LOSSES["focal-2.0"]),
    "focal-by-label": beside(bf.linear_sigmoid_focal_loss, LOSSES["focal-by-label"]),
    "poly": beside(bf.linear_poly_focal_loss, LOSSES["poly-focal"]),
    "asl": beside(bf.linear_asymmetric_loss, LOSSES["asl"]),
}
OF_CLASSES = {
    "ce": beside(bf.linear_cross_entropy, ROW_LOSSES["ce"]),
    "ce-z": beside(bf.linear_cross_entropy, ROW_LOSSES["ce-z"]),
    "softmax-focal": beside(bf.linear_softmax_focal_loss, ROW_LOSSES["focal-3.7"]),
    "softmax-focal-alpha": beside(bf.linear_softmax_focal_loss, ROW_LOSSES["focal-alpha"]),
}


def layer(
    device: torch.device, rows: int = ROWS, labels: int = LABELS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer is given, its weight and its bias."""
    shapes = (rows, FEATURES), (labels, FEATURES), (labels,)
    return tuple(  # type: ignore[return-value]
        logits(*shape, device=device, dtype=dtype, seed=10 + number).detach().div(2).requires_grad_()
        for number, shape in enumerate(shapes)
    )


def classes(device: torch.device, rows: int = ROWS, labels: int = LABELS) -> Tensor:
    made = torch.arange(rows, device=device) * 3 % labels
    made[1:2] = -100
    return made


def value_and_grads(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    upstream = uniform(*loss.shape, device=loss.device, seed=2).to(loss.dtype) - 0.3
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.sweep) for turn in (1, 2))])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OF_LABELS)
def test_labels(name: str, target: str, turn: int, backend: str, device: torch.device) -> None:
    function, oracle, fixed = OF_LABELS[name]
    leaves = layer(device)
    x, weight, bias = leaves
    y = TARGETS[target](uniform(ROWS, LABELS, device=device))
    # Over the targets every chunk size with every reduction, and over the losses too with every option.
    of_loss, of_target = list(OF_LABELS).index(name), list(TARGETS).index(target)
    for number, chunk_size in enumerate(CHUNKS):
        reduction = REDUCTIONS[(number + turn + of_target) % len(REDUCTIONS)]
        option = list(OPTIONS)[(number + 3 * turn + 2 * of_loss + 4 * of_target) % len(OPTIONS)]
        options = to({**fixed, **OPTIONS[option]}, device)
        if reduction == "none":
            options.pop("normalizer", None)
        run = functools.partial(function, x, weight, y, linear_bias=bias, reduction=reduction, **options)
        ours = value_and_grads(run(chunk_size=chunk_size, backend=backend), leaves)
        theirs = value_and_grads(oracle(F.linear(x, weight, bias), y, reduction=reduction, **options), leaves)
        torch.testing.assert_close(
            ours, theirs, **DOUBLE, msg=lambda text, c=(chunk_size, reduction, option): f"{c} {text}"
        )


@pytest.mark.parametrize("name", OF_CLASSES)
def test_classes(name: str, backend: str, device: torch.device) -> None:
    function, oracle, fixed = OF_CLASSES[name]
    leaves = layer(device)
    x, weight, bias = leaves
    of_rows = {"sample_weight": torch.linspace(0.5, 2, ROWS, dtype=torch.float64)}
    of_classes = {"weight": torch.linspace(0.1, 2, LABELS, dtype=torch.float64), "label_smoothing": 0.2}
    for number, chunk_size in enumerate(CHUNKS):
        options = to({**fixed, **(of_rows if number % 2 else {}), **(of_classes if number % 3 else {})}, device)
        for reduction in REDUCTIONS[:4]:
            y = classes(device)
            run = functools.partial(function, x, weight, y, linear_bias=bias, reduction=reduction, **options)
            ours = value_and_grads(run(chunk_size=chunk_size, backend=backend), leaves)
            theirs = value_and_grads(oracle(F.linear(x, weight, bias), y, reduction=reduction, **options), leaves)
            torch.testing.assert_close(
                ours, theirs, **DOUBLE, msg=lambda text, c=(chunk_size, reduction): f"{c} {text}"
            )


def test_class_probabilities(backend: str, device: torch.device) -> None:
    """Their gradient too, which is from plain operations."""
    x, weight, bias = layer(device)
    y = logits(ROWS, LABELS, device=device).detach().softmax(-1).requires_grad_()
    leaves = x, weight, bias, y
    ours = bf.linear_cross_entropy(x, weight, y, linear_bias=bias, chunk_size=2, backend=backend)
    theirs = F.cross_entropy(F.linear(x, weight, bias), y)
    torch.testing.assert_close(value_and_grads(ours, leaves), value_and_grads(theirs, leaves), **DOUBLE)


def test_leading_dimensions(backend: str, device: torch.device) -> None:
    x, weight, bias = layer(device, rows=6)
    x = x.detach().reshape(2, 3, FEATURES).transpose(0, 1).requires_grad_()  # of no contiguous strides
    y = uniform(3, 2, LABELS, device=device) < 0.3
    labels = classes(device, 6).reshape(3, 2)
    for reduction in ("none", "batchmean"):
        options: dict[str, Any] = {"linear_bias": bias, "reduction": reduction, "chunk_size": 3, "backend": backend}
        found = value_and_grads(bf.linear_binary_cross_entropy(x, weight, y, **options), (x, weight))
        true = LOSSES["bce"].oracle(F.linear(x, weight, bias), y, reduction=reduction)
        torch.testing.assert_close(found, value_and_grads(true, (x, weight)), **DOUBLE)
        found = value_and_grads(bf.linear_cross_entropy(x, weight, labels, **options), (x, weight))
        rows = F.linear(x, weight, bias).reshape(6, LABELS)
        true = row_oracles.cross_entropy(rows, labels.reshape(6), reduction=reduction)
        true = true.reshape(3, 2) if reduction == "none" else true
        torch.testing.assert_close(found, value_and_grads(true, (x, weight)), **DOUBLE)
    one = value_and_grads(bf.linear_cross_entropy(x[0, 0], weight, labels[0, 0], backend=backend), (x,))
    torch.testing.assert_close(one, value_and_grads(F.cross_entropy(x[0, 0] @ weight.T, labels[0, 0]), (x,)), **DOUBLE)


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_CLASSES])
def test_gradcheck(name: str, backend: str, device: torch.device) -> None:
    function, _, options = {**OF_LABELS, **OF_CLASSES}[name]
    leaves = layer(device, rows=3)
    y = classes(device, 3) if name in OF_CLASSES else uniform(3, LABELS, device=device) < 0.4

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = function(x, weight, y, linear_bias=bias, chunk_size=2, backend=backend, **to(options, device))
        return 1.7 * loss

    assert torch.autograd.gradcheck(run, leaves, fast_mode=backend == "triton")
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["focal", "ce"])
def test_accumulated_rounding(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Of sums of 64 products: that of one product, times the square root of their number."""
    function, oracle, fixed = {**OF_LABELS, **OF_CLASSES}[name]
    shapes = (32, 64), (50, 64), (50,)
    leaves = tuple(
        (logits(*shape, device=device, seed=number) / 8).to(dtype).detach().requires_grad_()
        for number, shape in enumerate(shapes)
    )
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    y = classes(device, 32, 50) if name == "ce" else uniform(32, 50, device=device) < 0.1
    options = {**fixed, "reduction": "sum"}
    ours = function(*leaves[:2], y, linear_bias=leaves[2], chunk_size=7, backend=backend, **options)
    theirs = oracle(F.linear(*exact), y, **options)
    for found, true, leaf in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, exact), leaves, strict=True
    ):
        assert found.dtype == leaf.dtype
        bound = 8 * torch.finfo(dtype).eps * true.abs().mean()
        assert (found - true).abs().max() < bound.clamp_min(1e-6) + 2 * torch.finfo(dtype).eps * true.abs().max()
    torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype]["rtol"] * 2, atol=1e-6)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
@pytest.mark.parametrize("name", ["focal", "ce"])
def test_only_the_gradients_that_are_asked_for(
    name: str, frozen: tuple[int, ...], backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product is computed for another."""
    function, oracle, options = {**OF_LABELS, **OF_CLASSES}[name]
    leaves = layer(device)
    for number in frozen:
        leaves[number].requires_grad_(False)
    asked = tuple(leaf for leaf in leaves if leaf.requires_grad)
    y = classes(device) if name == "ce" else uniform(ROWS, LABELS, device=device) < 0.4
    written: list[torch.Size] = []
    write = products.Products._write

    def spy(self: products.Products, out: Tensor, *arguments: Any, **options: Any) -> None:
        written.append(out.shape[-1:])
        write(self, out, *arguments, **options)

    monkeypatch.setattr(products.Products, "_write", spy)
    loss = function(*leaves[:2], y, linear_bias=leaves[2], chunk_size=100, backend=backend, **options)
    assert len(written) == len([leaf for leaf in asked if leaf.dim() == 2])
    torch.testing.assert_close(
        value_and_grads(loss, asked),
        value_and_grads(oracle(F.linear(*leaves), y, **options_of(options)), asked),
        **DOUBLE,
    )


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    """Of the oracle, whose reduction is none."""
    return {"reduction": "mean", **options}


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_CLASSES])
def test_edges(name: str, backend: str, device: torch.device) -> None:
    """No rows; one label; no bias; no positives; nothing that counts."""
    function, oracle, fixed = {**OF_LABELS, **OF_CLASSES}[name]
    fixed = {key: value for key, value in fixed.items() if not isinstance(value, Tensor)}  # of 7 labels
    of_classes = name in OF_CLASSES
    for rows, labels in ((0, LABELS), (ROWS, 1), (1, LABELS), (ROWS, LABELS)):
        x, weight, _ = layer(device, rows, labels)
        dense = torch.zeros(rows, labels, dtype=torch.bool, device=device)
        targets = [torch.zeros(rows, dtype=torch.long, device=device)]
        targets = targets if of_classes else [dense, bf.SparseLabels.from_dense(dense)]
        for y in targets:
            loss = function(x, weight, y, reduction="mean", backend=backend, chunk_size=3, **fixed)
            found = value_and_grads(loss, (x, weight))
            if rows:
                true = oracle(F.linear(x, weight), y, **{**fixed, "reduction": "mean"})
                torch.testing.assert_close(found, value_and_grads(true, (x, weight)), **DOUBLE)
            else:
                assert not any(tensor.any() for tensor in found)
    x, weight, bias = layer(device)
    y = torch.full((ROWS,) if of_classes else (ROWS, LABELS), -100, device=device)
    loss = function(x, weight, y, linear_bias=bias, ignore_index=-100, reduction="mean", backend=backend, **fixed)
    assert not any(tensor.any() for tensor in value_and_grads(loss, (x, weight, bias)))


def test_labels_on_the_borders_of_chunks(backend: str, device: torch.device) -> None:
    x, weight, bias = layer(device, 4, 12)
    y = bf.SparseLabels.from_lists([[0, 3, 4, 11], [], [7, 8], list(range(12))], 12).to(device)
    for chunk_size in (1, 4, 5, 11):
        run = functools.partial(bf.linear_sigmoid_focal_loss, x, weight, linear_bias=bias, reduction="mean_positive")
        found = value_and_grads(run(target=y, chunk_size=chunk_size, backend=backend), (x, weight, bias))
        true = LOSSES["focal-2.0"].oracle(F.linear(x, weight, bias), y, reduction="mean_positive")
        torch.testing.assert_close(found, value_and_grads(true, (x, weight, bias)), **DOUBLE)


def test_rows_are_cut_too_where_there_are_many(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_chunk_size", lambda layer: 8)
    monkeypatch.setattr(chunks, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(chunks, "_FEWEST_LABELS", 3)
    leaves = layer(device)
    for dense in (uniform(ROWS, LABELS, device=device) < 0.4, uniform(ROWS, LABELS, device=device)):
        targets = [dense] if dense.is_floating_point() else [dense, bf.SparseLabels.from_dense(dense)]
        for y in targets:
            options = {"sample_weight": uniform(ROWS, device=device), "reduction": "mean"}
            run = functools.partial(bf.linear_binary_cross_entropy, *leaves[:2], y, linear_bias=leaves[2], **options)
            true = LOSSES["bce"].oracle(F.linear(*leaves), y, **options)
            found = value_and_grads(run(backend=backend), leaves)
            torch.testing.assert_close(found, value_and_grads(true, leaves), **DOUBLE)


def test_upstreams(backend: str, device: torch.device) -> None:
    """Any, of a function and by a memory; twice; arguments stay, and what was handed out may be written to."""
    for dtype in (torch.float64, torch.bfloat16):
        leaves = layer(device, dtype=dtype)
        before = [leaf.detach().clone() for leaf in leaves]
        y, memory = uniform(ROWS, LABELS, device=device) < 0.4, bf.UpstreamMemory()
        for options in ({}, {"upstream_memory": memory}):
            for upstream in (1.0, 0.25, 0.25, 0.0, 3.0, 3.0, float("inf"), 1.0):
                run = functools.partial(bf.linear_binary_cross_entropy, *leaves[:2], y, linear_bias=leaves[2])
                loss = run(chunk_size=3, backend=backend, **options)
                (true,) = torch.autograd.grad(run(chunk_size=3, backend=backend), leaves[1])
                first = torch.autograd.grad(upstream * loss, leaves, retain_graph=True)
                second = torch.autograd.grad(upstream * loss, leaves)
                torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
                rounding = 4 * torch.finfo(dtype).eps
                atol = rounding * true.abs().max().item() * min(upstream, 1)
                torch.testing.assert_close(first[1], upstream * true, rtol=rounding, atol=atol, equal_nan=True)
                first[1].fill_(7)
        assert all(torch.equal(leaf, was) for leaf, was in zip(leaves, before, strict=True))


def test_the_same_bits_again(backend: str, device: torch.device) -> None:
    leaves = layer(device, dtype=torch.float32)
    y = bf.SparseLabels.from_dense(uniform(ROWS, LABELS, device=device) < 0.4)
    run = functools.partial(bf.linear_sigmoid_focal_loss, *leaves[:2], y, linear_bias=leaves[2], backend=backend)
    runs = [value_and_grads(run(chunk_size=2), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


def test_the_range_of_16_bits(backend: str, device: torch.device) -> None:
    """What was rounded for one upstream would be lost for another: gradients near fp16's least, or beyond it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator).to(device, torch.float16).requires_grad_()
    weight = torch.randn(10, 8, generator=generator).to(device).requires_grad_()
    y, memory = uniform(4, 10, device=device) < 0.3, bf.UpstreamMemory()
    run = functools.partial(bf.linear_binary_cross_entropy, chunk_size=4, backend=backend)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in (x, weight))
    with torch.autocast(device.type, torch.float16):
        for upstream in (2.0**17, 1.0, 1e-6, 65536.0, 2.0**-60, 1.0):
            for options in ({}, {"upstream_memory": memory}):
                loss = run(x, weight, y, **options)
                found = torch.autograd.grad(loss, (x, weight), torch.tensor(upstream, device=device))
                true = torch.autograd.grad(upstream * run(*exact, y), exact)
                for grad, expected in zip(found, true, strict=True):
                    rounding = 2e-3 * expected.abs().max()
                    expected = expected.to(grad.dtype).double() if grad.dtype == torch.float16 else expected
                    torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=rounding.item())


def test_no_gradient_is_computed_that_nobody_wants(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = (leaf.detach() for leaf in layer(device))
    found: list[Tensor | None] = []
    for kind in (chunks.sigmoid, chunks.softmax):
        forward = kind.FAMILY.forward

        def spy(*arguments: Any, forward: Any = forward) -> Any:
            loss, saved = forward(*arguments)
            found.append(saved.grads.inputs)
            return loss, saved

        name = "sigmoid" if kind is chunks.sigmoid else "softmax"
        monkeypatch.setitem(chunks.KINDS, name, chunks.KINDS[name]._replace(family=kind.FAMILY._replace(forward=spy)))
    bf.linear_cross_entropy(x, weight, classes(device), linear_bias=bias, backend=backend)
    bf.linear_binary_cross_entropy(x, weight, uniform(ROWS, LABELS, device=device) < 0.4, backend=backend)
    assert found
    assert all(grad is None for grad in found)


def test_a_normalizer_of_0(backend: str, device: torch.device) -> None:
    x, weight, _ = layer(device)
    y, nothing = uniform(ROWS, LABELS, device=device) < 0.4, torch.zeros((), device=device)
    loss = bf.linear_binary_cross_entropy(x, weight, y, normalizer=nothing, backend=backend)
    assert loss.isinf()
    assert not torch.autograd.grad(loss, weight)[0].isfinite().any()


@pytest.mark.parametrize("name", ["focal", "ce"])
def test_autocast(name: str, backend: str, device: torch.device) -> None:
    """The logits are of autocast's dtype, gradients of the layer's."""
    function, _, options = {**OF_LABELS, **OF_CLASSES}[name]
    leaves = layer(device, dtype=torch.float32)
    y = classes(device) if name == "ce" else uniform(ROWS, LABELS, device=device) < 0.4
    unfused = bf.cross_entropy if name == "ce" else functools.partial(bf.sigmoid_focal_loss, reduction="mean")
    with torch.autocast(device.type, torch.bfloat16):
        ours = function(*leaves[:2], y, linear_bias=leaves[2], backend=backend, chunk_size=3, **options)
        theirs = unfused(F.linear(*leaves), y, backend="eager", **options)
    found, true = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    assert ours.dtype == theirs.dtype == torch.float32
    assert [grad.dtype for grad in found] == [torch.float32] * 3
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * b.abs().max().item())
