"""ZLPR and two-way: values and gradients against their definitions, and against timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DOUBLE, LABELS, ROWWISE, TARGETS, TOLERANCE, logits, to, uniform, value_and_grad
from oracles import timm_file, zlpr
from torch import Tensor

import bertloss_fast as bf

MASK = torch.arange(5 * LABELS).reshape(5, LABELS) % 3 > 0
MASK[1] = False


@pytest.mark.parametrize("counting", ["all", "unmasked", "not ignored"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", ROWWISE)
def test_equals_the_definition(loss: str, target: str, counting: str, backend: str, device: torch.device) -> None:
    function, oracle, options = ROWWISE[loss]
    options = to({**options, "mask": MASK} if counting == "unmasked" else options, device)
    x = logits(5, LABELS, device=device)
    y = TARGETS[target](uniform(5, LABELS, device=device))
    if counting == "not ignored":
        y = torch.where(MASK.to(device), TARGETS["int64"](uniform(5, LABELS, device=device)), -100)
        options = options | {"ignore_index": -100}
    upstream = torch.tensor(0.7, dtype=torch.float64, device=device)
    ours = value_and_grad(function(x, y, backend=backend, **options), x, upstream)
    torch.testing.assert_close(ours, value_and_grad(oracle(x, y, **options), x, upstream), **DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", "mean_positive"])
@pytest.mark.parametrize("target", ["int64", "float-hard", "sparse"])
def test_options_of_zlpr(target: str, reduction: str, backend: str, device: torch.device) -> None:
    y = TARGETS[target](uniform(5, LABELS, device=device))
    options = to({"reduction": reduction, "sample_weight": torch.linspace(0, 2, 5).double(), "mask": MASK}, device)
    if isinstance(y, Tensor):
        y = torch.where(uniform(5, LABELS, device=device, seed=4) < 0.2, -100, y)
        options["ignore_index"] = -100
    x = logits(5, LABELS, device=device)
    for normalizer in (None,) if reduction == "none" else (None, 3.5, torch.tensor(7, device=device)):
        upstream = torch.rand(5, dtype=torch.float64, device=device) if reduction == "none" else None
        ours = value_and_grad(bf.zlpr_loss(x, y, normalizer=normalizer, backend=backend, **options), x, upstream)
        theirs = value_and_grad(zlpr(x, y, normalizer=normalizer, **options), x, upstream)
        torch.testing.assert_close(ours, theirs, **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1001), (40, 33)])
@pytest.mark.parametrize("loss", ROWWISE)
def test_shapes_and_dtypes(loss: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    function, oracle, options = ROWWISE[loss]
    x = logits(*shape, device=device, dtype=dtype)
    y = uniform(*shape, device=device) < 0.3
    exact = x.detach().double().requires_grad_()
    true_value, true_grad = value_and_grad(oracle(exact, y, **options), exact)
    for backend in ("triton", "eager"):
        for targets in (y, bf.SparseLabels.from_dense(y)):
            value, grad = value_and_grad(function(x, targets, backend=backend, **options), x)
            torch.testing.assert_close(value, true_value.float(), rtol=1e-4 if dtype.itemsize == 2 else 1e-5, atol=1e-7)
            torch.testing.assert_close(grad, true_grad.to(dtype), **TOLERANCE[dtype])


def test_zlpr_of_rows_longer_than_a_block(device: torch.device) -> None:
    x, y = logits(1, 17000, device=device, dtype=torch.float32), uniform(1, 17000, device=device) < 0.3
    exact = x.detach().double().requires_grad_()
    ours = value_and_grad(bf.zlpr_loss(x, y, backend="triton"), x)
    value, grad = value_and_grad(zlpr(exact, y), exact)
    torch.testing.assert_close(ours, (value.float(), grad.float()), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("loss", ROWWISE)
def test_gradcheck(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = ROWWISE[loss]
    y = uniform(4, LABELS, device=device) < 0.4
    x = logits(4, LABELS, device=device)
    assert torch.autograd.gradcheck(lambda x: function(x, y, backend=backend, **options), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x, y, backend=backend, **options), x, fast_mode=True)


@pytest.mark.parametrize("file", ["zlpr_loss", "two_way_loss"])
def test_equals_timm(file: str, backend: str, device: torch.device) -> None:
    name = {"zlpr_loss": "ZlprLoss", "two_way_loss": "TwoWayLoss"}[file]
    x = logits(6, LABELS, device=device, dtype=torch.float32).detach().clamp(-15, 15).requires_grad_()
    y = uniform(6, LABELS, device=device).float()
    theirs = value_and_grad(getattr(timm_file(file), name)()(x, y), x)
    torch.testing.assert_close(
        value_and_grad(getattr(bf, name)(backend=backend)(x, y), x), theirs, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("loss", ROWWISE)
def test_nothing_that_counts(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = ROWWISE[loss]
    x = logits(4, LABELS, device=device)
    ignored = torch.full((4, LABELS), -100, device=device)
    empty = torch.empty(0, LABELS, device=device, requires_grad=True)
    for inputs, targets, ignoring in ((x, ignored, {"ignore_index": -100}), (empty, empty.detach().bool(), {})):
        value, grad = value_and_grad(function(inputs, targets, backend=backend, **options, **ignoring), inputs)
        assert value == 0
        assert grad.shape == inputs.shape
        assert not grad.any()


@pytest.mark.parametrize("loss", ROWWISE)
def test_repetition_second_backward_and_sparse_twins(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = ROWWISE[loss]
    x = logits(33, 101, device=device, dtype=torch.float32)
    y = uniform(33, 101, device=device) < 0.1
    runs = [value_and_grad(function(x, y, backend=backend, **options), x) for _ in range(3)]
    if backend == "eager" or device.type == "cpu":  # compiled, the two may add in another order
        runs.append(value_and_grad(function(x, bf.SparseLabels.from_dense(y), backend=backend, **options), x))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    value = function(x, y, backend=backend, **options)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    first.mul_(10)
    (second,) = torch.autograd.grad(value, x, 2 * torch.ones_like(value))
    torch.testing.assert_close(second, 2 * runs[0][1])


X, Y = torch.zeros(4, 5), torch.zeros(4, 5)
ERRORS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], type[Exception], str]] = {
    "sum of two-way": (bf.two_way_loss, {"reduction": "sum"}, ValueError, "reduction: .*mean.*sum"),
    "weighted two-way": (bf.two_way_loss, {"weight": Y}, TypeError, "weight"),
    "smoothed two-way": (bf.two_way_loss, {"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    "smoothed zlpr": (bf.zlpr_loss, {"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    "weighted zlpr": (bf.zlpr_loss, {"pos_weight": Y[0]}, TypeError, "pos_weight"),
    "cold two-way": (bf.two_way_loss, {"tp": 0.0}, ValueError, "tp: .*0"),
    "normalised rows": (bf.zlpr_loss, {"reduction": "none", "normalizer": 2}, ValueError, "normalizer: .*none"),
    "mask of another shape": (bf.zlpr_loss, {"mask": Y[:1].bool()}, ValueError, r"mask: .*\(4, 5\).*\(1, 5\)"),
    "rows of another number": (bf.zlpr_loss, {"sample_weight": Y[0]}, ValueError, r"sample_weight: .*\(4,\).*\(5,\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    function, options, error, sentence = ERRORS[case]
    with pytest.raises(error, match=sentence):
        function(X, Y, **options)


@pytest.mark.parametrize("loss", ROWWISE)
def test_offsets_past_32_bits(loss: str, backend: str, device: torch.device) -> None:
    """Three rows 2^30 elements apart; on the CPU, only the pages that they lie on take memory."""
    function, oracle, options = ROWWISE[loss]
    near = logits(3, 9, device=device, dtype=torch.bfloat16)
    x = torch.empty(2**31 + 9, dtype=torch.bfloat16, device=device).as_strided((3, 9), (2**30, 1)).copy_(near.detach())
    y = uniform(3, 9, device=device) < 0.4
    x.requires_grad_()
    ours = value_and_grad(function(x, y, backend=backend, **options), x)
    exact = near.detach().double().requires_grad_()
    value, grad = value_and_grad(oracle(exact, y, **options), exact)
    torch.testing.assert_close(ours, (value.float(), grad.bfloat16()), **TOLERANCE[torch.bfloat16])
