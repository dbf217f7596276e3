"""The thresholds with the highest F1 on held-out rows, found by sorting the scores once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..functional.checks import check_number
from .checks import as_array
from .inputs import CELLS, Bools, Floats, Integers, Scored, read, warn_of_rows_cut_off


class Thresholds(NamedTuple):
    """Probabilities: a label is predicted where its probability reaches the threshold."""

    overall: float
    """One for all labels, with the highest micro-F1."""
    per_label: NDArray[np.float64]
    """``[L]``, each with the highest F1 of its label."""


def tune_thresholds(
    scores: Any,
    labels: Any,
    *,
    num_labels: int | None = None,
    from_logits: bool = True,
    shrinkage: float = 0.0,
) -> Thresholds:
    """The threshold for all labels with the highest micro-F1, and that of each label with its highest F1.

    Every score is tried, and each threshold is a probability that occurs: the lowest that is still predicted. Of
    thresholds that are equally good it is the highest. A label without positives has the overall one, and so has one
    whose positives are all beyond the k-th score. A few positives say little about a label's threshold:
    ``shrinkage`` pulls it to the overall one as that many positives would.

    Args:
        scores, labels: of held-out rows, not of those trained on, in any form that ``multilabel_metrics`` takes.
        num_labels: needed where neither scores nor labels tell it.
        from_logits: whether scores are logits or probabilities.
        shrinkage: s in ``(n t + s overall) / (n + s)``, where n is the number of the label's positives.

    Raises:
        ValueError, TypeError: what does not fit, NaN, no row, no positive.

    Example::

        >>> import torch
        >>> from bertloss_fast.metrics import tune_thresholds
        >>> probabilities = torch.tensor([[0.9, 0.3], [0.6, 0.2], [0.2, 0.1]])
        >>> tuned = tune_thresholds(probabilities, torch.tensor([[1, 1], [1, 1], [0, 0]]), from_logits=False)
        >>> round(tuned.overall, 2), tuned.per_label.round(2)
        (0.2, array([0.6, 0.2]))
    """
    shrinkage = check_number("shrinkage", shrinkage, 0)
    scored = read(scores, labels, num_labels)
    positives = scored.positives
    if not positives.any():
        raise ValueError("labels: expected at least one positive, got none")
    chances = scored.probabilities(from_logits)
    right = scored.is_right(scored.indices) if scored.indices is not None else scored.truth.to_dense().numpy()
    known = chances >= 0
    overall = best_threshold(right[known], chances[known], int(positives.sum()))
    per_label = np.full(scored.num_labels, overall)
    for some, hits, values in _by_label(scored, right, chances):
        _tune_each(per_label, some, hits, values, positives)
    if shrinkage:
        per_label += (overall - per_label) * shrinkage / (positives + shrinkage)
    cut_off = scored.rows_cut_off(chances, min(overall, per_label.min()))
    warn_of_rows_cut_off("tune_thresholds", cut_off, scored)
    return Thresholds(overall, per_label)


def best_threshold(right: Any, scores: Any, positives: int | None = None) -> float:
    """The lowest score that a threshold lets pass where micro-F1 is highest; the highest such score of equals.

    Without any positive F1 is 0 everywhere, and that is the highest score of all.

    Args:
        right: whether each score is a positive's, 1 or 0, in the shape of ``scores``.
        scores: of any range; an array, a tensor or a list.
        positives: how many positives there are, where some have no score; else those of ``right``.

    Raises:
        ValueError, TypeError: shapes that differ, neither 0 nor 1, NaN, no score, fewer positives than ``right`` has.

    Example::

        >>> import numpy as np
        >>> from bertloss_fast.metrics import best_threshold
        >>> best_threshold(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1]))
        0.7
    """
    right, scores = as_array("right", right), as_array("scores", scores)
    if right.shape != scores.shape:
        raise ValueError(f"right: expected shape {scores.shape} like scores, got {right.shape}")
    if not scores.size:
        raise ValueError("scores: expected at least one, got none")
    if np.isnan(scores).any():
        raise ValueError("scores: expected no NaN, got one")
    if (wrong := (right != 0) & (right != 1)).any():
        raise ValueError(f"right: expected 0 or 1, got {right[wrong][0]:g}")
    hits = int(right.sum())
    if positives is not None and positives < hits:
        raise ValueError(f"positives: expected at least {hits}, those of right, got {positives}")
    order = np.argsort(scores, axis=None)[::-1]
    total = np.array([hits if positives is None else positives])
    cuts, _ = _best_cuts(right.ravel()[order], scores.ravel()[order], np.zeros(1, np.int64), total)
    return float(cuts[0])


def _by_label(scored: Scored, right: Bools, chances: Floats) -> Iterator[tuple[Integers, Bools, Floats]]:
    """Labels, hits and probabilities of known cells, flat, whole labels at a time."""
    if scored.indices is not None:
        known = chances >= 0
        yield scored.indices[known], right[known], chances[known]
        return
    width = max(1, CELLS // len(chances))
    for start in range(0, scored.num_labels, width):
        part = chances[:, start : start + width]
        known = part >= 0
        yield np.nonzero(known)[1] + start, right[:, start : start + width][known], part[known]


def _tune_each(per_label: Floats, labels: Integers, right: Bools, scores: Floats, positives: Integers) -> None:
    """Writes the thresholds of the labels of which a positive has a score."""
    order = np.lexsort((-scores, labels))
    present, starts = np.unique(labels[order], return_index=True)
    cuts, f1 = _best_cuts(right[order], scores[order], starts, positives[present])
    found = f1 > 0
    per_label[present[found]] = cuts[found]


def _best_cuts(
    right: Bools | NDArray[np.integer[Any]], scores: Floats, starts: Integers, positives: Integers
) -> tuple[Floats, Floats]:
    """Of groups of falling scores, which begin at `starts`: the best cut's score and its F1, `[groups]`.

    F1 after the first n scores of a group is 2 hits / (positives + n). A cut inside a tie is none.
    """
    sizes = np.diff(np.append(starts, len(scores)))
    hits = right.cumsum(dtype=np.int64)
    before = np.where(starts > 0, hits[starts - 1], 0)
    places = np.arange(1, len(scores) + 1) - np.repeat(starts, sizes)
    f1 = 2 * (hits - np.repeat(before, sizes)) / (np.repeat(positives, sizes) + places)
    ends_a_tie = np.append(scores[1:] != scores[:-1], True)
    ends_a_tie[starts[1:] - 1] = True
    f1[~ends_a_tie] = -1
    best = np.maximum.reduceat(f1, starts)
    candidates = np.flatnonzero(f1 == np.repeat(best, sizes))
    return scores[candidates[np.searchsorted(candidates, starts)]], best
