"""Scores and labels as they come from a model and a data set, checked and brought into one form.

Scores are of all labels, ``[N, L]``, or a pair of the likeliest labels' scores and indices, ``[N, k]`` each. The labels
become `SparseLabels`, and what is ignored a mask; positives are looked up in them, so that nothing here is ``[N, L]``
unless it came so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.rows import IGNORED
from ..targets import SparseLabels
from .checks import as_array, check_count

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

CELLS = 2**22
"""Scores worked on at a time, where that takes tens of bytes each."""


@dataclass(frozen=True)
class Scored:
    """Rows whose labels are known at least in part, and their scores."""

    truth: SparseLabels
    ignored: Bools | None
    """``[N, L]``, from multi-hot labels alone."""
    scores: Floats
    """``[N, L]``, or ``[N, k]`` falling along each row."""
    indices: Integers | None
    """The labels of the scores ``[N, k]``; None where they are all the labels, in their order."""

    @property
    def num_labels(self) -> int:
        return self.truth.num_labels

    @property
    def counts(self) -> Integers:
        """How many labels each row has."""
        return self.truth.crow_indices.diff().numpy()

    @property
    def positives(self) -> Integers:
        """How many rows each label has."""
        return np.bincount(self.truth.col_indices.numpy(), minlength=self.num_labels)

    def likeliest(self, k: int) -> Integers:
        """The labels of the highest scores ``[N, k]``, those first, what is ignored last."""
        if self.indices is not None:
            return self.indices[:, :k]
        scores = self.scores if self.ignored is None else np.where(self.ignored, -np.inf, self.scores)
        return torch.from_numpy(scores).topk(k).indices.numpy()

    def is_right(self, indices: Integers) -> Bools:
        """Whether the row has the label, for labels ``[N, k]``; what is ignored it has not."""
        rows = np.repeat(np.arange(len(self.truth)), self.counts)
        positives = rows * self.num_labels + self.truth.col_indices.numpy()  # sorted, as SparseLabels are
        asked = np.arange(len(indices))[:, None] * self.num_labels + indices
        if not len(positives):
            return np.zeros(asked.shape, dtype=bool)
        at = np.searchsorted(positives, asked).clip(max=len(positives) - 1)
        return np.asarray(positives[at] == asked)

    def probabilities(self, from_logits: bool) -> Floats:
        """Of the scores, in their shape; what is ignored has -1, below any threshold."""
        if from_logits:
            chances = probabilities_of(self.scores)
        else:
            wrong = (self.scores < 0) | (self.scores > 1)
            if wrong.any():
                row = np.flatnonzero(wrong.any(axis=1))[0]
                raise ValueError(
                    f"scores: expected probabilities since from_logits=False, got {self.scores[wrong][0]} in row {row}"
                )
            chances = self.scores
        if self.ignored is None:
            return chances
        if self.indices is None:
            return np.where(self.ignored, chances.dtype.type(-1), chances)
        return np.where(np.take_along_axis(self.ignored, self.indices, axis=1), chances.dtype.type(-1), chances)

    def rows_cut_off(self, chances: Floats, thresholds: float | Floats) -> int:
        """In how many rows a label beyond the k-th may have reached its threshold."""
        if self.indices is None or self.indices.shape[1] == self.num_labels:
            return 0
        return int((chances[:, -1].astype(np.float64) >= np.min(thresholds)).sum())


def probabilities_of(logits: Floats) -> Floats:
    """Equal ones of equal logits, by way of float64: the last bit of torch's sigmoid depends on where in memory a logit
    lies, and a tuned threshold would miss the very score that it was taken from."""
    chances = np.empty_like(logits)
    rows = max(1, CELLS // logits.shape[1])
    with np.errstate(over="ignore"):
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            chances[part] = 1 / (1 + np.exp(-logits[part].astype(np.float64)))
    return chances


def warn_of_rows_cut_off(what: str, rows: int, scored: Scored) -> None:
    """At the line of whoever called the caller."""
    if rows:
        warnings.warn(
            f"{what}: in {rows} of {len(scored.truth)} rows the last of {scored.scores.shape[1]} scores reaches the "
            "threshold; labels beyond it, which may reach it too, count as not predicted: take a larger k",
            UserWarning,
            stacklevel=3,
        )


def read(scores: Any, labels: Any, num_labels: int | None = None) -> Scored:
    """Drops rows that are wholly ignored."""
    if isinstance(scores, tuple):
        if len(scores) != 2 or isinstance(scores[1], tuple):
            raise ValueError(
                f"scores: expected [N, L] or a pair, got a tuple of {len(scores)}; of a model that returns more than "
                "logits, preprocess_logits_for_metrics=topk_logits_for_metrics(k) keeps these alone"
            )
        values, indices = as_array("scores", scores[0]), as_array("indices", scores[1])
    else:
        values, indices = as_array("scores", scores), None
    if values.ndim != 2 or not values.size:
        raise ValueError(f"scores: expected [N, L], or a pair of [N, k], of some rows, got shape {values.shape}")
    if values.dtype.kind != "f":
        raise TypeError(f"scores: expected a floating dtype, got {values.dtype}")
    if np.isnan(values).any():
        raise ValueError(f"scores: expected no NaN, got one in row {np.flatnonzero(np.isnan(values).any(axis=1))[0]}")
    num_labels = _number_of_labels(num_labels, values, indices, labels)
    truth, ignored = _read_labels(labels, num_labels)
    if len(truth) != len(values):
        raise ValueError(f"labels: expected {len(values)} rows like scores, got {len(truth)}")
    if indices is not None:
        _check_indices(indices, values, num_labels)
        values, indices = _falling(values, indices.astype(np.int64), ignored)
    if ignored is not None and (wholly := ignored.all(axis=1)).any():
        known = ~wholly
        if not known.any():
            raise ValueError("labels: expected a row that is not wholly ignored, got none")
        truth, ignored, values = truth[torch.from_numpy(known)], ignored[known], values[known]
        indices = indices if indices is None else indices[known]
    return Scored(truth, ignored, values, indices)


def _number_of_labels(given: int | None, scores: Floats, indices: NDArray[Any] | None, labels: Any) -> int:
    found = None if indices is not None else scores.shape[1]
    if found is None and (isinstance(labels, SparseLabels) or hasattr(labels, "tocsr")):
        found = int(labels.shape[1])
    given = None if given is None else check_count("num_labels", given)
    if given is None and found is None:
        raise ValueError("num_labels: expected a number where scores are of the likeliest labels alone, got None")
    if given is not None and found is not None and given != found:
        raise ValueError(f"num_labels: expected {found} as scores and labels have it, got {given}")
    return int(given if given is not None else found)  # type: ignore[arg-type]


def _read_labels(labels: Any, num_labels: int) -> tuple[SparseLabels, Bools | None]:
    if hasattr(labels, "tocsr"):  # scipy's, which is not imported for it
        labels = labels.tocsr().copy()
        labels.eliminate_zeros()
        if (labels.data != 1).any():
            raise ValueError(f"labels: expected 0 or 1, got {labels.data[labels.data != 1][0]}")
        indptr, indices = (torch.from_numpy(part.astype(np.int64)) for part in (labels.indptr, labels.indices))
        labels = SparseLabels.from_csr(indptr, indices, labels.shape[1])
    if isinstance(labels, Tensor) and labels.layout == torch.sparse_csr:
        labels = SparseLabels.from_sparse_csr(labels)
    if isinstance(labels, SparseLabels):
        if labels.num_labels != num_labels:
            raise ValueError(f"labels: expected {num_labels} labels, got {labels.num_labels}")
        return labels.cpu(), None
    values = as_array("labels", labels)
    if values.ndim != 2:
        raise ValueError(f"labels: expected [N, L] or padded [N, K], got shape {values.shape}")
    if values.shape[1] == num_labels:
        return _read_multi_hot(values)
    if values.dtype.kind not in "iu":
        wanted = f"[N, {num_labels}], or integers padded with {IGNORED}"
        raise ValueError(f"labels: expected {wanted}, got {values.dtype} of shape {values.shape}")
    truth = SparseLabels.from_padded(torch.from_numpy(values.astype(np.int64)), num_labels, IGNORED)
    if truth.nnz != (values != IGNORED).sum():  # zeros and ones of too few labels would else be the labels 0 and 1
        raise ValueError(
            f"labels: expected [N, {num_labels}], or numbers of labels padded with {IGNORED}, each once in a row, "
            f"got some twice in shape {values.shape}"
        )
    return truth, None


def _read_multi_hot(values: NDArray[Any]) -> tuple[SparseLabels, Bools | None]:
    ignored = values == IGNORED
    positive = values == 1
    wrong = ~(ignored | positive | (values == 0))
    if wrong.any():
        row, label = np.argwhere(wrong)[0]
        raise ValueError(
            f"labels: expected 0, 1 or {IGNORED} in multi-hot labels {values.shape}, got {values[row, label]} in row "
            f"{row} (padded indices need a width other than the number of labels: add a column of {IGNORED})"
        )
    return SparseLabels.from_dense(torch.from_numpy(positive)), ignored if ignored.any() else None


def _check_indices(indices: NDArray[Any], scores: Floats, num_labels: int) -> None:
    if indices.dtype.kind not in "iu" or indices.shape != scores.shape:
        raise ValueError(
            f"indices: expected integers {scores.shape} like scores, got {indices.dtype} of shape {indices.shape}"
        )
    if indices.min() < 0 or indices.max() >= num_labels:
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"indices: expected 0 <= label < {num_labels}, got {wrong}")
    twice = (np.diff(np.sort(indices, axis=1), axis=1) == 0).any(axis=1)
    if twice.any():
        raise ValueError(f"indices: expected a row's labels once each, got one twice in row {np.flatnonzero(twice)[0]}")


def _falling(scores: Floats, indices: Integers, ignored: Bools | None) -> tuple[Floats, Integers]:
    """What is ignored comes last; else `topk` has left nothing to do."""
    rank = scores if ignored is None else np.where(np.take_along_axis(ignored, indices, axis=1), -np.inf, scores)
    if (rank[:, 1:] <= rank[:, :-1]).all():
        return scores, indices
    order = np.argsort(-rank, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)
