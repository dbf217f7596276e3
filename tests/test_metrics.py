"""bertloss_fast.metrics against scikit-learn and torchmetrics, in all the forms that scores and labels have."""

from __future__ import annotations

import doctest
import math
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bertloss_fast.metrics
from bertloss_fast import SparseLabels
from bertloss_fast.metrics import multilabel_metrics, topk_logits_for_metrics, tune_thresholds
from tests.label_cases import padded, random_case, scikit_learn

sklearn_metrics = scikit_learn()
sparse = pytest.importorskip("scipy.sparse")

AT = (1, 2)


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_figures_of_all_labels(rows: int, num_labels: int, seed: int) -> None:
    """A threshold between two logits: the libraries' own comparison and ours cannot differ by a rounding."""
    logits, labels = random_case(rows, num_labels, seed)
    figures = multilabel_metrics(num_labels, AT, 0.6, lrap=True)(logits, labels)
    predicted = logits >= math.log(0.6 / 0.4)
    for k in AT:
        assert figures[f"ndcg@{k}"] == pytest.approx(sklearn_metrics.ndcg_score(labels, logits, k=k))
    for average in ("micro", "macro", "samples"):
        expected = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        assert figures[f"{average}_f1"] == pytest.approx(expected)
    per_label = sklearn_metrics.f1_score(labels, predicted, average=None, zero_division=0)
    assert figures["macro_f1_occurring"] == pytest.approx(per_label[labels.any(0)].mean() if labels.any() else 0)
    assert figures["lrap"] == pytest.approx(sklearn_metrics.label_ranking_average_precision_score(labels, logits))


def test_figures_of_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification", reason="pip install torchmetrics")
    logits, labels = map(torch.from_numpy, random_case(40, 9, seed=1))
    figures = multilabel_metrics(9, lrap=True, threshold=0.4)(logits, labels)
    for average in ("micro", "macro"):
        expected = classification.multilabel_f1_score(logits.sigmoid(), labels, 9, threshold=0.4, average=average)
        assert figures[f"{average}_f1"] == pytest.approx(expected.item())
    expected = classification.multilabel_ranking_average_precision(logits, labels, 9)
    assert figures["lrap"] == pytest.approx(expected.item(), rel=1e-6)


FORMS = {
    "bool": lambda labels: labels.astype(bool),
    "float tensor": lambda labels: torch.from_numpy(labels).float(),
    "uint8 tensor": lambda labels: torch.from_numpy(labels).to(torch.uint8),
    "lists": lambda labels: labels.tolist(),
    "padded": padded,
    "padded int32 tensor": lambda labels: torch.from_numpy(padded(labels)).int(),
    "SparseLabels": lambda labels: SparseLabels.from_dense(torch.from_numpy(labels)),
    "scipy CSR": sparse.csr_matrix,
    "scipy COO with zeros stored": lambda labels: sparse.coo_matrix(
        (labels.ravel(), tuple(np.indices(labels.shape).reshape(2, -1))), labels.shape
    ),
    "torch CSR": lambda labels: torch.from_numpy(labels).to_sparse_csr(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labels(form: str) -> None:
    logits, labels = random_case(12, 6, seed=2)
    measure = multilabel_metrics(6, AT, lrap=True, propensities=np.linspace(0.1, 0.9, 6))
    assert measure(logits, FORMS[form](labels)) == measure(logits, labels)


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]))
def test_f1_of_all_labels_as_a_pair(rows: int, num_labels: int, seed: int, ignored: float) -> None:
    logits, labels = random_case(rows, num_labels, seed, ignored)
    labels[0, :2] = 0  # a row at least is known in part
    measure = multilabel_metrics(num_labels, AT, np.linspace(0.2, 0.7, num_labels))
    found = measure(topk_logits_for_metrics(99)(torch.from_numpy(logits), torch.from_numpy(labels)), labels)
    assert found.pop("f1_rows_cut_off") == 0
    assert found == pytest.approx(measure(logits, labels))


