"""Losses for transformers' Trainer: divided by what all batches of an optimizer step count together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ... import modules
from ...modules import CrossEntropyLoss, MSELoss, TwoWayLoss
from ...modules.softmax import ClassLoss
from ...targets import SparseLabels
from .counting import (
    OF_SEVERAL,
    PADDING,
    WEIGHTS,
    Labels,
    count,
    ignored_of,
    is_distribution,
    is_padded,
    may_ignore,
    of_trainer,
    unit_of,
)


class ItemCounts(NamedTuple):
    """What divides a loss, counted over all batches of an optimizer step; :class:`FusedLossTrainer` counts it.

    Passed as Trainer's ``num_items_in_batch``.
    """

    denominator: Tensor
    """The rows, elements, positive labels or class weights that the loss's reduction divides by, ``[]``."""

    num_labels: int
    """With how many labels a row was counted."""


def compute_loss_func(loss: nn.Module) -> TrainerLoss:
    """A loss of this package for ``Trainer(compute_loss_func=...)``, exact under gradient accumulation.

    Four batches of 4 that are accumulated give the loss and the gradient of one batch of 16, over several processes
    too: what a batch adds up is divided by what all batches of the optimizer step count. Two-way and GHM compare the
    rows of a batch, so accumulated batches are weighted, not merged.

    Args:
        loss: one that is called with logits and labels: ``BCEWithLogitsLoss``, ``SigmoidFocalLoss``,
            ``AsymmetricLossMultiLabel``, ``PolyBinaryCrossEntropy``, ``DistributionBalancedLoss``, ``GHMLoss``,
            ``ZlprLoss``, ``TwoWayLoss``, ``CrossEntropyLoss``, ``SoftmaxFocalLoss``, ``PolyCrossEntropy``,
            ``LDAMLoss`` or ``MSELoss``, reduced to one number. It is not copied: its tensors are moved to the logits'
            device, and the running counts of a ``GHMLoss`` are changed where gradients are on.

    Raises:
        TypeError, ValueError: for another loss, and for one that Trainer could not divide.

    Example::

        >>> from bertloss_fast import SigmoidFocalLoss
        >>> from bertloss_fast.integrations.transformers import compute_loss_func
        >>> compute_loss_func(SigmoidFocalLoss(reduction="mean"))
        TrainerLoss(SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction='mean'))
    """
    return TrainerLoss(loss)


class TrainerLoss:
    """What :func:`compute_loss_func` returns. Not a module, so that a model that holds it does not save it.

    Labels, of L labels or classes:

    - ``[N]`` integers, a class each, or ``[N, C]`` probabilities of classes; -100 is no class;
    - ``[N, L]`` zeros and ones, or floats between; -100 does not count where the dtype has a place for it;
    - ``[N, K]`` integers with another K: numbers of labels, padded with -100; or :class:`SparseLabels`;
    - ``[N]`` or ``[N, L]`` numbers for ``MSELoss``, of which -100 is one.
    """

    def __init__(self, loss: nn.Module) -> None:
        check_loss(loss)
        self.loss = loss

    def __call__(
        self, outputs: Any, labels: Labels | None, num_items_in_batch: ItemCounts | Tensor | int | None = None
    ) -> Tensor:
        """The loss of a model's outputs, as Trainer asks for it."""
        if num_items_in_batch is None and torch.is_grad_enabled():
            raise ValueError(
                "num_items_in_batch: expected a count of the labels that are accumulated, got None, which Trainer has "
                "for labels that are no tensor; FusedLossTrainer counts them"
            )
        return self.of_logits(logits_of(outputs), labels, num_items_in_batch)

    def of_logits(
        self, logits: Tensor, labels: Labels | None, num_items_in_batch: ItemCounts | Tensor | int | None = None
    ) -> Tensor:
        """The loss of logits ``[..., L]``; divided by what this batch counts where there is no other number."""
        num_labels = logits.shape[-1]
        targets, options = self._prepare(labels, num_labels, logits.device, num_items_in_batch)
        if isinstance(self.loss, ClassLoss):
            logits = logits.reshape(-1, num_labels)
        elif isinstance(self.loss, MSELoss) and num_labels == 1 and targets.shape == logits.shape[:-1]:
            logits = logits[..., 0]  # as transformers' models have it
        if not isinstance(self.loss, TwoWayLoss) or "normalizer" not in options:
            return cast(Tensor, self.loss(logits, targets, **options))
        of_window = options.pop("normalizer")
        share: Tensor = logits.shape[:-1].numel() / of_window
        return cast(Tensor, self.loss(logits, targets, **options)) * share

    def of_layer(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Labels | None,
        num_items_in_batch: ItemCounts | Tensor | int | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The loss of a linear layer's logits, ``[..., D]`` times ``[L, D]``, which are never held."""
        self.check_layer()
        targets, options = self._prepare(labels, len(weight), hidden.device, num_items_in_batch)
        if isinstance(self.loss, ClassLoss):
            hidden = hidden.reshape(-1, hidden.shape[-1])
        loss: Any = self.loss
        value: Tensor = loss.of_layer(hidden, weight, targets, bias, chunk_size, **options)
        return value

    def check_layer(self) -> None:
        """Raises TypeError if the loss is not one that a linear layer takes in."""
        if not hasattr(self.loss, "of_layer"):
            raise TypeError(
                "loss: expected one that a linear layer takes in (BCEWithLogitsLoss, SigmoidFocalLoss, "
                "AsymmetricLossMultiLabel, PolyBinaryCrossEntropy, CrossEntropyLoss, SoftmaxFocalLoss), "
                f"got {type(self.loss).__name__}"
            )

    def counts(self, labels: Labels, num_labels: int) -> ItemCounts:
        """What one batch counts; the denominators of several batches add up. On a GPU nothing waits."""
        labels = self._labels(labels, num_labels)
        self._move_to(labels.device)
        return ItemCounts(count(self.loss, labels, num_labels), num_labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss!r})"

    def _labels(self, labels: Labels | None, num_labels: int) -> Labels:
        """In the form that the loss counts them in: classes as a vector."""
        labels = check_labels(labels)
        if isinstance(labels, SparseLabels) and not isinstance(self.loss, OF_SEVERAL):
            raise TypeError(f"labels: expected a tensor for {type(self.loss).__name__}, got SparseLabels")
        if isinstance(labels, SparseLabels) or not isinstance(self.loss, ClassLoss):
            return labels
        if not is_distribution(self.loss, labels):
            return labels.reshape(-1)
        if labels.shape[-1:] != (num_labels,):
            expected = f"integers, or probabilities of shape (..., {num_labels})"
            raise ValueError(f"labels: expected {expected}, got floats of shape {tuple(labels.shape)}")
        return labels.reshape(-1, num_labels)

    def _prepare(
        self, labels: Labels | None, num_labels: int, device: torch.device, number: ItemCounts | Tensor | int | None
    ) -> tuple[Labels, dict[str, Any]]:
        """Targets and options of a call; the loss is made ready for it."""
        labels = self._labels(labels, num_labels)
        self._move_to(device)
        self.loss.train(torch.is_grad_enabled())  # an evaluation leaves GHM's running counts alone
        options: dict[str, Any] = {}
        of_numbers = is_padded(self.loss, labels, num_labels)
        if isinstance(self.loss, OF_SEVERAL) and may_ignore(labels) and not of_numbers:
            options["ignore_index"] = ignored_of(self.loss)
        if number is not None and unit_of(self.loss, labels) is not None:
            options["normalizer"] = self._denominator(number, labels, num_labels, device)
        return _targets(self.loss, labels, num_labels), options

    def _denominator(
        self, number: ItemCounts | Tensor | int, labels: Labels, num_labels: int, device: torch.device
    ) -> Tensor:
        given = number.denominator if isinstance(number, ItemCounts) else number
        if not isinstance(given, Tensor | int | float):
            raise TypeError(f"num_items_in_batch: expected a number or a tensor, got {type(given).__name__}")
        found = given.to(device) if isinstance(given, Tensor) else torch.full((), given, device=device)
        if isinstance(number, ItemCounts):
            if number.num_labels != num_labels:
                raise ValueError(
                    f"num_items_in_batch: expected counts of {num_labels} labels like the logits', "
                    f"got {number.num_labels}, which model.config.num_labels says"
                )
        else:
            if found.dim():
                raise ValueError(
                    f"num_items_in_batch: expected a number, got shape {tuple(found.shape)}, which Trainer makes for "
                    "DataParallel; start one process a device (torchrun, accelerate launch)"
                )
            found = of_trainer(self.loss, labels, num_labels, found)
        # Nothing counts: the sum is 0, and so is the loss, but for what smoothing gives classes of weight 0.
        return torch.where(found == 0, 1, found)

    def _move_to(self, device: torch.device) -> None:
        if any(buffer.device != device for buffer in self.loss.buffers()):
            self.loss.to(device)


