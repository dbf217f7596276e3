"""ZLPR and two-way: values and gradients against their definitions, and against timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from cases import DOUBLE, LABELS, TARGETS, TOLERANCE, logits, to, uniform, value_and_grad
from test_imbalance import timm_file
from torch import Tensor
from torch.nn.functional import softplus

import bertloss_fast as bf


def hard(targets: Tensor | bf.SparseLabels, shape: torch.Size) -> Tensor:
    if isinstance(targets, bf.SparseLabels) or targets.layout == torch.sparse_csr:
        targets = targets.to_dense().reshape(shape)
    return targets > 0.5


def zlpr(
    x: Tensor,
    targets: Tensor | bf.SparseLabels,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The definition, row by row, over the elements that count."""
    positive = hard(targets, x.shape)
    kept = torch.ones_like(positive) if mask is None else mask
    if ignore_index is not None:
        kept = kept & (targets != ignore_index)
    losses = []
    for row, is_positive, counts in zip(x, positive, kept, strict=True):
        negatives, positives = row[counts & ~is_positive], row[counts & is_positive]
        losses.append(torch.log1p(negatives.exp().sum()) + torch.log1p((-positives).exp().sum()))
    loss = torch.stack(losses)
    if sample_weight is not None:
        loss = loss * sample_weight
    if reduction == "none":
        return loss
    rows = max(int(kept.any(1).sum()), 1)
    count = {"sum": 1, "mean": rows, "batchmean": rows, "mean_positive": max(int((positive & kept).sum()), 1)}
    return loss.sum() / (count[reduction] if normalizer is None else normalizer)


def two_way(
    x: Tensor,
    targets: Tensor | bf.SparseLabels,
    tp: float = 4.0,
    tn: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """The definition, line by line: rows, and then columns."""
    positive = hard(targets, x.shape)
    kept = torch.ones_like(positive) if mask is None else mask
    if ignore_index is not None:
        kept = kept & (targets != ignore_index)
    total = 0 * x.sum()
    for values, is_positive, counts in ((x, positive, kept), (x.T, positive.T, kept.T)):
        losses = []
        for line, p, k in zip(values, is_positive, counts, strict=True):
            if (p & k).any() and (~p & k).any():
                hardest = tp * torch.logsumexp(-line[p & k] / tp, 0) + tn * torch.logsumexp(line[~p & k] / tn, 0)
                losses.append(softplus(hardest, threshold=40))
        lines = int((is_positive & counts).any(1).sum())
        total = total + (torch.stack(losses).sum() if losses else 0.0) / max(lines, 1)
    return total


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "zlpr": (bf.zlpr_loss, zlpr, {}),
    "two-way": (bf.two_way_loss, two_way, {}),
    "two-way-scaled": (bf.two_way_loss, two_way, {"tp": 2.0, "tn": 0.5}),
}
MASK = torch.arange(5 * LABELS).reshape(5, LABELS) % 3 > 0
MASK[1] = False


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_definition(loss: str, target: str, masked: bool, backend: str, device: torch.device) -> None:
    function, oracle, options = LOSSES[loss]
    options = to({**options, "mask": MASK} if masked else options, device)
    x = logits(5, LABELS, device=device)
    y = TARGETS[target](uniform(5, LABELS, device=device))
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
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_and_dtypes(loss: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    function, oracle, options = LOSSES[loss]
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


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = LOSSES[loss]
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


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("scale", [0.1, 5.0, 25.0, 80.0])
def test_tails_of_zlpr(scale: float, positive: bool, backend: str, device: torch.device) -> None:
    """Rows of one class, right and wrong, against mpmath."""
    for sign in (-1, 1):
        x = torch.tensor([[sign * scale, sign * scale * 0.7, sign * scale * 0.9]])
        v = [-value if positive else value for value in x[0].tolist()]
        with mpmath.workdps(60):
            total = mpmath.fsum(mpmath.exp(value) for value in v)
            true_loss, true_slopes = mpmath.log(1 + total), [mpmath.exp(value) / (1 + total) for value in v]
        leaf = x.to(device).requires_grad_()
        y = torch.full_like(leaf, positive).bool()
        value, grad = value_and_grad(bf.zlpr_loss(leaf, y, backend=backend), leaf)
        limit = 2e-6 if scale <= 20 else 1e-5
        assert abs(float(value) / float(true_loss) - 1) <= limit
        for ours, slope in zip(grad[0].tolist(), true_slopes, strict=True):
            assert abs(ours / float(-slope if positive else slope) - 1) <= limit


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_that_counts(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = LOSSES[loss]
    x = logits(4, LABELS, device=device)
    ignored = torch.full((4, LABELS), -100, device=device)
    empty = torch.empty(0, LABELS, device=device, requires_grad=True)
    for inputs, targets, ignoring in ((x, ignored, {"ignore_index": -100}), (empty, empty.detach().bool(), {})):
        value, grad = value_and_grad(function(inputs, targets, backend=backend, **options, **ignoring), inputs)
        assert value == 0
        assert grad.shape == inputs.shape
        assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_repetition_second_backward_and_sparse_twins(loss: str, backend: str, device: torch.device) -> None:
    function, _, options = LOSSES[loss]
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
    "cold two-way": (bf.two_way_loss, {"tp": 0.0}, ValueError, "tp: .*0"),
    "smoothed zlpr": (bf.zlpr_loss, {"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    "weighted zlpr": (bf.zlpr_loss, {"pos_weight": Y[0]}, TypeError, "pos_weight"),
    "normalised rows": (bf.zlpr_loss, {"reduction": "none", "normalizer": 2}, ValueError, "normalizer: .*none"),
    "mask of another shape": (bf.zlpr_loss, {"mask": Y[:1].bool()}, ValueError, r"mask: .*\(4, 5\).*\(1, 5\)"),
    "rows of another number": (bf.zlpr_loss, {"sample_weight": Y[0]}, ValueError, r"sample_weight: .*\(4,\).*\(5,\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    function, options, error, sentence = ERRORS[case]
    with pytest.raises(error, match=sentence):
        function(X, Y, **options)
