"""The CPU's blocks: parts of a matrix small enough that what is computed from them stays in the cache."""

from __future__ import annotations

import math
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


def is_one_block(tensor: Tensor) -> bool:
    return tensor.numel() <= _BLOCK or tensor.numel() <= block_size(tensor)  # which asks for the number of threads


def blocks(matrix: Tensor) -> Iterator[Block]:
    """Rectangles of rows and columns that cover a matrix: whole rows where they about fit, else equal parts of one."""
    rows, cols = matrix.shape
    size = block_size(matrix)
    col_step = -(-cols // max(round(cols / size), 1))
    row_step = max(round(size / col_step), 1)
    for row in range(0, rows, row_step):
        for col in range(0, cols, col_step):
            yield slice(row, min(row + row_step, rows)), slice(col, min(col + col_step, cols))


# To multiply 16 bits by an odd number, modulo 2^16, is a bijection. This one turns the bits of 1.0 into a single bit: a
# product with no other bit set is that of 1 or of 0.
_ONE_AS_A_BIT = {torch.bfloat16: (383, 1 << 7), torch.float16: (47, 1 << 10)}


class NotProbabilitiesError(ValueError):
    """A label outside of 0 to 1."""


def has_soft_labels(targets: Tensor) -> bool:
    """Whether the longer formula is needed: a label other than 0 and 1, or the derivative by one, or no free look."""
    if not targets.is_floating_point() or targets.numel() == 0:
        return False
    if targets.requires_grad or targets.device.type != "cpu":
        return True
    if targets.numel() < 8192:
        return not are_hard(targets)
    parts = torch.split(targets.view(-1), block_size(targets)) if targets.is_contiguous() else (targets,)
    room = torch.empty_like(parts[0])
    return any(spread(part, room[: len(part)]) != (0, 0) for part in parts)


def are_surely_hard(targets: Tensor, out: Tensor) -> bool:
    """Whether all labels are 0 or 1, in half the time of :func:`spread`; False where their bits do not tell."""
    if targets.dtype not in _ONE_AS_A_BIT:
        return False
    factor, bit = _ONE_AS_A_BIT[targets.dtype]
    bits = torch.mul(targets.view(torch.int16), factor, out=out.view(torch.int16)).bitwise_and_(~bit)
    return all(value.item() == 0 for value in bits.aminmax())


def are_hard(targets: Tensor) -> bool:
    """Whether all labels are 0 or 1, in the least time for few."""
    return targets.mul(targets).equal(targets) and math.isfinite(targets.sum().item())


def spread(targets: Tensor, out: Tensor | None = None) -> tuple[float, float]:
    """The least and the greatest y - y * y: 0 of hard labels, less than 0 outside of 0 to 1, NaN of NaN and inf."""
    # Three times as fast on a large tensor as y * y == y.
    low, high = torch.addcmul(targets, targets, targets, value=-1, out=out).aminmax()
    return low.item(), high.item()
