"""Batches of items with lists of labels, as a DataLoader makes them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from target_cases import ROWS, L, check
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from bertloss_fast import SparseLabels, collate_labels


class Item(NamedTuple):
    labels: list[int]
    x: float


def join(texts: list[str]) -> str:
    return "".join(texts)


def keys_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"seen": [sorted(item) for item in items]}


# collate, an item of its number and its labels, the batch, in which Y stands for the labels
Y, IDS = "labels", [0, 1, 2, 3]
BATCHES: dict[str, tuple[Callable[[list[Any]], Any], Callable[[int, list[int]], Any], Any]] = {
    "tuples": (collate_labels(L), lambda i, row: (i, row), [IDS, Y]),
    "lists": (collate_labels(L), lambda i, row: [i, i, row], [IDS, IDS, Y]),
    "the first": (collate_labels(L, key=0), lambda i, row: (set(row), i), [Y, IDS]),
    "named tuples": (collate_labels(L, key=0), lambda i, row: Item(row, i), Item(Y, IDS)),
    "dicts": (
        collate_labels(L),
        lambda i, row: {"labels": torch.tensor(row), "x": torch.tensor([i])},
        {"x": [[0], [1], [2], [3]], "labels": Y},
    ),
    "another key": (collate_labels(L, key="y"), lambda i, row: {"y": row, "labels": i}, {"labels": IDS, "y": Y}),
    "labels alone": (collate_labels(L), lambda i, row: {"labels": row}, {"labels": Y}),
    "another collate": (collate_labels(L, collate=join), lambda i, row: (str(i), row), ["0123", Y]),
    "another collate of dicts": (
        collate_labels(L, collate=keys_of),
        lambda i, row: {"labels": row, "text": str(i), "id": i},
        {"seen": [["id", "text"]] * 4, "labels": Y},
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_collate(case: str) -> None:
    collate, item, expected = BATCHES[case]
    items = [item(i, row) for i, row in enumerate(ROWS)]
    before = repr(items)

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, SparseLabels):
            check(leaf, ROWS, L)
            return Y
        return leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf

    for function in (collate, pickle.loads(pickle.dumps(collate))):  # as spawned workers get it
        batch = function(items)
        got = pytree.tree_map(plain, batch, is_leaf=lambda leaf: isinstance(leaf, SparseLabels))
        assert (type(batch), got) == (type(expected), expected)
    assert repr(items) == before


def test_data_loader_with_workers() -> None:
    dataset: Any = [(torch.tensor([float(i)]), ROWS[i % 4]) for i in range(12)]
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=collate_labels(L), timeout=300)
    batches = list(loader)
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(12))
    check(SparseLabels.cat([labels for _, labels in batches]), ROWS * 3, L)
