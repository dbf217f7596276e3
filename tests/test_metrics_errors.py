"""What the metrics say of what does not fit, and of a scikit-learn that is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from bertloss_fast import SparseLabels
from bertloss_fast.metrics import (
    best_threshold,
    multilabel_metrics,
    propensities,
    topk_logits_for_metrics,
    tune_thresholds,
)
from tests.label_cases import scikit_learn

DENSE, LABELS = np.zeros((2, 3)), np.eye(3)[:2]
PADDED = np.array([[0, -100], [1, -100]])
PAIR = (np.zeros((2, 2)), np.array([[0, 1], [1, 2]]))
NOT_A_NUMBER = np.array([[0.0, 1.0, 2.0], [0.0, np.nan, 1.0]])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: topk_logits_for_metrics(0), "k: expected at least 1, got 0"),
        (lambda: multilabel_metrics(1), "num_labels: expected at least 2, got 1"),
        (lambda: topk_logits_for_metrics("5"), "k: expected an integer, got str"),
        (lambda: topk_logits_for_metrics(1)(1, None), "logits: expected logits [N, L], got int"),
        (lambda: multilabel_metrics(5.0), "num_labels: expected an integer, got float"),
        (lambda: multilabel_metrics(3, 3), "at: expected a list of integers, got int"),
        (lambda: multilabel_metrics(3, [1.5]), "at: expected an integer, got float"),
        (lambda: multilabel_metrics(3, [1, 4]), "at: expected 1 to num_labels = 3, got (1, 4)"),
        (lambda: multilabel_metrics(3, [1], 1.5), "threshold: expected 0 to 1, got 1.5 to 1.5"),
        (lambda: multilabel_metrics(3, [1], "x"), "threshold: expected a number or [L], got str"),
        (lambda: multilabel_metrics(3, [1], [[0.5] * 3]), "threshold: expected a number or [L], got shape (1, 3)"),
        (lambda: multilabel_metrics(3, [1], tune_thresholds(DENSE, LABELS)), "Thresholds; take its .overall or"),
        (lambda: multilabel_metrics(3, [1], [0.5, 0.5]), "threshold: expected a number or shape (3,), got shape (2,)"),
        (lambda: multilabel_metrics(3, [1], None, [0.5, 0, 1]), "propensities: expected numbers above 0, got 0"),
        (lambda: measure()(np.zeros((0, 3)), LABELS), "scores: expected [N, L], or a pair of [N, k], of some rows"),
        (lambda: measure()(np.zeros((2, 3), int), LABELS), "scores: expected a floating dtype, got int64"),
        (lambda: measure()(NOT_A_NUMBER, LABELS), "scores: expected no NaN, got one in row 1"),
        (lambda: measure()(DENSE, None), "labels: expected an array or a tensor of numbers, got NoneType"),
        (lambda: measure()(DENSE, [[1], [0, 1]]), "labels: expected rows of one length, got list"),
        (
            lambda: measure()((DENSE, (DENSE, DENSE)), LABELS),
            "got a tuple of 2; of a model that returns more than logits",
        ),
        (lambda: measure()((DENSE,) * 3, LABELS), "scores: expected [N, L] or a pair, got a tuple of 3; of a model"),
        (
            lambda: measure()(DENSE, torch.eye(3)[:2].to_sparse()),
            "labels: expected a dense tensor, got torch.sparse_coo",
        ),
        (lambda: measure()(DENSE, [[1, 0], [1, 1]]), "each once in a row, got some twice in shape (2, 2)"),
        (lambda: measure()(DENSE, LABELS[:1]), "labels: expected 2 rows like scores, got 1"),
        (lambda: measure()(DENSE, LABELS / 2), "labels: expected 0, 1 or -100 in multi-hot labels (2, 3), got 0.5 in"),
        (lambda: measure()(DENSE, [[2, -100, -100]] * 2), "add a column of -100"),
        (lambda: measure()(DENSE, LABELS[:, :2]), "labels: expected [N, 3], or integers padded with -100, got float64"),
        (lambda: measure()(DENSE, [[3, -100]] * 2), "labels: expected 0 <= label < 3, got 3 in row 0"),
        (lambda: measure()(DENSE, np.full((2, 3), -100)), "expected a row that is not wholly ignored, got none"),
        (lambda: measure()(DENSE, SparseLabels.from_lists([[], []], 4)), "labels: expected 3 labels, got 4"),
        (lambda: measure()(DENSE, scipy_csr(LABELS / 2)), "labels: expected 0 or 1, got 0.5"),
        (lambda: measure()(np.zeros((2, 4)), LABELS), "num_labels: expected 4 as scores and labels have it, got 3"),
        (
            lambda: measure(threshold=0.5, from_logits=False)(DENSE - 1, LABELS),
            "since from_logits=False, got -1.0 in row 0",
        ),
        (lambda: measure(lrap=True)(PAIR, LABELS), "lrap: expected scores of all labels"),
        (lambda: measure(at=[3])(PAIR, LABELS), "scores: expected at least 3 a row, as many as at has, got 2"),
        (lambda: measure()((DENSE, DENSE), LABELS), "indices: expected integers (2, 3) like scores, got float64"),
        (lambda: measure()((PAIR[0], PAIR[1] + 1), LABELS), "indices: expected 0 <= label < 3, got 3"),
        (lambda: measure()((PAIR[0], np.array([[0, 1], [2, 2]])), LABELS), "labels once each, got one twice in row 1"),
        (lambda: tune_thresholds(PAIR, PADDED), "num_labels: expected a number where scores are of the"),
        (lambda: tune_thresholds(DENSE, 0 * LABELS), "labels: expected at least one positive, got none"),
        (lambda: tune_thresholds(DENSE, LABELS, shrinkage=-1), "shrinkage: expected a number >= 0, got -1"),
        (
            lambda: tune_thresholds(DENSE, LABELS, shrinkage=float("inf")),
            "shrinkage: expected a number from 0 to 1e+30",
        ),
        (lambda: tune_thresholds(DENSE, LABELS, shrinkage="a"), "shrinkage: expected a number >= 0, got str"),
        (lambda: best_threshold([], []), "scores: expected at least one, got none"),
        (lambda: best_threshold([1, 0], [0.5]), "right: expected shape (1,) like scores, got (2,)"),
        (lambda: best_threshold([1, -100], [0.5, 0.4]), "right: expected 0 or 1, got -100"),
        (lambda: best_threshold([1, 0], [0.5, np.nan]), "scores: expected no NaN, got one"),
        (lambda: best_threshold([1, 1], [0.5, 0.4], 1), "positives: expected at least 2, those of right, got 1"),
        (lambda: propensities([1, 2], 2), "num_samples: expected at least 3"),
        (lambda: propensities([1, 2], "10"), "num_samples: expected an integer, got str"),
        (lambda: propensities([0, 2], 10, b=0), "b: expected a number > 0, got 0"),
        (lambda: propensities([1, 9], 5), "label_counts: expected 0 to num_samples = 5, got 1 to 9"),
        (lambda: propensities([[1]], 5), "label_counts: expected numbers [L], got int64 of shape (1, 1)"),
    ],
)
def test_errors_are_sentences(call: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        call()


def measure(**options: Any) -> Any:
    if options.keys() & {"lrap", "threshold"}:
        scikit_learn()
    return multilabel_metrics(3, **{"at": [1], "threshold": None} | options)


def scipy_csr(labels: np.ndarray) -> Any:
    scikit_learn()  # brings scipy
    return pytest.importorskip("scipy.sparse").csr_matrix(labels)


def test_without_scikit_learn() -> None:
    """The import, ranking figures and thresholds need neither it nor scipy; F1 says what is missing."""
    program = """
import sys
sys.modules["sklearn"] = sys.modules["sklearn.metrics"] = sys.modules["scipy"] = None
import numpy as np
from bertloss_fast.metrics import multilabel_metrics, tune_thresholds
scores, labels = np.array([[1.0, 2.0]]), np.array([[0, 1]])
print(multilabel_metrics(2, [1], threshold=None)(scores, labels), tune_thresholds(scores, labels).overall)
try:
    multilabel_metrics(2, [1])
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("{'precision@1': 1.0, 'ndcg@1': 1.0} 0.88")
    assert 'F1 and LRAP need scikit-learn: pip install "bertloss-fast[metrics]"' in result.stdout
