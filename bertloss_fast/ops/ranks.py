"""Processes that have parts of the labels and of the rows of a call, and what they send one another."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

# The names since torch 2.13, which warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(NamedTuple):
    """The processes that hold a head together."""

    group: dist.ProcessGroup
    rank: int
    same_rows: bool
    labels: list[int]  # how many each has, in order
    rows: list[int]  # how many each brings to a call, in order; of the same rows all

    @property
    def mine(self) -> slice:
        start = sum(self.labels[: self.rank])
        return slice(start, start + self.labels[self.rank])

    @property
    def first_rows(self) -> list[int]:
        """Of each process's rows the first, among all."""
        return [0 if self.same_rows else sum(self.rows[:rank]) for rank in range(len(self.rows))]

    @property
    def num_rows(self) -> int:
        return self.rows[self.rank] if self.same_rows else sum(self.rows)

    def meet(self, inputs: Tensor, what: str, counts: Tensor | None) -> tuple[Ranks, list[list[int]]]:
        """With how many rows each process comes, and every one's ``counts``."""
        if self.same_rows:
            of_each = [] if counts is None else counts.tolist()
            return self._replace(rows=[len(inputs)] * len(self.labels)), [of_each] * len(self.labels)
        # Processes that call different things would wait for ever, or take some bytes for others.
        what += f", hidden {inputs.dtype}{' with gradient' * (inputs.requires_grad and torch.is_grad_enabled())}"
        numbers = torch.tensor([len(inputs), zlib.crc32(what.encode())], device=inputs.device)
        # Of one length whatever is called, so that calls that differ are told.
        counts = numbers.new_zeros(len(self.labels)) if counts is None else counts
        table = self.table(torch.cat([numbers, counts]))
        if any(line[1] != table[self.rank][1] for line in table):
            raise ValueError(f"hidden: expected one call on all processes, got on rank {self.rank}: {what}")
        return self._replace(rows=[line[0] for line in table]), [line[2:] for line in table]

    def table(self, numbers: Tensor) -> list[list[int]]:
        """Every process's integers. A GPU waits."""
        every = numbers.new_empty(len(self.labels) * len(numbers))
        _all_gather(every, numbers, group=self.group)
        table: list[list[int]] = every.view(len(self.labels), -1).tolist()
        return table

    def gather(self, own: Tensor) -> Tensor:
        """All rows [N, D] of each process's."""
        if self.same_rows:
            return itself(own)
        most = max(self.rows)
        every = own.new_empty(len(self.rows) * most, own.shape[1])
        _all_gather(every, _lengthened(own, most), group=self.group)
        if min(self.rows) == most:
            return every
        return torch.cat([part[:rows] for part, rows in zip(torch.split(every, most), self.rows, strict=True)])

    def sum_of_own(self, every: Tensor) -> Tensor:
        """This process's rows [n, D] of the sum of what all have for all rows."""
        if self.same_rows:
            return self.sum(every)
        most = max(self.rows)
        own = every.new_empty(most, every.shape[1])
        parts = torch.split(every, self.rows)
        _reduce_scatter(own, torch.cat([_lengthened(part, most) for part in parts]), group=self.group)
        return own[: self.rows[self.rank]]

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def columns(self, matrix: Tensor | None) -> Tensor | None:
        """[n, L] of each process as [N, labels]."""
        if matrix is None:
            return None
        mine = self.labels[self.rank]
        found = self.to_labels(torch.split(matrix, self.labels, 1), [rows * mine for rows in self.rows])
        return found.view(self.num_rows, mine)

    def of_rows(self, values: Tensor | None) -> Tensor | None:
        """[n] of each process as [N]."""
        return None if values is None else self.to_labels([values] * len(self.rows), self.rows)

    def to_labels(self, blocks: Sequence[Tensor], sizes: list[int]) -> Tensor:
        """What is of each process's labels to that one, where the blocks of all processes come one after another."""
        return blocks[self.rank].reshape(-1) if self.same_rows else self._to_each(blocks, sizes)

    def to_owners(self, values: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
        """What is of each process's rows to that one; to all, where these are the same."""
        return self._to_each([values] * len(counts) if self.same_rows else torch.split(values, counts), sizes)

    def _to_each(self, blocks: Sequence[Tensor], sizes: list[int]) -> Tensor:
        """A block to each process, and one from each, of so many elements; as bytes, since not every dtype can go."""
        sent = torch.cat([block.reshape(-1) for block in blocks])
        received = sent.new_empty(sum(sizes))
        byte = sent.element_size()
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [size * byte for size in sizes],
            [block.numel() * byte for block in blocks],
            group=self.group,
        )
        return received


class _Exchange(torch.autograd.Function):
    """A collective whose gradient is another, of which it is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: _Collective, back: _Collective) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return exchange(gradient, ctx.back, ctx.there), None, None


_Collective = Callable[[Tensor], Tensor]


def exchange(tensor: Tensor, there: _Collective, back: _Collective) -> Tensor:
    return cast(Tensor, _Exchange.apply(tensor, there, back))  # type: ignore[no-untyped-call]


def itself(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _lengthened(rows: Tensor, count: int) -> Tensor:
    return rows.contiguous() if len(rows) == count else pad(rows, (0, 0, 0, count - len(rows)))
