"""What the head and its optimizer refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bertloss_fast as bf

FEATURES, LABELS = 5, 11
HEAD = bf.MultiLabelHead(FEATURES, LABELS)
X, Y = torch.randn(2, FEATURES), torch.zeros(2, LABELS, dtype=torch.bool)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "k": (lambda: HEAD.topk(X, 12), ValueError, "k: expected an integer from 1 to 11, the number of labels, got 12"),
    "no k": (lambda: HEAD.topk(X, 0), ValueError, "k: expected an integer from 1 to 11"),
    "features": (
        lambda: HEAD(X[:, 1:]),
        ValueError,
        r"hidden: expected shape \(..., 5\), got \(2, 4\)",
    ),
    "labels": (
        lambda: HEAD(X, Y[:, 1:]),
        ValueError,
        r"target: expected shape \(2, 11\) like the logits, got \(2, 10\)",
    ),
    "an option of the loss": (
        lambda: HEAD(X, Y, weight=1),
        TypeError,
        "weight: expected one of ignore_index, mask, normalizer",
    ),
    "an option without targets": (lambda: HEAD(X, mask=Y), TypeError, "mask: expected targets beside it, got None"),
    "threshold": (lambda: HEAD.predict(X, 1.5), ValueError, "threshold: expected a number from 0 to 1, got 1.5"),
    "thresholds": (
        lambda: HEAD.predict(X, torch.ones(3)),
        ValueError,
        r"threshold: expected a number or shape \(11,\)",
    ),
    "loss": (
        lambda: bf.MultiLabelHead(5, 3, bf.ZlprLoss()),
        TypeError,
        "loss: expected a SigmoidFocalLoss, .* got ZlprLoss",
    ),
    "batch loss": (lambda: bf.MultiLabelHead(5, 3, bf.GHMLoss()), TypeError, "loss: expected .* got GHMLoss"),
    "sizes": (lambda: bf.MultiLabelHead(0, 3), ValueError, "in_features: expected an integer > 0, got 0"),
    "chunk_size": (lambda: bf.MultiLabelHead(2, 3, chunk_size=0), ValueError, "chunk_size: expected an integer > 0"),
    "prior": (lambda: bf.MultiLabelHead(2, 3, prior=1.5), ValueError, "prior: expected a number from 0 to 1, got 1.5"),
    "priors": (lambda: bf.MultiLabelHead(2, 3, prior=torch.ones(2)), ValueError, r"prior: expected .* \(3,\)"),
    "prior without bias": (
        lambda: bf.MultiLabelHead(2, 3, bias=False, prior=0.1),
        ValueError,
        "prior: expected None without a bias",
    ),
    "optimizer": (
        lambda: HEAD.fused_step(X, Y, torch.optim.SGD(HEAD.parameters(), 0.1)),
        TypeError,
        "optimizer: expected a HeadSGD, got SGD",
    ),
    "reduction": (
        lambda: bf.MultiLabelHead(5, 11, bf.SigmoidFocalLoss()).fused_step(X, Y, bf.HeadSGD(0.1)),
        ValueError,
        "reduction: expected a loss that is reduced to one number, got 'none'",
    ),
    "another head's momenta": (
        lambda: [
            head.fused_step(torch.ones(2, head.in_features), Y[:, : head.num_labels], OPTIMIZER)
            for head in (HEAD, bf.MultiLabelHead(3, 4))
        ],
        ValueError,
        r"optimizer: expected the momenta of weight, \(4, 3\), got \(11, 5\)",
    ),
    "fp16": (
        lambda: bf.MultiLabelHead(5, 11, dtype=torch.float16).fused_step(X.half(), Y, bf.HeadSGD(0.1)),
        TypeError,
        "weight: expected bfloat16, float32 or float64 to update, got float16",
    ),
    "dtype of hidden": (lambda: HEAD(X.double(), Y), TypeError, "hidden: expected float32 like weight, got float64"),
    "no tensor": (lambda: HEAD.fused_step(None, Y, OPTIMIZER), TypeError, "hidden: expected a tensor, got NoneType"),
    "an argument of the layer": (
        lambda: HEAD(X, Y, chunk_size=1),
        TypeError,
        "chunk_size: expected one of ignore_index, mask",
    ),
    "threshold of nan": (
        lambda: HEAD.predict(X, torch.full((11,), float("nan"))),
        ValueError,
        "threshold: expected values from 0 to 1, got nan",
    ),
    "one threshold in brackets": (lambda: HEAD.predict(X, torch.ones(1)), ValueError, "threshold: expected a number"),
    "bias": (
        lambda: bf.MultiLabelHead(2, 3, bias=torch.ones(3)),
        TypeError,
        "bias: expected True or False, got Tensor",
    ),
    "dtype": (
        lambda: bf.MultiLabelHead(2, 3, dtype=torch.long),
        TypeError,
        "dtype: expected a floating dtype, got int64",
    ),
    "a parametrized weight": (
        lambda: nn.utils.parametrizations.weight_norm(bf.MultiLabelHead(5, 11)).fused_step(X, Y, bf.HeadSGD(0.1)),
        TypeError,
        "weight: expected a parameter of the head's own to update, got a parametrized one",
    ),
    "lr that became nan": (lambda: step_with(lr=float("nan")), ValueError, "lr: expected a number >= 0, got nan"),
    "lr that became a tensor": (
        lambda: step_with(lr=torch.ones(())),
        TypeError,
        "lr: expected a number >= 0, got Tensor",
    ),
    "no state": (
        lambda: bf.HeadSGD(0.1).load_state_dict({}),
        TypeError,
        "state: expected what HeadSGD.state_dict gives",
    ),
    "a state of others": (
        lambda: bf.HeadSGD(0.1).load_state_dict({"step": 1, "foo": torch.ones(3)}),
        TypeError,
        "state: expected momenta .* got a dict of step, foo",
    ),
    "lr": (lambda: bf.HeadSGD(-0.1), ValueError, "lr: expected a number >= 0, got -0.1"),
    "momentum": (lambda: bf.HeadSGD(0.1, 1.0), ValueError, "momentum: expected a number from 0 to less than 1"),
    "seed": (lambda: bf.HeadSGD(0.1, seed=-1), ValueError, "seed: expected an integer >= 0, got -1"),
}


OPTIMIZER = bf.HeadSGD(0.1, 0.5)


def step_with(**attributes: Any) -> None:
    optimizer = bf.HeadSGD(0.1)
    vars(optimizer).update(attributes)
    HEAD.fused_step(X, Y, optimizer)


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
