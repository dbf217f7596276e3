"""Squared error and KL divergence against torch's own functions, in float64 under autograd."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DOUBLE, TOLERANCE, logits, uniform
from pointwise_cases import (
    CASES,
    FLOATING,
    LOSSES,
    MODULES,
    OPTIONS,
    REDUCTIONS,
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
