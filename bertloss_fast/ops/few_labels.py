"""Batches with few labels: nearly all targets are 0, whose formulas are shorter, and the others go by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.sigmoid import Operands
from .blocks import Block, block_size, blocks, has_soft_labels
from .operands import as_matrices, as_matrix, parts
from .sparse import row_of_label

# Few is at most one in so many: an element by itself costs as much as a dozen in a block.
_FEW = 64
_NOT_INDEXED = (torch.uint16, torch.uint32, torch.uint64)


class Look(NamedTuple):
    """What a look at dense targets found."""

    soft: bool  # whether any is other than 0 and 1
    places: Tensor | None  # as in ``Operands``


class Split(NamedTuple):
    """A call whose targets are few."""

    zeros: Operands  # matrices, as if every target were 0
    rows: Tensor  # [P], of the others
    cols: Tensor  # [P]
    others: Operands  # matrices [P, 1]

    def parts(self) -> Iterator[tuple[Block, Operands, tuple[Tensor, ...]]]:
        """The blocks of the zeros; and where in a block the others are."""
        num_labels = self.zeros.inputs.shape[1]
        found = list(parts(self.zeros))
        starts = torch.tensor([[rows.start, cols.start] for (rows, cols), _ in found])
        begins = starts[:, 0] * num_labels + starts[:, 1]
        counts = torch.searchsorted(begins, self.rows * num_labels + self.cols, right=True).bincount(
            minlength=len(found) + 1
        )[1:]
        of_blocks = torch.stack([self.rows, self.cols], 1) - starts.repeat_interleave(counts, 0)
        for (block, part), others in zip(found, torch.split(of_blocks, counts.tolist()), strict=True):
            yield block, part, others.unbind(1)


def look(targets: Tensor) -> Look:
    """At dense targets that nobody has to wait for."""
    places = _places(targets) if targets.device.type == "cpu" and not targets.requires_grad else None
    return Look(has_soft_labels(targets if places is None else torch.take(targets, places)), places)


def _places(targets: Tensor) -> Tensor | None:
    if targets.numel() <= block_size(targets) or targets.dtype in _NOT_INDEXED:
        return None
    matrix = as_matrix(targets, targets)
    assert matrix is not None
    limit = targets.numel() // _FEW
    found, begin, total = [], 0, 0
    for block in blocks(matrix):
        of_block = matrix[block]
        # numpy finds them several times as fast as torch.
        places = np.flatnonzero(of_block.bool().numpy())
        total += len(places)
        if total > limit:
            return None
        found.append(places + begin)
        begin += of_block.numel()
    return torch.from_numpy(np.concatenate(found))


def split(operands: Operands) -> Split | None:
    """None where labels are many, or nobody knows where they are."""
    operands = as_matrices(operands)
    inputs = operands.inputs
    if operands.crow is not None and operands.col is not None:
        if len(operands.col) > inputs.numel() // _FEW:
            return None
        rows, cols = row_of_label(operands.crow, operands.col), operands.col.long()
    elif operands.places is not None:
        rows, cols = operands.places // inputs.shape[1], operands.places % inputs.shape[1]
    else:
        return None
    zeros = operands._replace(targets=None, crow=None, col=None, places=None)
    return Split(zeros, rows, cols, _at(operands, rows, cols))


def _at(operands: Operands, rows: Tensor, cols: Tensor) -> Operands:
    """Single elements of operands that are matrices."""

    def by_element(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix[rows, cols].unsqueeze(1)

    def by_label(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[..., cols].unsqueeze(-1)

    def by_row(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[rows]

    inputs = operands.inputs[rows, cols].unsqueeze(1)
    return operands._replace(
        inputs=inputs,
        targets=torch.ones_like(inputs) if operands.targets is None else by_element(operands.targets),
        crow=None,
        col=None,
        places=None,
        alpha=by_label(operands.alpha),
        weight=by_element(operands.weight),
        pos_weight=by_label(operands.pos_weight),
        sample_weight=by_row(operands.sample_weight),
        mask=by_element(operands.mask),
        by_label=by_label(operands.by_label),
        by_row=by_row(operands.by_row),
    )
