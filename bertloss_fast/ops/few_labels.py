"""Batches with few labels: nearly all targets are 0, whose formulas are shorter, and the others go by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.sigmoid import Operands
from .blocks import Block, blocks, has_soft_labels, is_one_block
from .operands import as_matrices, as_matrix, is_plain, parts, single_elements
from .sparse import by_block, row_of_label

# Few is at most one in so many: an element by itself costs as much as a dozen in a block.
_FEW = 64
# A block with so many times what is few ends the search.
_FULL = 4
_NOT_INDEXED = (torch.uint16, torch.uint32, torch.uint64)  # torch gathers nothing of these


class Found(NamedTuple):
    """What a look at dense targets tells."""

    soft: bool | None  # whether any is other than 0 and 1; None for the look at each block to tell
    places: Tensor | None  # as in ``Operands``


class FewLabels(NamedTuple):
    """A call taken apart."""

    zeros: Operands  # matrices, of which no targets are left
    rows: Tensor  # [P], of the others
    cols: Tensor  # [P]
    others: Operands  # matrices [P, 1]

    def blocks(self) -> Iterator[tuple[Block, Operands, Tensor]]:
        """Of the zeros; and where in a block the others are, counted row after row."""
        num_labels = self.zeros.inputs.shape[1]
        found = list(parts(self.zeros))
        offsets = by_block(self.rows * num_labels + self.cols, [block for block, _ in found], self.zeros.inputs.shape)
        for (block, part), of_block in zip(found, offsets, strict=True):
            yield block, part, of_block


def find_few(targets: Tensor, *, later: bool = False) -> Found:
    """A look at dense targets; not to be asked for where it would wait for a device.

    Whether many labels are soft can be left for ``later``, when each block is in the cache.
    """
    if not is_plain(targets) or targets.requires_grad:
        return Found(has_soft_labels(targets), None)
    places = _places(targets)
    if places is not None:
        return Found(has_soft_labels(torch.take(targets, places)), places)
    return Found(None if later and targets.is_floating_point() else has_soft_labels(targets), None)


def _places(targets: Tensor) -> Tensor | None:
    if is_one_block(targets) or targets.dtype in _NOT_INDEXED:
        return None
    matrix = as_matrix(targets, targets)
    assert matrix is not None
    limit = targets.numel() // _FEW
    found, begin, total = [], 0, 0
    for block in blocks(matrix):
        flags = matrix[block].bool().numpy()
        # numpy counts and finds them several times as fast as torch, and counts ten times as fast as it finds.
        count = np.count_nonzero(flags)
        total += count
        if total > limit or count > flags.size * _FULL // _FEW:
            return None
        found.append(np.flatnonzero(flags) + begin)
        begin += flags.size
    return torch.from_numpy(np.concatenate(found))


def take_apart(operands: Operands) -> FewLabels | None:
    """None where labels are many, or nobody knows where they are."""
    operands = as_matrices(operands)
    num_labels = operands.inputs.shape[1]
    if operands.crow is not None and operands.col is not None:
        if len(operands.col) > operands.inputs.numel() // _FEW:
            return None
        places = row_of_label(operands.crow, operands.col) * num_labels + operands.col
        places = torch.unique_consecutive(places)  # a label that comes twice counts once
    elif operands.places is not None:
        places = operands.places
    else:
        return None
    rows, cols = places // num_labels, places % num_labels
    zeros = operands._replace(targets=None, crow=None, col=None, places=None)
    return FewLabels(zeros, rows, cols, single_elements(operands, rows, cols))
