"""ZLPR and two-way at their edges: tails against mpmath, infinities, every route through autograd, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import pytest
import torch
from cases import DOUBLE, ROWWISE, TOLERANCE, logits, uniform, value_and_grad
from test_rowwise import zlpr
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="Triton has no wheels outside Linux")

from bertloss_fast.kernels import parts

import bertloss_fast as bf
from bertloss_fast.ops.autograd import _Loss

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["triton", "triton in parts", "triton, few programs", "eager", "eager in blocks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows longer than a tile, lines of many parts, several chunks and blocks of rows, all in small.

    Few programs go through their tiles, parts and lines in turns.
    """
    if request.param == "triton in parts":
        monkeypatch.setattr("bertloss_fast.kernels.rowwise._LONGEST", 0)
        for name, value in {"_ROW_TILE": 8, "_TILE": 16, "_WIDTH": 4, "_SHORTEST_CHUNK": 4, "_MAX_PROGRAMS": 2}.items():
            monkeypatch.setattr(f"bertloss_fast.kernels.parts.{name}", value)
        for name in ("_LINES", "_PARTS"):
            monkeypatch.setattr(f"bertloss_fast.kernels.combine.{name}", 2)
    if request.param == "triton, few programs":
        monkeypatch.setattr("bertloss_fast.kernels.rowwise._MAX_PROGRAMS", 2)
        monkeypatch.setattr("bertloss_fast.kernels.rowwise._MOST_ROWS", 1)
    if request.param == "eager in blocks":
        monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    return str(request.param).split(",")[0].split()[0]


