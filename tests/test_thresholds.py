"""Thresholds against trying each score with scikit-learn's F1, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertloss_fast.metrics import (
    ThresholdedClassifier,
    best_threshold,
    multilabel_metrics,
    topk_logits_for_metrics,
    tune_thresholds,
)
from tests.label_cases import random_case, scikit_learn


@given(st.integers(2, 7), st.integers(2, 3), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_thresholds_against_trying_each(rows: int, num_labels: int, seed: int, ties: bool, ignored: float) -> None:
    f1_score = scikit_learn().f1_score
    logits, labels = random_case(rows, num_labels, seed, ignored)
    labels[0, 0] = 1
    chances = 1 / (1 + np.exp(-(logits.round() if ties else logits)))
    found = tune_thresholds(chances, labels, from_logits=False)

    def best(truth: np.ndarray, scores: np.ndarray) -> float:
        tried = np.unique(scores)[::-1]  # falling: the first of the best is the highest
        return tried[np.argmax([f1_score(truth, scores >= threshold) for threshold in tried])]

    known = labels != -100
    assert found.overall == best(labels[known], chances[known])
    for label in range(num_labels):
        of_label = known[:, label]
        truth, scores = labels[of_label, label], chances[of_label, label]
        assert found.per_label[label] == (best(truth, scores) if (truth == 1).any() else found.overall)
    pair = topk_logits_for_metrics(99)(torch.from_numpy(chances), torch.from_numpy(labels))
    with np.errstate(all="raise"):
        pair = pair[0].clamp(min=0), pair[1]  # -inf, where ignored, is no probability
        again = tune_thresholds(pair, labels, num_labels=num_labels, from_logits=False)
    assert again.overall == found.overall
    assert (again.per_label == found.per_label).all()


def test_thresholds_of_blocks_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_case(30, 11, seed=5)
    whole = tune_thresholds(logits, labels)
    monkeypatch.setattr("bertloss_fast.metrics.inputs.CELLS", 70)
    monkeypatch.setattr("bertloss_fast.metrics.thresholds.CELLS", 70)
    assert (tune_thresholds(logits, labels).per_label == whole.per_label).all()


def test_shrinkage() -> None:
    """Labels have 2, 1 and no positives: their own thresholds have weights 2/3, 1/2 and 0 with shrinkage 1."""
    chances = np.array([[0.9, 0.1, 0.3], [0.8, 0.4, 0.2], [0.1, 0.3, 0.1]])
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    own = tune_thresholds(chances, labels, from_logits=False)
    assert own.overall == 0.4
    assert own.per_label.tolist() == [0.8, 0.4, 0.4]
    shrunk = tune_thresholds(chances, labels, from_logits=False, shrinkage=1)
    assert shrunk.per_label == pytest.approx([(2 * 0.8 + 0.4) / 3, 0.4, 0.4])


def test_tuning_counts_positives_beyond_the_last_score() -> None:
    """Label 2 is in row 1, and neither of the two scores of that row is its own."""
    pair = np.array([[3.0, 2.9], [3.0, -1.0]]), np.array([[0, 1], [1, 0]])
    labels = np.array([[1, 1, 0], [0, 0, 1]])
    with pytest.warns(UserWarning, match="tune_thresholds: in 1 of 2 rows the last of 2 scores reaches") as told:
        found = tune_thresholds(pair, labels, num_labels=3)
    assert [warning.filename for warning in told] == [__file__]
    assert found.per_label[2] == found.overall == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert best_threshold(np.array([1, 0, 1]), np.array([3, 2, 1])) == 1
    assert best_threshold(np.array([1, 0, 1]), np.array([3, 2, 1]), positives=9) == 1
    assert best_threshold(np.array([1, 0, 0]), np.array([3, 2, 1]), positives=2) == 3


def test_a_threshold_is_reached_by_its_own_score() -> None:
    """Tuned thresholds are probabilities that occur, in float32 too; those of bfloat16 logits tie."""
    f1_score = scikit_learn().f1_score
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, labels = random_case(14, 4, seed=6)
        tensor = torch.from_numpy(logits).to(dtype)
        tuned = tune_thresholds(tensor, labels)
        truth, chances = labels, tensor.double().sigmoid() if dtype == torch.float64 else tensor.float().sigmoid()
        figures = multilabel_metrics(4, at=[1], threshold=tuned.overall)(tensor, labels)
        tried = [f1_score(truth, chances >= t, average="micro") for t in chances.unique()]
        assert figures["micro_f1"] == pytest.approx(max(tried))
        macro = multilabel_metrics(4, at=[1], threshold=tuned.per_label)(tensor, labels)["macro_f1"]
        best = [max(f1_score(labels[:, i], chances[:, i] >= t) for t in chances.unique()) for i in range(4)]
        assert macro == pytest.approx(np.mean(best))


LAYOUTS = {
    "strided": lambda logits: torch.stack([logits, logits], dim=2)[..., 0],
    "transposed": lambda logits: logits.T.contiguous().T,
    "doubles": lambda logits: logits.double(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_labels", "batch_size"), [(1, 1), (7, 1), (7, 33)])
def test_a_tuned_threshold_predicts_the_same_everywhere(layout: str, num_labels: int, batch_size: int) -> None:
    """Logits are compared as they are to say what; where they lie in memory must not change their probability."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = LAYOUTS[layout](torch.randn(33, num_labels, generator=generator) * 2)
        labels = logits + 2 * torch.randn(33, num_labels, generator=generator) > 1.5
        expected = logits >= best_threshold(labels, logits)
        classifier = ThresholdedClassifier(
            lambda row, logits=logits: logits[row],
            lambda texts, **options: {"row": torch.tensor([int(text) for text in texts])},
            tune_thresholds(logits, labels).overall,
            batch_size=batch_size,
        )
        found = classifier.predict([str(row) for row in range(33)])
        assert [sorted(row) for row in found] == [row.nonzero()[:, 0].tolist() for row in expected]


def test_a_number_is_the_same_threshold_as_one_for_each_label() -> None:
    """Of a float32 probability that is 0.7 but for its rounding, which is down."""
    logits = torch.logit(torch.tensor([[0.7, 0.1]], dtype=torch.float64)).float()
    for threshold, expected in ((0.7, []), ([0.7, 0.7], []), (float(np.float32(0.7)), [0])):
        classifier = ThresholdedClassifier(lambda: logits, lambda texts, **options: {}, threshold)
        assert classifier.predict(["text"]) == [expected]
        figures = multilabel_metrics(2, [], threshold)(logits, [[1, 0]]) if scikit_learn() else {}
        assert figures["micro_f1"] == len(expected)