def test_a_pair_in_any_order() -> None:
    logits, labels = random_case(5, 6, seed=3)
    indices = np.tile(np.arange(6)[::-1], (5, 1))
    measure = multilabel_metrics(6, AT)
    expected = measure(logits, labels) | {"f1_rows_cut_off": 0}
    assert measure((logits[:, ::-1].copy(), indices), labels) == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_ignored_entries(rows: int, num_labels: int, seed: int) -> None:
    """As if they were not there: scikit-learn on what is left of each row, each column or all cells."""
    logits, labels = random_case(rows, num_labels, seed, ignored=0.4)
    labels[0, :2] = 0, 1
    figures = multilabel_metrics(num_labels, AT, lrap=True)(logits, labels)
    known = labels != -100
    some = known.any(1)
    truth, predicted = (labels == 1) & known, (logits >= 0) & known

    def mean_over_rows(score: Any) -> float:
        return float(np.mean([score(labels[row][known[row]], logits[row][known[row]]) for row in np.flatnonzero(some)]))

    def lrap(of_row: np.ndarray, scores: np.ndarray) -> float:
        return sklearn_metrics.label_ranking_average_precision_score([of_row], [scores])

    def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
        return float(sklearn_metrics.f1_score(truth, predicted, zero_division=0)) if len(truth) else 0.0

    assert figures["lrap"] == pytest.approx(mean_over_rows(lrap))
    assert figures["samples_f1"] == pytest.approx(mean_over_rows(lambda truth, scores: f1(truth, scores >= 0)))
    assert figures["micro_f1"] == pytest.approx(f1(truth[known], predicted[known]))
    columns = [f1(truth[known[:, label], label], predicted[known[:, label], label]) for label in range(num_labels)]
    assert figures["macro_f1"] == pytest.approx(np.mean(columns))


def test_rows_without_labels_and_infinite_logits() -> None:
    """Zero but for LRAP, as scikit-learn has them."""
    logits = np.array([[-np.inf, 3.0, np.inf], [1.0, 2.0, -np.inf]])
    figures = multilabel_metrics(3, AT, lrap=True, propensities=[0.5] * 3)(logits, np.zeros((2, 3), int))
    assert figures.pop("lrap") == 1
    assert set(figures.values()) == {0.0}
    figures = multilabel_metrics(3, [1], lrap=True)(logits, [[0, 0, 1], [0, 1, 0]])
    assert (figures["precision@1"], figures["lrap"], figures["micro_f1"]) == (1, 1, 2 * 2 / (2 + 4))


def test_warns_of_rows_that_are_cut_off() -> None:
    """The second of three logits a row reaches 0.5 in rows 0 and 1, and 0.2 in all of them."""
    logits = torch.tensor([[3.0, 2.0, 1.0], [2.0, 0.0, -1.0], [2.0, -1.0, -1.1], [-1.0, -1.2, -3.0]])
    labels = torch.tensor([[0, 1, 2], [0, -100, -100], [0, -100, -100], [-100, -100, -100]])
    pair, padded_labels = topk_logits_for_metrics(2)(logits, None), torch.nn.functional.pad(labels, (0, 1), value=-100)
    for threshold, rows in ((0.5, 2), ([0.9, 0.9, 0.2], 4)):
        with pytest.warns(UserWarning, match=f"in {rows} of 4 rows the last of 2 scores reaches the threshold") as told:
            assert multilabel_metrics(3, [1], threshold)(pair, padded_labels)["f1_rows_cut_off"] == rows
        assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = multilabel_metrics(3, [1], 0.9)(pair, padded_labels)
    assert figures["f1_rows_cut_off"] == 0
    predicted = logits.sigmoid() >= 0.9
    dense = SparseLabels.from_padded(padded_labels, 3).to_dense()
    assert figures["micro_f1"] == pytest.approx(sklearn_metrics.f1_score(dense, predicted, average="micro"))


def test_never_holds_all_scores() -> None:
    """300 rows of a million labels: a byte each would be 286 MiB."""
    rows, num_labels = 300, 1_000_000
    generator = np.random.default_rng(0)
    scores = np.sort(generator.normal(size=(rows, 100)).astype(np.float32) - 3)[:, ::-1]
    step = num_labels // 100  # a label in each hundredth: a row has none twice
    pair = scores, generator.permuted(np.arange(100) * step + generator.integers(0, step, (rows, 100)), axis=1)
    labels = np.concatenate([pair[1][:, :3], np.full((rows, 1), -100)], axis=1)
    tracemalloc.start()
    figures = multilabel_metrics(num_labels, propensities=np.full(num_labels, 0.5))(pair, labels)
    tune_thresholds(pair, labels, num_labels=num_labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert figures["precision@3"] == figures["ndcg@3"] == figures["psp@3"] == 1
    assert peak < 150e6


@pytest.mark.parametrize("name", bertloss_fast.metrics.__all__)
def test_examples_of_docstrings(name: str) -> None:
    examples = doctest.DocTestFinder().find(getattr(bertloss_fast.metrics, name), name, globs={})
    assert any(test.examples for test in examples) or name == "Thresholds"
    assert all(doctest.DocTestRunner().run(test).failed == 0 for test in examples)