def check_labels(labels: Any) -> Labels:
    if not isinstance(labels, Tensor | SparseLabels):
        raise TypeError(f"labels: expected a tensor or SparseLabels, got {type(labels).__name__}")
    return labels


def check_loss(loss: nn.Module) -> None:
    if not isinstance(loss, (*OF_SEVERAL, ClassLoss, MSELoss)):
        name = type(loss).__name__
        known = type(loss).__module__.startswith("torch.nn") and name in modules.__all__
        hint = f"; bertloss_fast.{name} takes the same arguments" if known else ""
        of = "torch.nn." if type(loss).__module__.startswith("torch.nn") else ""
        raise TypeError(f"loss: expected one of bertloss_fast that takes logits and labels, got {of}{name}{hint}")
    if loss.reduction == "none":
        raise ValueError("loss: expected a reduction to one number, got reduction='none'")
    if isinstance(loss, CrossEntropyLoss) and loss.z_loss and loss.reduction == "mean" and loss.weight is not None:
        raise ValueError(f"loss: expected no z_loss beside class weights: {WEIGHTS} divide the one, and rows the other")


def logits_of(outputs: Any) -> Tensor:
    """What stands in the logits' place of outputs that came without a loss: a ModelOutput, a dict or a tuple."""
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, tuple):
        logits = outputs[0] if outputs else None
    else:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        got = f"the keys {list(outputs)}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(f"outputs: expected logits in a ModelOutput, a dict or first in a tuple, got {got}")
    return logits


def _targets(loss: nn.Module, labels: Labels, num_labels: int) -> Labels:
    """As the loss takes them."""
    if not is_padded(loss, labels, num_labels):
        return labels
    assert isinstance(labels, Tensor)
    if labels.shape[1] > num_labels + 1:
        raise ValueError(
            f"labels: expected shape (N, {num_labels}), or (N, K) with at most {num_labels} numbers of labels, "
            f"got {tuple(labels.shape)}"
        )
    sparse = SparseLabels.from_padded(labels, num_labels, PADDING)
    # Zeros and ones of too few labels would else be the labels 0 and 1. Where that is on a GPU, it has just waited.
    # A graph cannot branch on them.
    if not torch.compiler.is_compiling() and sparse.nnz != int((labels != PADDING).sum()):
        raise ValueError(
            f"labels: expected shape (N, {num_labels}), or numbers of labels padded with {PADDING}, each once in a "
            f"row and less than {num_labels}; got others in shape {tuple(labels.shape)}"
        )
    return sparse