def exact_sum(values: Sequence[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.fsum(mpmath.exp(value) for value in values)


def exact_zlpr(x: list[list[float]], y: list[list[bool]]) -> tuple[list[Any], list[list[Any]]]:
    """The loss of each row, and the gradient of their sum."""
    losses, slopes = [], []
    for row, labels in zip(x, y, strict=True):
        negative = 1 + exact_sum([mpmath.mpf(v) for v, label in zip(row, labels, strict=True) if not label])
        positive = 1 + exact_sum([-mpmath.mpf(v) for v, label in zip(row, labels, strict=True) if label])
        losses.append(mpmath.log(negative) + mpmath.log(positive))
        slopes.append(
            [
                -mpmath.exp(-mpmath.mpf(v)) / positive if label else mpmath.exp(v) / negative
                for v, label in zip(row, labels, strict=True)
            ]
        )
    return losses, slopes


def exact_two_way(x: list[list[float]], y: list[list[bool]]) -> tuple[list[Any], list[list[Any]]]:
    """The loss and its gradient, for tp = 4 and tn = 1."""
    rows, cols = range(len(x)), range(len(x[0]))
    slopes = [[mpmath.mpf(0) for _ in cols] for _ in rows]
    total = mpmath.mpf(0)
    for lines in ([[(i, j) for j in cols] for i in rows], [[(i, j) for i in rows] for j in cols]):
        with_label = max(sum(any(y[i][j] for i, j in line) for line in lines), 1)
        for line in lines:
            negative = exact_sum([mpmath.mpf(x[i][j]) for i, j in line if not y[i][j]])
            positive = exact_sum([-mpmath.mpf(x[i][j]) / 4 for i, j in line if y[i][j]])
            odds = negative * positive**4
            total += mpmath.log(1 + odds) / with_label
            for i, j in line:
                if odds and y[i][j]:
                    slopes[i][j] -= odds / (1 + odds) * mpmath.exp(-mpmath.mpf(x[i][j]) / 4) / positive / with_label
                elif odds:
                    slopes[i][j] += odds / (1 + odds) * mpmath.exp(x[i][j]) / negative / with_label
    return [total], slopes


def relative_error(ours: Tensor, true: Tensor) -> float:
    """Where the true value is a normal number of fp32; elsewhere nothing is promised."""
    normal = (true.abs() >= torch.finfo(torch.float32).tiny) & (true.abs() <= torch.finfo(torch.float32).max)
    assert normal.any()
    return float(((ours.double().cpu() - true).abs() / true.abs())[normal].max())


# Where the logits lie. In each line, the greatest of a class is what the others are taken relative to.
REGIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "both signs": lambda u: 40 * u - 20,
    "around 0": lambda u: 2 * u - 1,
    "high": lambda u: 20 - u,
    "far apart": lambda u: torch.where(u > 0.5, 19 + u, -19 - u),
    "wide": lambda u: 160 * u - 80,
    "very low": lambda u: -80 + 30 * u,
    "very high": lambda u: 80 - 30 * u,
}


@pytest.mark.parametrize("labels", ["some", "none", "all"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("loss", ["zlpr", "two-way"])
def test_tails_in_fp32(loss: str, regime: str, labels: str, backend: str, device: torch.device) -> None:
    x = REGIMES[regime](uniform(4, 11, device=device)).float()
    y = uniform(4, 11, device=device, seed=2) < {"some": 0.4, "none": 0.0, "all": 1.0}[labels]
    function, exact = (bf.zlpr_loss, exact_zlpr) if loss == "zlpr" else (bf.two_way_loss, exact_two_way)
    with mpmath.workdps(60):
        losses, slopes = exact(x.tolist(), y.tolist())
        true_losses = torch.tensor([float(value) for value in losses], dtype=torch.float64)
        true_grad = torch.tensor([[float(value) for value in row] for row in slopes], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    value = function(leaf, y, backend=backend, **({"reduction": "none"} if loss == "zlpr" else {}))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    if loss == "two-way" and labels != "some":
        assert value == 0
        assert not grad.any()
        return
    limit = 2e-6 if x.abs().max() <= 20 else 1e-5
    assert relative_error(value.detach().reshape(-1), true_losses) <= limit
    assert relative_error(grad, true_grad) <= limit


# logits, labels, loss, gradient: what the limit gives
LIMITS = {
    "wrong": ([INF, 0.0], [0, 1], INF, [1.0, -0.5]),
    "a wrong positive": ([-INF, 0.0], [1, 0], INF, [-1.0, 0.5]),
    "right": ([-INF, 0.0], [0, 1], math.log(2), [0.0, -0.5]),
    "a right positive": ([INF, 0.0], [1, 0], math.log(2), [0.0, 0.5]),
    "two wrong": ([INF, INF, 3.0, 0.0], [0, 0, 0, 1], INF, [0.5, 0.5, 0.0, -0.5]),
    "all right": ([-INF, INF], [0, 1], 0.0, [0.0, 0.0]),
    "large": ([2.0**124, -(2.0**124), 2.0**99], [0, 1, 0], 2.0**125, [1.0, -1.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LIMITS)
def test_limits_of_zlpr(case: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, y, loss, grad = LIMITS[case]
    leaf = torch.tensor([x], device=device, dtype=dtype).requires_grad_()
    ours = value_and_grad(bf.zlpr_loss(leaf, torch.tensor([y], device=device), backend=backend), leaf)
    value = torch.tensor(loss, dtype=torch.promote_types(dtype, torch.float32), device=device)
    true_grad = torch.tensor([grad], dtype=dtype, device=device)
    torch.testing.assert_close(ours[0], value, **TOLERANCE[value.dtype])
    torch.testing.assert_close(ours[1], true_grad, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_limits_of_two_way(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """A wrong infinity has an infinite loss and a finite gradient, a right one none; a line of right ones, no loss."""
    y = torch.tensor([[1, 0, 0], [0, 1, 0]], device=device, dtype=torch.bool)
    right = torch.where(y, INF, -INF).to(dtype).requires_grad_()
    value, grad = value_and_grad(bf.two_way_loss(right, y, backend=backend), right)
    assert value == 0
    assert not grad.any()
    wrong = torch.tensor([[0.0, INF, 0.0], [0.0, 0.0, -INF]], dtype=dtype, device=device).requires_grad_()
    value, grad = value_and_grad(bf.two_way_loss(wrong, y, backend=backend), wrong)
    assert value == INF
    assert grad.isfinite().all()
    assert grad[0, 1] == 1  # one half from the rows' mean, and one from the columns'
    assert grad[1, 2] == 0
    value, grad = value_and_grad(bf.two_way_loss(wrong, y & False, backend=backend), wrong)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("loss", ROWWISE)
def test_missing_logits(loss: str, backend: str, device: torch.device) -> None:
    """NaN gives NaN, in its lines only; what does not count is no source of it, and has the gradient 0."""
    function, oracle, options = ROWWISE[loss]
    x, y = logits(6, 9, device=device).detach(), uniform(6, 9, device=device) < 0.4
    x[2, 3] = NAN
    mask = ~x.isnan() & (uniform(6, 9, device=device, seed=5) < 0.8)
    value, grad = value_and_grad(function(x.requires_grad_(), y, mask=mask, backend=backend, **options), x)
    known = x.detach().nan_to_num().requires_grad_()
    torch.testing.assert_close((value, grad), value_and_grad(oracle(known, y, mask=mask, **options), known), **DOUBLE)
    assert not grad[~mask].any()
    value, grad = value_and_grad(function(x, y, backend=backend, **options), x)
    assert value.isnan()
    assert grad[2, 3].isnan()
    assert grad[[0, 1, 3, 4, 5]][:, [0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0, -3.0, INF, NAN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", ["zlpr", "two-way"])
def test_upstream_gradients(loss: str, dtype: torch.dtype, upstream: float, backend: str, device: torch.device) -> None:
    function, oracle, _ = ROWWISE[loss]
    x, y = logits(6, 9, device=device, dtype=dtype), uniform(6, 9, device=device) < 0.4
    exact = x.detach().double().requires_grad_()
    value = function(x, y, backend=backend)
    (grad,) = torch.autograd.grad(value, x, torch.tensor(upstream, dtype=value.dtype, device=device))
    (true_grad,) = torch.autograd.grad(oracle(exact, y), exact)
    torch.testing.assert_close(grad, (true_grad * upstream).to(dtype), **TOLERANCE[dtype], equal_nan=True)


def test_expanded_and_strided_upstream(backend: str, device: torch.device) -> None:
    x, y = logits(2, 3, 9, device=device), uniform(2, 3, 9, device=device) < 0.4
    flat, labels = x.detach().reshape(6, 9).requires_grad_(), y.reshape(6, 9)
    number = torch.tensor(0.3, dtype=torch.float64, device=device)
    for upstream in (number.expand(2, 3), uniform(3, 2, device=device).T, uniform(3, device=device).expand(2, 3)):
        ours = value_and_grad(bf.zlpr_loss(x, y, "none", backend=backend), x, upstream)
        value, grad = value_and_grad(zlpr(flat, labels, "none"), flat, upstream.reshape(6))
        torch.testing.assert_close(ours, (value.reshape(2, 3), grad.reshape(2, 3, 9)), **DOUBLE)


@pytest.mark.parametrize("loss", ROWWISE)
def test_strides_and_leading_dimensions(loss: str, backend: str, device: torch.device) -> None:
    function, oracle, options = ROWWISE[loss]
    x = logits(9, 3, 2, device=device).detach().permute(2, 1, 0).requires_grad_()
    y = (uniform(9, 6, device=device) < 0.4).T.reshape(2, 3, 9)
    flat = x.detach().reshape(6, 9).requires_grad_()
    value, grad = value_and_grad(oracle(flat, y.reshape(6, 9), **options), flat)
    for targets in (y, y.int(), bf.SparseLabels.from_dense(y.reshape(6, 9))):
        ours = value_and_grad(function(x, targets, backend=backend, **options), x)
        torch.testing.assert_close(ours, (value, grad.reshape(2, 3, 9)), **DOUBLE)


@pytest.mark.parametrize("loss", ROWWISE)
def test_create_graph_and_batched_gradients(loss: str, backend: str, device: torch.device) -> None:
    function, oracle, options = ROWWISE[loss]
    x, y = logits(3, 5, device=device), uniform(3, 5, device=device) < 0.4
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64, device=device)
    results = []
    for call in (lambda z: function(z, y, backend=backend, **options), lambda z: oracle(z, y, **options)):
        z = 2 * x
        z.register_hook(lambda grad: 3 * grad)
        (grad,) = torch.autograd.grad(call(z), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        (batched,) = torch.autograd.grad(call(x), x, upstream, is_grads_batched=True)
        results.append((grad, second, batched))
    torch.testing.assert_close(*results, **DOUBLE)


class Allocations(TorchFunctionMode):
    """What a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []  # kept alive, so that no storage comes twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.results.append(result)
        return result


@pytest.mark.parametrize("target", ["bool", "sparse"])
@pytest.mark.parametrize("loss", ["zlpr", "two-way"])
def test_nothing_of_the_logits_size_but_the_gradient(loss: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU; what the kernels need beside it is in the next test."""
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    x, y = torch.randn(64, 50, requires_grad=True), torch.rand(64, 50) < 0.1
    labels = bf.SparseLabels.from_dense(y) if target == "sparse" else y
    with Allocations() as made:
        value = ROWWISE[loss][0](x, labels, backend="eager")
        with torch.no_grad():  # autograd would call it where the mode does not look
            _Loss.backward(value.grad_fn, torch.ones(()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made.results}
    large = [at for at, size in storages.items() if size >= x.nbytes / 4 and at not in (x.data_ptr(), y.data_ptr())]
    assert len(storages) > 64
    assert len(large) == 1


@pytest.mark.parametrize("shape", [(65536, 10000), (1024, 1000000)])
@pytest.mark.parametrize("columns", [False, True])
def test_partial_sums_are_small(columns: bool, shape: tuple[int, int]) -> None:
    num_rows, num_labels = shape
    cut = parts.cut(shape, columns=columns, compute_dtype=torch.float32)
    assert 5 * cut.strips * num_rows + 4 * columns * cut.chunks * num_labels <= num_rows * num_labels / 40
