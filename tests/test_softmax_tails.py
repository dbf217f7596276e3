"""The losses of rows far from 0, against mpmath: no clamp, no eps, no dead zone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import TOLERANCE, uniform
from row_cases import cut_rows
from row_exact import (
    TAILS,
    Exact,
    check,
    exact_cross_entropy,
    exact_distillation,
    exact_js,
    exact_poly,
    exact_r_drop,
    exact_rows,
    hot,
    limits,
    losses_and_grads,
    of_torch,
    relative_error,
)
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf

INF = math.inf


@pytest.fixture(params=["triton", "eager", "eager in blocks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the interpreter, many rows to a tile save time."""
    if request.param == "triton":
        cut_rows(monkeypatch, rows=32)
    elif request.param == "eager in blocks":
        monkeypatch.setattr("bertloss_fast.ops.softmax._SMALL", 0)
    return str(request.param.split()[0])


# By how much the label is above the others, or one other above it: also around where softplus and the series of a
# fast logarithm change over, and where 1 - p is 0 in bf16, fp32 and fp64.
MARGINS = [0.0, 1e-3, 0.1, 1.0, 3.45, 6.0, 9.0, 13.0, 16.5, 17.4, 20.0, 24.0, 30.0, 36.7, 40.0, 52.0, 67.0, 80.0]
CLASSES = 5
TIES = [
    [0.0] * CLASSES,
    [-7.5] * CLASSES,
    [20.0] * CLASSES,
    [3.0, 3.0, -3.0, 3.0, -90.0],
    [-80.0, -80.0, 5.0, 5.0, 5.0],
]


@functools.cache
def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits that the dtype can hold, and the class of each row."""
    made = []
    below = uniform(len(MARGINS), 6, CLASSES, device=torch.device("cpu")) / 2
    for margin, jitter in zip(MARGINS, below, strict=True):
        for i, top in enumerate((margin / 2, 0.0, 80.0)):
            for j, sure in enumerate((True, False)):
                row = top - margin - jitter[2 * i + j]
                label = (len(made) + j) % CLASSES
                row[label] = top if sure else top - margin
                if not sure:
                    row[(label + 1) % CLASSES] = top
                made.append((row.tolist(), label))
    made += [(row, i % CLASSES) for i, row in enumerate(TIES)]
    x = torch.tensor([row for row, _ in made], dtype=torch.float64).to(dtype)
    return x, torch.tensor([label for _, label in made])


@functools.cache
def exact_tail(loss: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = rows(dtype)
    return exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist())


@pytest.mark.parametrize("loss", TAILS)
def test_fp32(loss: str, backend: str, device: torch.device) -> None:
    function, _, integer = TAILS[loss]
    x, y = rows(torch.float32)
    found = losses_and_grads(lambda leaf: function(leaf, y.to(device), reduction="none", backend=backend), x.to(device))
    if of_torch(loss, x.dtype, backend, device):
        theirs = losses_and_grads(lambda leaf: F.cross_entropy(leaf, y, reduction="none"), x)
        torch.testing.assert_close(found, theirs, **TOLERANCE[x.dtype])
        return
    check(found, exact_tail(loss, x.dtype), limits(x, integer, backend), (None, None))


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.bfloat16, "none"), (torch.float16, "sum")])
@pytest.mark.parametrize("loss", TAILS)
def test_16_bits(loss: str, dtype: torch.dtype, reduction: str, backend: str, device: torch.device) -> None:
    """What is left of 1 at the label is rounded once, and is not what two roundings leave, 0."""
    x, y = rows(dtype)
    leaf = x.to(device).requires_grad_()
    values = TAILS[loss].function(leaf, y.to(device), reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    true_loss, true_grad = exact_tail(loss, dtype)
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert relative_error(grad, true_grad).max() <= limit
    if reduction == "none":
        assert relative_error(values.detach(), true_loss).max() <= limit
    if dtype == torch.bfloat16 and loss.startswith("ce"):
        assert grad.count_nonzero() == true_grad.abs().ge(torch.finfo(dtype).tiny).sum()


SOFT = {
    "ce": (bf.cross_entropy, exact_cross_entropy),
    "poly": (bf.poly_cross_entropy, functools.partial(exact_poly, epsilon=2.0)),
}


@pytest.mark.parametrize("target", ["smoothed", "probabilities"])
@pytest.mark.parametrize("loss", SOFT)
def test_soft_targets_in_fp32(loss: str, target: str, backend: str, device: torch.device) -> None:
    """The gradient passes through 0, so that its error is held against the two parts of it."""
    function, exact = SOFT[loss]
    x, y = rows(torch.float32)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    if target == "smoothed":
        shares = hot(x.double(), y) * 0.9 + 0.1 / CLASSES
        found = losses_and_grads(
            lambda leaf: function(leaf, y.to(device), label_smoothing=0.1, **options), x.to(device)
        )
    else:
        shares = x.double().roll(1, 0).softmax(-1).float().double()
        found = losses_and_grads(lambda leaf: function(leaf, shares.float().to(device), **options), x.to(device))
    true = exact_rows(exact, x.tolist(), shares.tolist())
    check(found, true, limits(x, True, backend), (None, 3 * (x.double().softmax(-1) + shares)))


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Exact], bool, int]] = {
    "distillation": (bf.distillation_loss, exact_distillation, True, 1),
    "distillation-alone": (bf.distillation_loss, lambda x, z: exact_distillation(x, z, None), False, 1),
    "r-drop": (bf.r_drop_loss, exact_r_drop, True, 2),
    "js": (bf.js_div_loss, exact_js, False, 2),
}


def found_and_exact(
    loss: str, x: Tensor, z: Tensor, y: Tensor, backend: str, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Losses and gradients of two rows of logits, in float64."""
    function, exact, with_classes, trained = PAIRS[loss]
    classes = [y.to(device)] if with_classes else []
    leaves = [x.to(device), z.to(device)]
    constants = leaves[trained:]
    found = losses_and_grads(
        lambda *given: function(*given, *constants, *classes, reduction="none", backend=backend), *leaves[:trained]
    )
    true = exact_rows(exact, x.tolist(), z.tolist(), *([hot(x, y).tolist()] if with_classes else []))
    return tuple(value.double().cpu() for value in found), true


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("loss", PAIRS)
def test_pairs_in_fp32(loss: str, near: bool, backend: str, device: torch.device) -> None:
    """A difference of probabilities, or of their logarithms, is as accurate as these."""
    x, y = rows(torch.float32)
    z = x + uniform(*x.shape, device=torch.device("cpu"), seed=3).float() if near else x.roll(7, 0).roll(2, 1)
    found, true = found_and_exact(loss, x, z, y, backend, device)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-6)


