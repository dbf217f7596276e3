"""The losses of rows of 1 to 131073 classes, sure and wrong ones: against mpmath, or float64 where they are long."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import row_oracles
import torch
from cases import uniform
from row_exact import (
    TAILS,
    Exact,
    check,
    counts,
    exact_cross_entropy,
    exact_distillation,
    exact_focal,
    exact_js,
    exact_poly,
    exact_r_drop,
    exact_rows,
    hot,
    limits,
    losses_and_grads,
    of_torch,
)
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf


class Sized(NamedTuple):
    """A loss for rows of any length."""

    function: Callable[..., Any]
    oracle: Callable[..., Tensor]
    exact: Callable[..., Exact]
    with_other: bool = False
    with_classes: bool = True


SIZED = {
    "ce": Sized(bf.cross_entropy, row_oracles.cross_entropy, exact_cross_entropy),
    "ce-one-hot": Sized(TAILS["ce-one-hot"].function, row_oracles.cross_entropy, exact_cross_entropy),
    "focal": Sized(bf.softmax_focal_loss, row_oracles.softmax_focal, functools.partial(exact_focal, gamma=2.0)),
    "poly": Sized(bf.poly_cross_entropy, row_oracles.poly, functools.partial(exact_poly, epsilon=2.0)),
    "ldam": Sized(
        TAILS["ldam"].function,
        lambda x, y, **options: row_oracles.ldam(x, y, counts(x.shape[-1]), scale=1.0, **options),
        TAILS["ldam"].exact,
    ),
    "distillation": Sized(bf.distillation_loss, row_oracles.distillation, exact_distillation, with_other=True),
    "r-drop": Sized(bf.r_drop_loss, row_oracles.r_drop, exact_r_drop, with_other=True),
    "js": Sized(bf.js_div_loss, row_oracles.js, exact_js, with_other=True, with_classes=False),
}


# One tile of many rows, of several, and of one; several tiles, of which the last is not full.
SIZES = [1, 2, 3, 127, 128, 1000, 30522, 32768, 50257, 131073]


SOME_SIZES = [1, 2, 128, 1000, 32768]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    ("loss", "classes"),
    [(loss, size) for loss in SIZED for size in (SIZES if loss in ("ce", "focal") else SOME_SIZES)],
)
def test_numbers_of_classes(
    loss: str, classes: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sure row and a wrong one; of many classes, float64 is the oracle, where even the sure one is not very sure."""
    monkeypatch.setattr("bertloss_fast.ops.softmax._SMALL", 0)
    function, oracle, exact, with_other, with_classes = SIZED[loss]
    y = torch.tensor([classes // 2, classes - 1])
    x, z = (28 * uniform(2, classes, device=torch.device("cpu"), seed=seed).float() for seed in (1, 2))
    x[0], z[1] = x[0] - 20, z[1] - 20
    x[1], z[0] = x[1] - 8, z[0] - 8
    x[[0, 1], y] = torch.tensor([20.0, -20.0])
    given, constants = [x, z] if with_other else [x], [y] if with_classes else []
    trained = given if loss in ("r-drop", "js") else given[:1]
    others = [tensor.to(device) for tensor in (*given[len(trained) :], *constants)]
    found = losses_and_grads(
        lambda *leaves: function(*leaves, *others, reduction="none", backend=backend),
        *(tensor.to(device) for tensor in trained),
    )
    if classes <= 128:
        hots = [hot(x, y).tolist()] if with_classes else []
        true = exact_rows(exact, *(tensor.tolist() for tensor in given), *hots)
    else:
        rest = [*(tensor.double() for tensor in given[len(trained) :]), *constants]
        true = losses_and_grads(
            lambda *leaves: oracle(*leaves, *rest, reduction="none"), *(tensor.double() for tensor in trained)
        )
    if of_torch(loss, x.dtype, backend, device):
        torch.testing.assert_close(found, losses_and_grads(lambda leaf: F.cross_entropy(leaf, y, reduction="none"), x))
    elif with_other:
        # To 131072 small numbers, one after another, torch's log_softmax adds 1.
        rtol, atol = (1e-5, 1e-6) if backend == "triton" or classes <= 1000 else (1e-4, 1e-4)
        torch.testing.assert_close([value.double().cpu() for value in found], list(true), rtol=rtol, atol=atol)
    else:
        check(found, true, limits(x, True, backend), (None,) * len(true))
