"""A loss of each kind of rows of classes, its data and its definition in float64."""

from __future__ import annotations

from typing import Any

import torch
from cases import logits
from row_cases import ROW_LOSSES, RowLoss
from torch import Tensor

N, C = 5, 6
# One loss of each kind: other parameters make no other edges.
LOSSES = {
    name: ROW_LOSSES[name]
    for name in ("ce", "ce-probabilities", "ce-z", "focal-2.0", "poly", "poly-probabilities", "ldam", "distillation")
} | {name: ROW_LOSSES[name] for name in ("distillation-alone", "r-drop", "js", "margin-mse")}
OF_LABELS = [name for name, loss in LOSSES.items() if "ignore_index" in loss.takes]


def data(
    name: str, device: torch.device, rows: int = N, classes: int = C, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """Logits, what comes after them, and the options that the loss always has."""
    loss = LOSSES[name]
    if rows == 0:
        second = [o[:0] for o in loss.second(1, classes, device)]
    else:
        second = list(loss.second(rows, classes, device))
    second = [o.to(dtype) if o.is_floating_point() else o for o in second]
    options = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in loss.options_of(classes).items()
    }
    return logits(rows, classes, device=device, dtype=dtype), second, options


def value_and_grads(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream)


def expected(
    loss: RowLoss, x: Tensor, others: list[Tensor], upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """In float64, of logits as they are."""
    leaf = x.detach().double().requires_grad_()
    value = loss.oracle(leaf, *(o.detach().double() if o.is_floating_point() else o for o in others), **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), upstream * grad
