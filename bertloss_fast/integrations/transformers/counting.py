"""What a loss divides by: over its own batch, over an accumulation window, and what Trainer has counted of that.

=================================  =====================================================================
the denominator is a number of     in
=================================  =====================================================================
``ROWS``                           batchmean; two-way
``COUNTED_ROWS``                   mean and batchmean of ZLPR, mean of one class a row
``ELEMENTS``                       mean of the elementwise losses and of mean squared error
``POSITIVES``                      mean_positive
``WEIGHTS``                        mean of a cross-entropy with class weights, as torch has it
``None``, nothing                  sum
=================================  =====================================================================
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...modules import CrossEntropyLoss, MSELoss, TwoWayLoss, ZlprLoss
from ...modules.sigmoid import ElementwiseLoss
from ...modules.softmax import ClassLoss
from ...targets import SparseLabels

PADDING = -100  # transformers' label of what does not count
OF_SEVERAL = (ElementwiseLoss, ZlprLoss, TwoWayLoss)
Labels = Tensor | SparseLabels

ROWS = "rows"
COUNTED_ROWS = "rows that are not ignored"
ELEMENTS = "elements that are not ignored"
POSITIVES = "positive labels"
WEIGHTS = "class weights"


def unit_of(loss: nn.Module, labels: Labels) -> str | None:
    """What the denominator of a loss is a number of."""
    reduction = str(loss.reduction)
    if reduction == "sum":
        return None
    if isinstance(loss, ZlprLoss):
        return POSITIVES if reduction == "mean_positive" else COUNTED_ROWS
    if isinstance(loss, ClassLoss):
        if reduction == "batchmean" or is_distribution(loss, labels):
            return ROWS
        return WEIGHTS if isinstance(loss, CrossEntropyLoss) and loss.weight is not None else COUNTED_ROWS
    if isinstance(loss, TwoWayLoss):
        return ROWS
    return {"mean": ELEMENTS, "batchmean": ROWS, "mean_positive": POSITIVES}[reduction]


def count(loss: nn.Module, labels: Labels, num_labels: int) -> Tensor:
    """The denominator of one batch, ``[]``, where the labels lie; of nothing, and of no labels, 0. Nothing waits."""
    unit = unit_of(loss, labels)
    if unit is None:
        return _number(0, labels)
    if isinstance(labels, SparseLabels):
        return _number({ELEMENTS: len(labels) * num_labels, POSITIVES: labels.nnz}.get(unit, len(labels)), labels)
    if is_padded(loss, labels, num_labels):
        if unit == POSITIVES:
            return (labels != PADDING).sum()
        return _number(len(labels) * (num_labels if unit == ELEMENTS else 1), labels)
    if isinstance(loss, MSELoss):
        return _number(labels.numel(), labels)
    if isinstance(loss, ClassLoss) and not is_distribution(loss, labels):
        return _count_classes(loss, labels, unit)
    if unit == ROWS:
        return _number(labels.numel() // num_labels, labels)
    return _count_dense(loss, labels, unit)


def _count_classes(loss: ClassLoss, labels: Tensor, unit: str) -> Tensor:
    if unit == ROWS:
        return _number(labels.numel(), labels)
    kept = labels != loss.ignore_index
    if unit == COUNTED_ROWS:
        return kept.sum()
    assert loss.weight is not None
    classes = labels.long().clamp(0, len(loss.weight) - 1)  # the loss itself says what is wrong with others
    dtype = torch.promote_types(loss.weight.dtype, torch.float32)
    return torch.where(kept, loss.weight[classes], 0).sum(dtype=dtype)


def _count_dense(loss: nn.Module, labels: Tensor, unit: str) -> Tensor:
    kept = labels != ignored_of(loss) if may_ignore(labels) else None
    if unit == POSITIVES:
        labels = labels > 0.5 if isinstance(loss, ZlprLoss) else labels  # which knows no soft ones
        dtype = torch.promote_types(labels.dtype, torch.float32) if labels.is_floating_point() else torch.int64
        return (labels if kept is None else torch.where(kept, labels, 0)).sum(dtype=dtype)
    if unit == COUNTED_ROWS:
        return _number(labels.shape[:-1].numel(), labels) if kept is None else kept.any(-1).sum()
    return _number(labels.numel(), labels) if kept is None else kept.sum()


def _number(value: int, labels: Labels) -> Tensor:
    return torch.full((), value, device=labels.device)


def of_trainer(loss: nn.Module, labels: Labels, num_labels: int, number: Tensor) -> Tensor:
    """The denominator, where what Trainer counts, all labels but -100, tells it."""
    wanted = unit_of(loss, labels)
    found = _unit_of_trainer(loss, labels, num_labels)
    if wanted == found:
        return number
    whole = not may_ignore(labels) or is_distribution(loss, labels)
    if found == ELEMENTS and wanted in (ROWS, COUNTED_ROWS) and whole:
        return number / num_labels
    raise ValueError(
        f"num_items_in_batch: expected a count of {wanted} for {type(loss).__name__}(reduction={loss.reduction!r}), "
        f"got Trainer's, of {found}; FusedLossTrainer counts them"
    )


def _unit_of_trainer(loss: nn.Module, labels: Labels, num_labels: int) -> str:
    if isinstance(labels, SparseLabels):
        return "nothing"
    if is_padded(loss, labels, num_labels):
        return POSITIVES
    if isinstance(loss, MSELoss) or is_distribution(loss, labels):
        return ELEMENTS
    if ignored_of(loss) != PADDING and may_ignore(labels):
        return f"labels that are not {PADDING}"
    return COUNTED_ROWS if isinstance(loss, ClassLoss) else ELEMENTS


def is_padded(loss: nn.Module, labels: Labels, num_labels: int) -> bool:
    """Whether labels ``[N, K]`` are numbers of labels, and not zeros and ones."""
    if not isinstance(loss, OF_SEVERAL) or isinstance(labels, SparseLabels):
        return False
    whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
    return whole and labels.dim() == 2 and labels.shape[1] != num_labels


def is_distribution(loss: nn.Module, labels: Labels) -> bool:
    """Whether the labels of a loss of classes are their probabilities."""
    return isinstance(loss, ClassLoss) and isinstance(labels, Tensor) and labels.is_floating_point()


def may_ignore(labels: Labels) -> bool:
    """Whether there is a place for -100."""
    return isinstance(labels, Tensor) and labels.dtype.is_signed


def ignored_of(loss: nn.Module) -> int:
    """The label of what does not count."""
    index = loss.ignore_index
    return PADDING if index is None else cast(int, index)
