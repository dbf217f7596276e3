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


def dense_block(crow: Tensor, col: Tensor, rows: slice, cols: slice) -> Tensor:
    """Rows and columns of the targets as 0 and 1; a GPU waits."""
    crow = crow[rows.start : rows.stop + 1]
    col = col[int(crow[0]) : int(crow[-1])].long() - cols.start
    row = row_of_label(crow, col)
    width = cols.stop - cols.start
    inside = (col >= 0) & (col < width)
    block = torch.zeros(len(crow) - 1, width, dtype=torch.uint8, device=col.device)
    block[row[inside], col[inside]] = 1
    return block


def dense_blocks(crow: Tensor, col: Tensor, num_labels: int, blocks: Sequence[Block]) -> Iterator[Tensor]:
    """The targets as 0 and 1 in blocks, whole rows or parts of one, that follow each other; a GPU waits.

    All in the same memory, where only labels are set and cleared again: a block is another one after the next step.
    """
    begins = [rows.start * num_labels + cols.start for rows, cols in blocks]
    ends = [*begins[1:], (len(crow) - 1) * num_labels]
    places = row_of_label(crow, col) * num_labels + col
    counts = torch.searchsorted(places, torch.tensor([0, *ends], device=col.device)).diff()
    of_blocks = places - torch.tensor(begins, device=col.device).repeat_interleave(counts)
    memory = torch.zeros(
        max(end - begin for begin, end in zip(begins, ends, strict=True)), dtype=torch.uint8, device=col.device
    )
    for (rows, cols), labels in zip(blocks, torch.split(of_blocks, counts.tolist()), strict=True):
        shape = rows.stop - rows.start, cols.stop - cols.start
        memory.index_fill_(0, labels, 1)
        yield memory[: shape[0] * shape[1]].view(shape)
        memory.index_fill_(0, labels, 0)


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
