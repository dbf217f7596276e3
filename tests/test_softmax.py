"""Losses of rows against torch's functions and their definitions under float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DOUBLE, TOLERANCE, logits
from row_cases import ROW_LOSSES, RowLoss, cut_rows
from torch import Tensor

N, C = 6, 7
REDUCTIONS = ("none", "sum", "mean", "batchmean")
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "weight": {"weight": torch.linspace(0.1, 2, C, dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.3},
    "sample-weight": {"sample_weight": torch.linspace(0, 2, N, dtype=torch.float64)},
    "normalizer": {"normalizer": 3.5},
    "all": {
        "weight": torch.linspace(0.1, 2, C, dtype=torch.float64),
        "label_smoothing": 0.1,
        "sample_weight": torch.linspace(0.5, 2, N, dtype=torch.float64),
        "normalizer": torch.tensor(7.25),
        "ignore_index": 2,
    },
}


def call(loss: RowLoss, which: str, x: Tensor, others: list[Any], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The value and all gradients, for an upstream that differs from element to element."""
    leaves = [x, *(o for o in others if o.requires_grad)]
    found = getattr(loss, which)(x, *others, **options)
    upstream = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype, device=found.device).reshape(found.shape)
    return found.detach(), *torch.autograd.grad(found, leaves, upstream)


def data(
    loss: RowLoss, rows: int, classes: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor]]:
    others = [o.to(dtype) if o.is_floating_point() else o for o in loss.second(rows, classes, device)]
    if loss.both:
        others[0].requires_grad_()
    return logits(rows, classes, device=device, dtype=dtype), others


def of_device(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


CASES = [
    (name, option, reduction)
    for name, loss in ROW_LOSSES.items()
    for option, given in OPTIONS.items()
    for reduction in (REDUCTIONS if option in ("none", "all") else ("mean",))
    if (set(given) <= set(loss.takes) or option == "all") and not (reduction == "none" and "normalizer" in given)
]


@pytest.mark.parametrize(("name", "option", "reduction"), CASES)
def test_options_and_reductions(name: str, option: str, reduction: str, backend: str, device: torch.device) -> None:
    loss = ROW_LOSSES[name]
    x, others = data(loss, N, C, device)
    given = {key: value for key, value in OPTIONS[option].items() if key in loss.takes}
    if "ignore_index" in given:
        others = [o if o.is_floating_point() else torch.where(o == -100, given["ignore_index"], o) for o in others]
    options = of_device({**given, **loss.options_of(C), "reduction": reduction}, device)
    found = call(loss, "function", x, others, {**options, "backend": backend})
    torch.testing.assert_close(found, call(loss, "oracle", x, others, options), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_dtypes(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The gradient is rounded once; a reduced loss is float32, but for torch's own function."""
    loss = ROW_LOSSES[name]
    x, others = data(loss, N, C, device, dtype)
    options = of_device(loss.options_of(C), device)
    value, *grads = call(loss, "function", x, others, {**options, "backend": backend})
    assert value.dtype == (dtype if name.startswith("ce") else torch.float32)
    assert {grad.dtype for grad in grads} == {dtype}
    exact = [o.detach().double().requires_grad_(o.requires_grad) if o.is_floating_point() else o for o in others]
    true_value, *true_grads = call(loss, "oracle", x.detach().double().requires_grad_(), exact, options)
    # What cancels, as p - q does, leaves the absolute accuracy of its parts.
    close = {"rtol": TOLERANCE[dtype]["rtol"], "atol": 2e-7 if dtype == torch.float32 else 1e-4}
    torch.testing.assert_close([grad.double() for grad in grads], true_grads, **close)
    torch.testing.assert_close(value.double(), true_value, **close)


# Rows of one class, several to a tile, one a tile; and cut into tiles, of which the last is full or not.
SIZES = {"one class": (3, 1), "two": (9, 2), "several rows": (20, 100), "aligned": (2, 2048), "one row": (3, 1500)}
CUT = {"cut": (3, 70), "cut evenly": (3, 64), "cut in two": (3, 17)}


@pytest.mark.parametrize("size", [*SIZES, *CUT])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_sizes(name: str, size: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    rows, classes = (SIZES | CUT)[size]
    if size in CUT:
        cut_rows(monkeypatch, longest=16, tile=32)  # of 4, 8 or 16 in float64
    loss = ROW_LOSSES[name]
    if name.startswith("margin"):
        classes += 1  # a margin needs two scores
    x, others = data(loss, rows, classes, device)
    options = of_device(loss.options_of(classes), device)
    found = call(loss, "function", x, others, {**options, "backend": "triton"})
    if classes == 1 and options.get("gamma") == 0.5:  # of the root of 0, autograd has no derivative
        expected = tuple(torch.zeros_like(tensor) for tensor in found)
    else:
        expected = call(loss, "oracle", x, others, options)
    torch.testing.assert_close(found, expected, **DOUBLE)


@pytest.mark.parametrize("size", ["two", "cut"])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_gradcheck(name: str, size: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the gradient of the gradient, and of the second logits."""
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    rows, classes = (3, 2)
    if size == "cut":
        rows, classes = (2, 9)
        cut_rows(monkeypatch, longest=4, tile=16)
    loss = ROW_LOSSES[name]
    x, others = data(loss, rows, classes, device)
    options = of_device(loss.options_of(classes), device)

    def ours(*given: Tensor) -> Tensor:
        found: Tensor = loss.function(*given, backend="triton", reduction="none", **options)
        return found

    leaves = (x, *others)
    # Rows in tiles are slow in the interpreter; test_sizes compares each of their derivatives with the oracle's.
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=size == "cut")
    assert torch.autograd.gradgradcheck(ours, leaves, fast_mode=True)