# One logit in each row is what the name says, or several are; the label is the third.
INFINITE: dict[str, list[float]] = {
    "one": [1.0, -INF, 2.0, 0.5],
    "all but the label": [-INF, -INF, 2.0, -INF],
    "all but one other": [-INF, 3.0, 2.0, -INF],
    "the label": [1.0, 0.0, -INF, 0.5],
    "the label and one": [-INF, 0.0, -INF, 0.5],
    "all but one, which is not the label": [-INF, 1.0, -INF, -INF],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", TAILS)
def test_infinite_logits(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """What the limit gives: no loss, or an infinite one with a finite gradient."""
    x, y = torch.tensor(list(INFINITE.values()), dtype=dtype), torch.full((len(INFINITE),), 2)
    found = losses_and_grads(
        lambda leaf: TAILS[loss].function(leaf, y.to(device), reduction="none", backend=backend), x.to(device)
    )
    true = exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist())
    assert true[0].isinf().sum() == 3
    torch.testing.assert_close([value.double().cpu() for value in found], list(true), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["both", "the second", "the first"])
@pytest.mark.parametrize("loss", PAIRS)
def test_infinite_logits_of_pairs(
    loss: str, hidden: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """In both alike, as a mask makes them, or in one alone: a class that p lacks is infinitely far for q, but in JS."""
    masked = torch.tensor(list(INFINITE.values()), dtype=dtype)
    whole = masked.nan_to_num(neginf=-3.0).roll(1, 1)
    x, z = (masked, whole) if hidden == "the first" else (whole, masked)
    if hidden == "both":
        x = torch.where(masked == -INF, -INF, whole)
    found, true = found_and_exact(loss, x, z, torch.full((len(x),), 2), backend, device)
    if loss == "r-drop" and hidden != "both":  # its gradient is infinite as well
        assert found[0].isinf().all()
        return
    tolerance = {"rtol": TOLERANCE[dtype]["rtol"], "atol": {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)}
    torch.testing.assert_close(found, true, **tolerance)


@pytest.mark.parametrize("loss", [*TAILS, *PAIRS])
def test_a_row_of_nothing_has_no_loss(loss: str, backend: str, device: torch.device) -> None:
    """Of a row of -inf alone torch makes NaN, as do we; its neighbours keep theirs."""
    x = torch.tensor([[0.5, 1.0, -2.0], [-INF] * 3, [1.0, 0.0, 3.0]], device=device).requires_grad_()
    y = torch.tensor([0, 1, 2], device=device)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    if loss in TAILS:
        losses = TAILS[loss].function(x, y, **options)
    else:
        losses = PAIRS[loss][0](x, x.detach().nan_to_num(neginf=0.0), *([y] if PAIRS[loss][2] else []), **options)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isnan().tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
    assert not grad[1].isfinite().all()


@pytest.mark.parametrize("hidden", ["first", "in the middle", "last", "all but the last tile"])
@pytest.mark.parametrize("loss", [*TAILS, *PAIRS])
def test_tiles_of_infinite_logits(
    loss: str, hidden: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in tiles of 32, of which some have nothing but -inf; the label is among what is left."""
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    cut_rows(monkeypatch, longest=16, tile=32)
    first, last = {"first": (0, 40), "in the middle": (30, 70), "last": (60, 80), "all but the last tile": (0, 64)}[
        hidden
    ]
    x, z = (20 * uniform(2, 80, device=torch.device("cpu"), seed=seed).float() - 10 for seed in (1, 2))
    x[:, first:last] = z[:, first:last] = -INF
    y = torch.tensor([20, 29] if first else [70, 79])
    if loss in PAIRS:
        found, true = found_and_exact(loss, x, z, y, "triton", device)
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
        return
    call = functools.partial(TAILS[loss].function, reduction="none", backend="triton")
    found = losses_and_grads(lambda leaf: call(leaf, y.to(device)), x.to(device))
    check(
        found,
        exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist()),
        limits(x.clamp_min(0), False, "triton"),
        (None, None),
    )
