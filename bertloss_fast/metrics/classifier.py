"""Texts to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checks import as_array, as_shares, check_count, logits_of
from .inputs import probabilities_of


class ThresholdedClassifier:
    """Labels texts by the probabilities of one model, or by their mean over several: soft voting.

    Texts of a length go through the models together, and of a batch only the labels are kept: the probabilities of all
    texts and labels are never held, but by :meth:`probabilities`. Models run in eval mode and are left in their own.

    Args:
        models: a model or several, of cross-validation folds, say. Any callable that takes what the tokenizer makes as
            keyword arguments and returns logits ``[N, L]``, as a tensor, a tuple that begins with it or an output with
            ``.logits``: every ``*ForSequenceClassification`` of transformers.
        tokenizer: called as ``tokenizer(texts, padding=True, truncation=True, return_tensors="pt")``, with
            ``max_length`` where one is given; returns a mapping of tensors.
        thresholds: a probability, or one for each label ``[L]``: what ``tune_thresholds`` found.
        names: the labels' names ``[L]``; without them a label is its index.
        batch_size: texts a batch.
        max_length: of a text, in tokens.
        device: where the models are moved; by default each stays, and is given its inputs, where its parameters are.

    Raises:
        ValueError, TypeError: an argument that does not fit, and when texts are labelled: thresholds or names that are
            not one for each label, models whose logits differ in shape.

    Example::

        >>> import torch
        >>> from bertloss_fast.metrics import ThresholdedClassifier
        >>> def tokenizer(texts, **options):
        ...     return {"length": torch.tensor([[float(len(text))] for text in texts])}
        >>> def model(length):
        ...     return torch.cat([length - 4, 4 - length], dim=1)
        >>> ThresholdedClassifier(model, tokenizer, names=["long", "short"]).predict(["fever", "flu"])
        [['long'], ['short']]
    """

    def __init__(
        self,
        models: Callable[..., Any] | Sequence[Callable[..., Any]],
        tokenizer: Callable[..., Any],
        thresholds: float | Sequence[float] | NDArray[Any] = 0.5,
        *,
        names: Sequence[str] | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        several = isinstance(models, Sequence | nn.ModuleList)
        self.models: list[Callable[..., Any]] = list(models) if several else [models]  # type: ignore[arg-type, list-item]
        if not self.models:
            raise ValueError("models: expected at least one, got none")
        for model in self.models:
            if not callable(model):
                raise TypeError(f"models: expected a model or a list of them, got {type(model).__name__}")
        self.tokenizer = tokenizer
        self.thresholds = torch.tensor(as_shares("thresholds", thresholds))
        self.names = names
        self.batch_size = check_count("batch_size", batch_size)
        self.options = {} if max_length is None else {"max_length": max_length}
        if device is not None:
            for model in self.models:
                if isinstance(model, nn.Module):
                    model.to(device)

    def predict(self, texts: Iterable[str]) -> list[list[Any]]:
        """Of each text the labels whose probability reaches the threshold, the likeliest first; perhaps none."""
        texts = _listed(texts)
        answers: list[list[Any]] = [[] for _ in texts]
        for places, chances in self._batches(texts):
            for place, row, reached in zip(places, chances, chances.double() >= self.thresholds, strict=True):
                labels = reached.nonzero().squeeze(1)
                answers[place] = self._named(labels[row[labels].argsort(descending=True, stable=True)])
        return answers

    def topk(self, texts: Iterable[str], k: int) -> list[list[tuple[Any, float]]]:
        """Of each text the k likeliest labels with their probabilities, whatever the threshold."""
        texts, k = _listed(texts), check_count("k", k)
        answers: list[list[tuple[Any, float]]] = [[] for _ in texts]
        for places, chances in self._batches(texts):
            values, labels = chances.topk(min(k, chances.shape[1]))
            for place, row, of_row in zip(places, values, labels, strict=True):
                answers[place] = list(zip(self._named(of_row), row.tolist(), strict=True))
        return answers

    def probabilities(self, texts: Iterable[str]) -> NDArray[np.floating[Any]]:
        """``[N, L]``, the mean over the models: what to tune thresholds on, with ``from_logits=False``."""
        texts = _listed(texts)
        if not texts:
            raise ValueError("texts: expected at least one, got none")
        parts = list(self._batches(texts))
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        return np.asarray(torch.cat([chances for _, chances in parts]).numpy()[order])

    def _named(self, labels: Tensor) -> list[Any]:
        return labels.tolist() if self.names is None else [self.names[label] for label in labels.tolist()]

    def _batches(self, texts: list[str]) -> Iterator[tuple[NDArray[np.intp], Tensor]]:
        """Places in `texts` and mean probabilities, on the CPU; the longest texts first: what does not fit in memory is
        known at once."""
        by_length = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(texts), self.batch_size):
            places = by_length[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[place] for place in places], padding=True, truncation=True, return_tensors="pt", **self.options
            )
            chances = self._mean(inputs, len(places))
            self._check_labels(chances.shape[1])
            yield places, chances

    def _check_labels(self, num_labels: int) -> None:
        thresholds = self.thresholds if self.thresholds.dim() else None
        for name, of_labels in (("thresholds", thresholds), ("names", self.names)):
            if of_labels is not None and len(of_labels) != num_labels:
                raise ValueError(f"{name}: expected {num_labels}, one for each label, got {len(of_labels)}")

    @torch.no_grad()
    def _mean(self, inputs: Any, rows: int) -> Tensor:
        total: Tensor | None = None
        for number, model in enumerate(self.models):
            with _evaluating(model):
                logits = as_array("models", _run(model, inputs))
            if len(logits) != rows:
                raise ValueError(f"models: expected logits of {rows} texts, got {len(logits)} of model {number}")
            if np.isnan(logits).any():
                raise ValueError(f"models: expected no NaN among the logits, got one of model {number}")
            chances = torch.from_numpy(probabilities_of(logits))
            if total is not None and chances.shape != total.shape:
                wanted, got = tuple(total.shape), tuple(chances.shape)
                raise ValueError(f"models: expected logits {wanted} like the first one's, got {got} of model {number}")
            total = chances if total is None else total + chances
        assert total is not None
        return total / len(self.models)


def _listed(texts: Iterable[str]) -> list[str]:
    """Without an index of its own, as a column of a table has."""
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, got str")
    texts = list(texts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected str, got {type(text).__name__} in place {place}")
    return texts


def _run(model: Callable[..., Any], inputs: Any) -> Tensor:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    return logits_of("models", model(**{name: value.to(device) for name, value in inputs.items()}))


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
