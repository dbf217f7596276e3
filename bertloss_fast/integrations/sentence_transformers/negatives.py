"""Losses of a query, a document that answers it, and documents that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import tqdm
from sentence_transformers.cross_encoder import losses
from torch import Tensor, nn

from ... import modules
from ...functional import multiple_negatives_ranking_loss
from ...functional.checks import check_backend, check_index, check_positive
from .base import IDENTITY, CrossEncoderLoss, Labels, check_columns, stack, tokenize
from .gradcache import cached_scores

SIGMOID = nn.Sigmoid()


class MultipleNegativesRankingLoss(CrossEncoderLoss):
    """The positive of a query against negatives of its own and of other queries in the batch.

    :func:`bertloss_fast.multiple_negatives_ranking_loss` has the formula. Pairs are scored column by column and
    negatives drawn as sentence-transformers does it, so that with the same seed the training is the same.

    Args:
        model: a CrossEncoder with one label.
        num_negatives: how many texts of other queries to draw for each query; ``None`` for all.
        scale: what the activated scores are multiplied by.
        activation_fn: what the logits go through before that, or ``None``. A sigmoid is computed in the kernel.
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the model's device.

    Shape:
        inputs are queries, their positives, and any number of columns of negatives; labels are not looked at.

    Raises:
        ValueError: at construction for a model with other than one label; at the call for less than two columns.
    """

    def __init__(
        self,
        model: nn.Module,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: nn.Module | None = SIGMOID,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, activation_fn, num_labels=1)
        if num_negatives is not None and check_index("num_negatives", num_negatives, "an integer or None") < 0:
            raise ValueError(f"num_negatives: expected at least 0, or None for all; got {num_negatives}")
        if scale:
            check_positive("scale", scale)
        check_backend(backend)
        self.num_negatives = num_negatives
        self.scale = scale
        self.backend = backend

    def forward(
        self,
        inputs: Sequence[Sequence[str]],
        labels: Labels | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        check_columns(inputs, 2, None, "queries, their positives, and columns of negatives if there are")
        return self.compute(self.score_candidates(inputs, prompt, task))

    def score_candidates(self, inputs: Sequence[Sequence[str]], prompt: str | None, task: str | None) -> Tensor:
        """Scores ``[Q, 1 + negatives]``, the positive's first."""
        columns = [
            self.score(list(zip(inputs[0], column, strict=True)), prompt, task).squeeze(1)
            for column in self.candidates(inputs)
        ]
        return torch.stack(columns, dim=1)

    def candidates(self, inputs: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
        """Columns of a text for each query: the positives, those drawn from the batch, and the query's own negatives.

        They are drawn when the positives have been taken: dropout in scoring those comes first from the generator.
        """
        _, *columns = inputs
        yield columns[0]
        texts = [text for column in columns for text in column]
        for drawn in self.draw(len(inputs[0]), len(columns)).T.tolist():
            yield [texts[index] for index in drawn]
        yield from columns[1:]

    def draw(self, num_queries: int, num_columns: int) -> Tensor:
        """For each query, the indices of texts of others among all columns, one after another: ``[Q, negatives]``."""
        of_others = (~torch.eye(num_queries, dtype=torch.bool)).repeat(1, num_columns)
        available = (num_queries - 1) * num_columns
        if self.num_negatives is None or self.num_negatives >= available:
            return of_others.nonzero()[:, 1].view(num_queries, available)
        if self.num_negatives == 0:
            return torch.empty(num_queries, 0, dtype=torch.int64)
        return torch.multinomial(of_others.float(), self.num_negatives)

    def compute(self, scores: Tensor) -> Tensor:
        """The loss of scores ``[Q, 1 + negatives]``."""
        in_kernel = type(self.activation_fn) is nn.Sigmoid
        return multiple_negatives_ranking_loss(
            scores if in_kernel else self.activate(scores),
            scale=self.scale or 1.0,  # 0 and None are sentence-transformers' for none
            activation="sigmoid" if in_kernel else None,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"scale": self.scale, "num_negatives": self.num_negatives}


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """As :class:`MultipleNegativesRankingLoss`, with memory for the graph of one mini-batch, in two passes (GradCache).

    Args:
        model, num_negatives, scale, activation_fn, backend: as of :class:`MultipleNegativesRankingLoss`.
        mini_batch_size: how many pairs the model is given at a time.
        show_progress_bar: whether to show how far each pass has come.

    Shape:
        as of :class:`MultipleNegativesRankingLoss`.

    Raises:
        ValueError: as :class:`MultipleNegativesRankingLoss`.
    """

    uses_gradient_cache = True
    """The backward of the model runs in a hook: sentence-transformers asks for this."""

    def __init__(
        self,
        model: nn.Module,
        num_negatives: int | None = 4,
        scale: float = 10.0,
        activation_fn: nn.Module | None = SIGMOID,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, num_negatives, scale, activation_fn, backend=backend)
        if check_index("mini_batch_size", mini_batch_size) < 1:
            raise ValueError(f"mini_batch_size: expected a number of at least 1, got {mini_batch_size}")
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    def score_candidates(self, inputs: Sequence[Sequence[str]], prompt: str | None, task: str | None) -> Tensor:
        pairs = [pair for column in self.candidates(inputs) for pair in zip(inputs[0], column, strict=True)]
        starts = range(0, len(pairs), self.mini_batch_size)
        batches = (tokenize(self.model, pairs[at : at + self.mini_batch_size], prompt, task) for at in starts)
        progress = partial(
            tqdm.tqdm, desc="Predict mini-batches", total=len(starts), disable=not self.show_progress_bar
        )
        return cached_scores(self.model, batches, progress).view(-1, len(inputs[0])).T

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}


