"""Clinical codes as a ranking task: the description of a code, and the categories that it could stand below.

A query is the description of a family of codes (`clinical_codes.py`), a document the description of one of the 1,918
categories of the classification. How relevant it is, is how much of the way down they share: 3 for the query's own
category, 2 for another of the same block, 1 for another of the same chapter, 0 otherwise.

The candidates of a query are the categories that TF-IDF finds nearest to it, and its own among them.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import simple_icd_10_cm
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score

from clinical_codes import Family, describe

CANDIDATES = 16
LIST_LENGTH = 8
"""Documents of a query in training: its own category, the nearest, and `AT_RANDOM` of its chapter."""
AT_RANDOM = 2


class Categories:
    """All categories that the families have, and which of them are near a text."""

    def __init__(self, families: list[Family]) -> None:
        self.codes = sorted({family.code[:3] for family in families})
        self.texts = [describe(code) for code in self.codes]
        self.number = {code: index for index, code in enumerate(self.codes)}
        above = [simple_icd_10_cm.get_ancestors(code) for code in self.codes]
        self._block, self._chapter = (
            np.unique([way[depth] for way in above], return_inverse=True)[1] for depth in (0, -1)
        )
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        self._vectors = self._vectorizer.fit_transform(self.texts)

    def own(self, families: list[Family]) -> np.ndarray:
        return np.array([self.number[family.code[:3]] for family in families])

    def relevance(self, own: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """`[Q, n]`, of documents `[Q, n]` for queries of the categories `own`."""
        own = own[:, None]
        same_chapter = self._chapter[documents] == self._chapter[own]
        return same_chapter.astype(int) + (self._block[documents] == self._block[own]) + (documents == own)

    def nearest(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The categories by TF-IDF, the nearest first, and how near they are; equally near ones by their code."""
        scores = (self._vectorizer.transform(texts) @ self._vectors.T).toarray()
        order = np.argsort(-scores, axis=1, kind="stable")
        return order, scores

    def of_chapter(self, category: int, count: int, choose: random.Random) -> list[int]:
        return choose.choices(np.flatnonzero(self._chapter == self._chapter[category]).tolist(), k=count)


class Task(NamedTuple):
    """Queries, the numbers of their candidates `[Q, n]`, and how relevant those are."""

    queries: list[str]
    candidates: np.ndarray
    relevance: np.ndarray
    found: float
    """The share of queries whose own category is among the candidates without being put there."""


class Figures(NamedTuple):
    ndcg: float
    """NDCG@10 with the gains 2^relevance - 1."""
    mrr: float
    """The mean of 1 / rank of the query's own category among the candidates."""


def make_task(families: list[Family], categories: Categories) -> Task:
    queries, own = [family.text for family in families], categories.own(families)
    candidates = categories.nearest(queries)[0][:, :CANDIDATES]
    missing = ~(candidates == own[:, None]).any(axis=1)
    candidates[missing, -1] = own[missing]
    candidates = np.sort(candidates, axis=1)  # their order tells nothing
    return Task(queries, candidates, categories.relevance(own, candidates), 1 - missing.mean())


def judge(task: Task, scores: np.ndarray) -> Figures:
    """Of scores `[Q, n]`; among equal ones the query's own category comes last."""
    own = scores[task.relevance == 3][:, None]
    ranks = (scores >= own).sum(axis=1)
    gains = 2.0**task.relevance - 1
    return Figures(float(ndcg_score(gains, scores, k=10)), float((1 / ranks).mean()))


def training_lists(families: list[Family], categories: Categories, seed: int) -> dict[str, list]:
    """Columns for a listwise loss."""
    choose = random.Random(seed)
    queries, own = [family.text for family in families], categories.own(families)
    nearest = categories.nearest(queries)[0]
    columns: dict[str, list] = {"query": queries, "documents": [], "labels": []}
    for category, order in zip(own.tolist(), nearest, strict=True):
        others = [*order[:LIST_LENGTH].tolist(), *categories.of_chapter(category, 3 * AT_RANDOM, choose)]
        distinct = [number for number in dict.fromkeys(others) if number != category]
        kept = [category, *distinct[: LIST_LENGTH - 1 - AT_RANDOM], *distinct[-AT_RANDOM:]]
        choose.shuffle(kept)
        columns["documents"].append([categories.texts[number] for number in kept])
        columns["labels"].append(categories.relevance(np.array([category]), np.array([kept]))[0].tolist())
    return columns
