"""How a DataLoader makes SparseLabels of its items."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import default_collate

from .targets import SparseLabels


def collate_labels(
    num_labels: int, key: str | int | None = None, collate: Callable[[list[Any]], Any] = default_collate
) -> Callable[[list[Any]], Any]:
    """A DataLoader's ``collate_fn`` that makes SparseLabels of the items' lists of labels; workers can pickle it.

    Args:
        num_labels: how many labels there are, L.
        key: where an item has its labels: a dict's key, by default ``"labels"``; a tuple's or list's place, by default
            the last.
        collate: makes a batch of the rest: of the dicts without that key, or of each other place of the tuples.

    Returns:
        A function of a list of items. It returns a dict, or for tuples and lists a list, as ``default_collate`` does,
        and raises TypeError or ValueError if an item has no such key or its labels do not fit.

    Example::

        >>> from bertloss_fast import collate_labels
        >>> collate_labels(num_labels=5)([(1, [3]), (2, [4, 0])])
        [tensor([1, 2]), SparseLabels(shape=(2, 5), nnz=3, device='cpu')]
    """
    SparseLabels.from_lists([], num_labels)  # an error here is read sooner than one in a worker
    return functools.partial(_collate, num_labels=num_labels, key=key, collate=collate)


def _collate(batch: list[Any], num_labels: int, key: Any, collate: Callable[[list[Any]], Any]) -> Any:
    if not batch:
        raise ValueError("batch: expected at least one item, got none")
    first = batch[0]
    if not isinstance(first, Mapping | tuple | list):
        raise TypeError(f"batch: expected dicts, tuples or lists, got {type(first).__name__}")
    key = key if key is not None else "labels" if isinstance(first, Mapping) else -1
    try:
        rows = [item[key] for item in batch]
    except (LookupError, TypeError) as error:
        raise ValueError(f"key: expected a key or place that every item has, got {key!r}") from error
    labels = SparseLabels.from_lists(rows, num_labels)
    if isinstance(first, Mapping):
        rest = collate([{name: value for name, value in item.items() if name != key} for item in batch])
        return {**rest, key: labels}
    if any(len(item) != len(first) for item in batch):
        raise ValueError(f"batch: expected items of one length, got {sorted({len(item) for item in batch})}")
    place = range(len(first))[key]
    columns: list[Any] = [list(column) for column in zip(*batch, strict=True)]
    made: list[Any] = [labels if at == place else collate(column) for at, column in enumerate(columns)]
    return type(first)(*made) if hasattr(first, "_fields") else made
