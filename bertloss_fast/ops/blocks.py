"""The CPU's blocks: parts of a matrix small enough that what is computed from them stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Block = tuple[slice, slice]

# Elements that one thread works on at a time. Half as many are better in a cache of a core's own, but then what a block
# costs in Python counts for more.
_BLOCK = 196608


def block_size(tensor: Tensor) -> int:
    """How many elements to work on at a time: on a GPU all of them, since no cache of a core's own is to be kept."""
    return _BLOCK * torch.get_num_threads() if tensor.device.type == "cpu" else max(tensor.numel(), 1)


def blocks(matrix: Tensor) -> Iterator[Block]:
    """Rectangles of rows and columns that cover a matrix: whole rows where they about fit, else equal parts of one."""
    rows, cols = matrix.shape
    size = block_size(matrix)
    col_step = -(-cols // max(round(cols / size), 1))
    row_step = max(round(size / col_step), 1)
    for row in range(0, rows, row_step):
        for col in range(0, cols, col_step):
            yield slice(row, min(row + row_step, rows)), slice(col, min(col + col_step, cols))


class NotProbabilitiesError(ValueError):
    """A label that is not from 0 to 1, seen by a look at hard ones."""


def has_soft_labels(targets: Tensor, *, strict: bool = False) -> bool:
    """Whether the longer formula is needed: a label other than 0 and 1, or the derivative by one, or no free look.

    A ``strict`` look raises :class:`NotProbabilitiesError`.
    """
    if not targets.is_floating_point() or targets.numel() == 0:
        return False
    if targets.requires_grad or targets.device.type != "cpu":
        return True
    if targets.numel() < 8192 and not strict:
        return not torch.equal(targets * targets, targets)
    whole = not targets.is_contiguous()
    parts = (targets,) if whole else torch.split(targets.view(-1), block_size(targets))
    room = torch.empty_like(parts[0])
    return any(_has_values_between(part, room[: len(part)], strict) for part in parts)


def _has_values_between(targets: Tensor, room: Tensor, strict: bool) -> bool:
    # As y * y == y, three times as fast on a large tensor; NaN is not 0 either.
    low, high = (value.item() for value in torch.addcmul(targets, targets, targets, value=-1, out=room).aminmax())
    if strict and not low >= 0:
        raise NotProbabilitiesError
    return not low == high == 0
