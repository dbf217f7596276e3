"""What a linear layer and its loss refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bertloss_fast as bf

X, W, Y = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, 5, dtype=torch.bool)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weight of other features": (
        lambda: bf.linear_binary_cross_entropy(X, W[:, :3], Y),
        ValueError,
        r"linear_weight: expected shape \(L, 4\), as long as the rows of input, got \(5, 3\)",
    ),
    "other labels": (
        lambda: bf.linear_binary_cross_entropy(X, W, Y[:, :4]),
        ValueError,
        r"target: expected shape \(3, 5\) like the logits, got \(3, 4\)",
    ),
    "other sparse labels": (
        lambda: bf.linear_sigmoid_focal_loss(X, W, bf.SparseLabels.from_lists([[0]] * 3, 6)),
        ValueError,
        r"target: expected shape \(3, 5\), the rows and labels of the logits, got \(3, 6\)",
    ),
    "no chunk": (
        lambda: bf.linear_sigmoid_focal_loss(X, W, Y, chunk_size=0),
        ValueError,
        "chunk_size: expected an integer > 0 or None, got 0",
    ),
    "half a chunk": (
        lambda: bf.linear_asymmetric_loss(X, W, Y, chunk_size=1.5),
        TypeError,
        "chunk_size: expected an integer > 0 or None, got float",
    ),
    "bias of other labels": (
        lambda: bf.linear_sigmoid_focal_loss(X, W, Y, linear_bias=torch.zeros(4)),
        ValueError,
        r"linear_bias: expected shape \(5,\)",
    ),
    "weight of another dtype": (
        lambda: bf.linear_sigmoid_focal_loss(X, W.double(), Y),
        TypeError,
        "linear_weight: expected float32 like input, got float64",
    ),
    "weight in three dimensions": (
        lambda: bf.linear_cross_entropy(X, W[None], torch.zeros(3, dtype=torch.long)),
        ValueError,
        r"linear_weight: expected shape \(L, D\), got \(1, 5, 4\)",
    ),
    "weight on another device": (
        lambda: bf.linear_sigmoid_focal_loss(X, W.to("meta"), Y),
        ValueError,
        "linear_weight: expected device 'cpu' like input, got 'meta'",
    ),
    "a class too many": (
        lambda: bf.linear_cross_entropy(X, W, torch.tensor([0, 5, 1])),
        ValueError,
        r"target: expected classes from 0 to 4, or -100 for none, got 5 at \(1,\)",
    ),
    "classes of other rows": (
        lambda: bf.linear_cross_entropy(X, W, torch.tensor([0, 1])),
        ValueError,
        r"target: expected classes of shape \(3,\), got \(2,\)",
    ),
    "ignore_index of probabilities": (
        lambda: bf.linear_cross_entropy(X, W, torch.ones(3, 5), ignore_index=1),
        ValueError,
        "ignore_index: expected None with class probabilities",
    ),
    "an option of no loss": (
        lambda: bf.linear_sigmoid_focal_loss(X, W, Y, beta=1),
        TypeError,
        "beta: expected no such argument",
    ),
    "sample weights of other rows": (
        lambda: bf.linear_softmax_focal_loss(X, W, torch.tensor([0, 1, 2]), sample_weight=torch.ones(2)),
        ValueError,
        r"sample_weight: expected shape \(3,\)",
    ),
    "a number": (lambda: bf.linear_cross_entropy(3.0, W, torch.tensor([0])), TypeError, "input: expected a tensor"),
    "no features": (lambda: bf.linear_cross_entropy(torch.ones(()), W, torch.tensor(0)), ValueError, "input: expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, message = WRONG[name]
    for module in ("linear", "layer"):
        path = f"bertloss_fast.functional.{module}.linear_loss"
        monkeypatch.setattr(path, lambda call: pytest.fail("something was computed"))
    with pytest.raises(kind, match=message):
        call()