class MarginMSELoss(CrossEncoderLoss):
    """Squared error of the positive's score less each negative's, against the margins of a teacher.

    Args:
        model: a CrossEncoder with one label.
        activation_fn: what the logits go through before the margins are taken.
        options: those of :class:`bertloss_fast.MSELoss`, which has torch's.

    Shape:
        inputs are queries, positives, and one or more columns of negatives. Labels are the teacher's margins,
        ``[Q, negatives]`` and for one negative also ``[Q]``, or its scores, ``[Q, 1 + negatives]``.

    Raises:
        ValueError: at construction for a model with other than one label; at the call for less than three columns,
            or labels of another shape.
    """

    citation = losses.MarginMSELoss.citation

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None = IDENTITY, **options: Any) -> None:
        super().__init__(model, activation_fn or IDENTITY, num_labels=1)
        self.criterion = modules.MSELoss(**options)

    def forward(
        self,
        inputs: Sequence[Sequence[str]],
        labels: Labels,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        check_columns(inputs, 3, None, "queries, their positives, and at least one column of negatives")
        queries, *columns = inputs
        wanted = _margins(stack(labels).detach(), len(queries), len(columns) - 1)
        scores = [
            self.activate(self.score(list(zip(queries, column, strict=True)), prompt, task).squeeze(1))
            for column in columns
        ]
        # Not margin_mse_loss, whose "none" is a sum over the negatives of a query, and not a value for each.
        margins = scores[0].unsqueeze(1) - torch.stack(scores[1:], dim=1)
        loss: Tensor = self.criterion(margins, wanted.to(margins.device, torch.float32))
        return loss


def _margins(labels: Tensor, num_queries: int, num_negatives: int) -> Tensor:
    """The teacher's margins, ``[Q, negatives]``."""
    if labels.shape == (num_queries, 1 + num_negatives):
        return labels[:, :1] - labels[:, 1:]
    margins = labels.unsqueeze(1) if labels.dim() == 1 else labels
    if margins.shape != (num_queries, num_negatives):
        raise ValueError(
            f"labels: expected margins of shape {(num_queries, num_negatives)} or scores of shape "
            f"{(num_queries, 1 + num_negatives)}, got {tuple(labels.shape)}"
        )
    return margins
