"""Losses of pairs of texts, each of which has a class or a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ... import modules
from .base import IDENTITY, CrossEncoderLoss, Labels, check_columns, stack


class PairLoss(CrossEncoderLoss):
    """A criterion of the package on the logits of pairs."""

    def __init__(
        self, model: nn.Module, activation_fn: nn.Module | None, criterion: nn.Module, num_labels: int | None = None
    ) -> None:
        super().__init__(model, activation_fn or IDENTITY, num_labels)
        self.criterion = criterion

    def forward(
        self,
        inputs: Sequence[Sequence[str]],
        labels: Labels,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        check_columns(inputs, 2, 2, "two columns of texts")
        logits = self.score(list(zip(*inputs, strict=True)), prompt, task)
        return self.compute(logits, stack(labels).to(logits.device))

    def compute(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits ``[N, num_labels]``."""
        raise NotImplementedError


class CrossEntropyLoss(PairLoss):
    """Cross-entropy of the class of each pair.

    Args:
        model: a CrossEncoder with as many labels as there are classes.
        activation_fn: what the logits go through before the loss.
        options: those of :class:`bertloss_fast.CrossEntropyLoss`, which has torch's and more.

    Shape:
        labels are classes ``[N]`` or ``[N, 1]``, or class probabilities ``[N, num_labels]``.

    Raises:
        ValueError: at construction for a model that is no CrossEncoder; at the call for other than two columns.
    """

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None = IDENTITY, **options: Any) -> None:
        super().__init__(model, activation_fn, modules.CrossEntropyLoss(**options))

    def compute(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not labels.is_floating_point() and labels.shape == (len(logits), 1):
            labels = labels.squeeze(1)
        loss: Tensor = self.criterion(self.activate(logits), labels)
        return loss


class MSELoss(PairLoss):
    """Squared error of the score of each pair, as a teacher or a person gave it.

    Args:
        model: a CrossEncoder with one label.
        activation_fn: what the logits go through before the loss.
        options: those of :class:`bertloss_fast.MSELoss`, which has torch's.

    Shape:
        labels are scores ``[N]``.

    Raises:
        ValueError: at construction for a model with other than one label; at the call for other than two columns, or
            another number of labels.
    """

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None = IDENTITY, **options: Any) -> None:
        super().__init__(model, activation_fn, modules.MSELoss(**options), num_labels=1)

    def compute(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, logits)
        loss: Tensor = self.criterion(self.activate(logits.squeeze(1)), labels.detach().float().view(-1))
        return loss


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """One label for each logit; of a model with a single one, in any shape."""
    fit = labels.numel() == len(logits) if logits.shape[1] == 1 else labels.shape == logits.shape
    if not fit:
        wanted = tuple(logits.shape) if logits.shape[1] > 1 else (len(logits),)
        raise ValueError(f"labels: expected shape {wanted}, got {tuple(labels.shape)}")
