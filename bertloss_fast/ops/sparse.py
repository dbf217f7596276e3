"""Labels in CSR, where a dense block of them is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block


def row_of_label(crow: Tensor, col: Tensor) -> Tensor:
    """The row of each label."""
    rows = torch.arange(len(crow) - 1, device=col.device)
    return rows.repeat_interleave(crow.diff(), output_size=len(col))


def by_block(places: Tensor, blocks: Sequence[Block], shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """For each block of a matrix the places, counted row after row and sorted, that lie in it, from its first element.

    A block is whole rows or a part of one, so that its elements follow each other; and so do the blocks.
    """
    begins = [rows.start * shape[1] + cols.start for rows, cols in blocks]
    ends = torch.tensor([0, *begins[1:], shape[0] * shape[1]], device=places.device)
    counts = torch.searchsorted(places, ends).diff()
    offsets = places - torch.tensor(begins, device=places.device).repeat_interleave(counts)
    return torch.split(offsets, counts.tolist())


def dense_blocks(crow: Tensor, col: Tensor, num_labels: int, blocks: Sequence[Block]) -> Iterator[Tensor]:
    """The targets as 0 and 1 in blocks as of :func:`by_block`; a GPU waits.

    All in the same memory, where only labels are set and cleared again: a block is another one after the next step.
    """
    shapes = [(rows.stop - rows.start, cols.stop - cols.start) for rows, cols in blocks]
    labels = by_block(row_of_label(crow, col) * num_labels + col, blocks, (len(crow) - 1, num_labels))
    memory = torch.zeros(max(rows * cols for rows, cols in shapes), dtype=torch.uint8, device=col.device)
    for (rows, cols), of_block in zip(shapes, labels, strict=True):
        memory.index_fill_(0, of_block, 1)
        yield memory[: rows * cols].view(rows, cols)
        memory.index_fill_(0, of_block, 0)


def dense(crow: Tensor, col: Tensor, shape: torch.Size) -> Tensor:
    """All targets as 0 and 1, [..., L], without a look at the indices."""
    targets = torch.zeros(len(crow) - 1, shape[-1], dtype=torch.uint8, device=col.device)
    return targets.index_put((row_of_label(crow, col), col.long()), targets.new_ones(())).reshape(shape)


class Chunks(NamedTuple):
    """Labels grouped by chunks of columns."""

    crow: Tensor  # [chunks, N + 1]: where each row of a chunk begins and ends in col
    col: Tensor  # [nnz], counted from the first label of the chunk


def by_chunk(crow: Tensor, col: Tensor, num_labels: int, step: int) -> Chunks:
    """The labels of each chunk of ``step`` columns side by side, row after row, without a look at the indices."""
    num_rows = len(crow) - 1
    num_chunks = -(-num_labels // step)
    number = torch.div(col, step, rounding_mode="floor").long()
    key, order = (number * num_rows + row_of_label(crow, col)).sort(stable=True)
    first = torch.searchsorted(key, torch.arange(num_chunks * num_rows + 1, device=col.device))
    crow = first.as_strided((num_chunks, num_rows + 1), (num_rows, 1))
    return Chunks(crow, (col - number * step).to(col.dtype)[order])
