"""Precision, PSP and propensities against loops over rows and a case by hand: what needs no scikit-learn."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertloss_fast.metrics import multilabel_metrics, propensities, topk_logits_for_metrics
from tests.label_cases import random_case

AT = (1, 2)


def naive_precision(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    hits = 0
    for scores, truth in zip(logits, labels, strict=True):
        known = [label for label in range(len(truth)) if truth[label] != -100]
        hits += sum(truth[label] == 1 for label in sorted(known, key=lambda label: -scores[label])[:k])
    return hits / (k * len(logits))


def naive_psp(logits: np.ndarray, labels: np.ndarray, propensity: np.ndarray, k: int) -> float:
    gained = best = 0.0
    for scores, truth in zip(logits, labels, strict=True):
        gain = truth / propensity
        gained += sum(gain[label] for label in sorted(range(len(truth)), key=lambda label: -scores[label])[:k])
        best += sum(sorted(gain, reverse=True)[:k])
    return gained / best if best else 0.0


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.4]))
def test_precision(rows: int, num_labels: int, seed: int, ignored: float) -> None:
    """Rows of which nothing is known are left out."""
    logits, labels = random_case(rows, num_labels, seed, ignored)
    labels[0, :2] = 0, 1
    figures = multilabel_metrics(num_labels, AT, None)(logits, labels)
    some = (labels != -100).any(1)
    for k in AT:
        assert figures[f"precision@{k}"] == pytest.approx(naive_precision(logits[some], labels[some], k))


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_psp(rows: int, num_labels: int, seed: int) -> None:
    logits, labels = random_case(rows, num_labels, seed)
    propensity = propensities(labels.sum(0), num_samples=50)
    figures = multilabel_metrics(num_labels, AT, None, propensity)(logits, labels)
    for k in AT:
        assert figures[f"psp@{k}"] == pytest.approx(naive_psp(logits, labels, propensity, k))


def test_psp_by_hand() -> None:
    """Propensities 1/2, 1/4, 1/5, so that labels are worth 2, 4, 5.

    Row 0 has labels 0 and 2, its scores fall in the order 0, 1, 2: at k = 1 it gains 2 of 5 possible, at k = 2 it gains
    2 + 0 of 5 + 2. Row 1 has label 1, and scores in the order 2, 1, 0: it gains 0 of 4, then 4 of 4.
    PSP@1 is (2 + 0)/(5 + 4) = 2/9, PSP@2 (2 + 4)/(7 + 4) = 6/11; not normalised 2/2 = 1 and 6/(2 2) = 1.5.
    """
    scores = np.array([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]])
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    figures = multilabel_metrics(3, (1, 2), None, [0.5, 0.25, 0.2])(scores, labels)
    assert figures["psp@1"] == pytest.approx(2 / 9)
    assert figures["psp@2"] == pytest.approx(6 / 11)
    assert (figures["psp_raw@1"], figures["psp_raw@2"]) == (1, 1.5)


def test_propensities_of_the_paper() -> None:
    for a, b in ((0.55, 1.5), (0.5, 0.4)):
        c = (math.log(200) - 1) * (b + 1) ** a
        expected = [1 / (1 + c * math.exp(-a * math.log(count + b))) for count in (0, 7, 200)]
        for counts in ([0, 7, 200], np.array([0, 7, 200]), torch.tensor([0, 7, 200])):
            assert propensities(counts, 200, a, b).tolist() == pytest.approx(expected)


@given(st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]))
def test_the_likeliest_labels_are_enough(rows: int, num_labels: int, seed: int, ignored: float) -> None:
    """Figures of two logits a row are those of all."""
    logits, labels = random_case(rows, num_labels, seed, ignored)
    labels[0, :2] = 0  # a row at least is known in part
    measure = multilabel_metrics(num_labels, AT, None, np.linspace(0.1, 0.9, num_labels))
    pair = topk_logits_for_metrics(2)(torch.from_numpy(logits), torch.from_numpy(labels))
    assert measure(pair, labels) == pytest.approx(measure(logits, labels))


@pytest.mark.parametrize(("num_labels", "at"), [(2, [1]), (3, [1, 3]), (4, [1, 3]), (5, [1, 3, 5]), (9, [1, 3, 5])])
def test_places_by_default(num_labels: int, at: list[int]) -> None:
    figures = multilabel_metrics(num_labels, threshold=None)(*random_case(4, num_labels, seed=4))
    assert list(figures) == [f"{name}@{k}" for name in ("precision", "ndcg") for k in at]


def test_forms_of_logits() -> None:
    """Of a model: a tensor, a tuple or list that begins with it, an output."""
    logits = torch.tensor([[0.5, -1.0, 2.0]])
    for output in (logits, (logits, None), [logits], SimpleNamespace(logits=logits)):
        scores, labels = topk_logits_for_metrics(2)(output, None)
        assert (scores.tolist(), labels.tolist()) == ([[2.0, 0.5]], [[2, 0]])


def test_workers_can_pickle_them() -> None:
    logits, labels = random_case(5, 6, seed=7)
    measure, topk = multilabel_metrics(6, threshold=None), topk_logits_for_metrics(2)
    assert pickle.loads(pickle.dumps(measure))(logits, labels) == measure(logits, labels)
    assert pickle.loads(pickle.dumps(topk))(torch.from_numpy(logits), None)[0].shape == (5, 2)
