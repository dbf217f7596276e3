"""Labels without their zeros: which elements of a flat tile are positive.

A matrix [N, L] is cut into tiles of consecutive elements, which may begin and end within rows. In CSR with sorted rows,
the labels of a tile are consecutive too: a tile finds its first one by bisection in its first row, and most tiles of
a wide matrix learn from that one number that they have none.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sparse(NamedTuple):
    """Labels in CSR, sorted within a row."""

    crow_ptr: Any  # [N + 1]
    col_ptr: Any  # [nnz]


@triton.jit
def _lower_bound(col_ptr, first, end, col):
    """The first label in [first, end) that is not below a column."""
    while first < end:
        middle = (first + end) // 2
        if tl.load(col_ptr + middle) < col:
            first = middle + 1
        else:
            end = middle
    return first


@triton.jit
def _reaches(labels, index, last, L: tl.constexpr):
    """Whether the label at an index, or one after it, lies at element ``last`` or before it."""
    row = last // L
    of_row = tl.load(labels.crow_ptr + row).to(last.dtype)
    in_row = tl.maximum(index, of_row)
    col = tl.load(labels.col_ptr + in_row, in_row < tl.load(labels.crow_ptr + row + 1).to(last.dtype), L)
    return (index < of_row) | (col <= last - row * L)


@triton.jit
def find_labels(labels, start, last, L: tl.constexpr):
    """The first label at element ``start`` or after it, and whether it lies before the end of the tile."""
    row = start // L
    first = tl.load(labels.crow_ptr + row).to(start.dtype)
    end = tl.load(labels.crow_ptr + row + 1).to(start.dtype)
    first = _lower_bound(labels.col_ptr, first, end, start - row * L)
    return first, _reaches(labels, first, last, L)


@triton.jit
def mark_labels(labels, first, start, last, L: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile are positive, [BLOCK]; ``first`` is from find_labels."""
    CHUNK: tl.constexpr = 128
    row = start // L
    last_row = last // L
    end = tl.load(labels.crow_ptr + last_row + 1).to(start.dtype)
    counts = tl.zeros([BLOCK], tl.int32)
    more = _reaches(labels, first, last, L)
    # In 32 bits, whatever the matrix: what wraps around is outside of the tile as well.
    row_start = (row * L - start).to(tl.int32)
    lanes = tl.arange(0, CHUNK)
    while more:
        valid = lanes < tl.minimum(end - first, CHUNK).to(tl.int32)
        offset = tl.load(labels.col_ptr + first + lanes, valid, 0).to(tl.int32) + row_start
        for next_row in range(row + 1, last_row + 1):
            next_first = tl.minimum(tl.load(labels.crow_ptr + next_row) - first, CHUNK)
            offset += tl.where(lanes >= next_first.to(tl.int32), L, 0)
        inside = valid & (offset >= 0) & (offset < BLOCK)
        counts += tl.histogram(tl.where(inside, offset, 0), BLOCK, mask=inside)
        first += CHUNK
        more = _reaches(labels, first, last, L)
    return counts > 0
