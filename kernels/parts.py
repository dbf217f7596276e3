"""Two-way, and ZLPR of rows that do not fit a tile: the sums of the parts of lines, and the gradient.

Each tile leaves the sums of its part of each line (_partials_kernel); combine.py makes the loss of them, and what the
gradient needs of each line (_gradient_kernel).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import Matrices, prepare
from .launch import launch_scope
from .lines import (
    ABSENT,
    Sums,
    by_class,
    exponential,
    line_sums,
    load_tile,
    row_factor,
    store_gradient,
    store_sums,
)
from .upstream import Upstream, inverse, receive


@triton.jit
def _partials_kernel(
    operands,  # elements.Operands
    rows_ptr,  # [5, strips, N]: sums over negatives and over positives, and how many positives there are
    cols_ptr,  # [4, chunks, L], or None
    num_rows,
    chunk_rows,  # a multiple of ROWS
    T: tl.constexpr,  # of negatives, of positives
    COUNT: tl.constexpr,
    LAUNCH: tl.constexpr,  # elements.Launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program goes down a strip of columns, through a chunk of rows."""
    L: tl.constexpr = LAUNCH.num_labels
    strips: tl.constexpr = (L + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    chunk = pid // strips
    strip = pid % strips
    col_negative = Sums(tl.full([BLOCK], ABSENT, LAUNCH.dtype), tl.zeros([BLOCK], LAUNCH.dtype))
    col_positive = col_negative
    for first in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, num_rows), ROWS):
        tile = load_tile(operands, first, strip * BLOCK, num_rows, LAUNCH, ROWS, BLOCK)
        negative, positive, _ = line_sums(tile, None, T, False, LAUNCH.fast, 1)
        row = first + tl.arange(0, ROWS)
        pointer = rows_ptr + strip * num_rows + row
        size = strips * num_rows
        store_sums(pointer, size, negative, positive, row < num_rows)
        if COUNT == "positives":
            tl.store(pointer + 4 * size, tl.sum(tile.positive.to(LAUNCH.dtype), 1), row < num_rows)
        if cols_ptr is not None:
            col_negative, col_positive, _ = line_sums(tile, (col_negative, col_positive), T, False, LAUNCH.fast, 0)
    if cols_ptr is not None:
        col = strip * BLOCK + tl.arange(0, BLOCK)
        size = tl.cdiv(num_rows, chunk_rows).to(tl.int64) * L
        store_sums(cols_ptr + chunk * L + col, size, col_negative, col_positive, col < L)


@triton.jit
def _slopes(slopes_ptr, lines, line, valid, tile, factor, T: tl.constexpr, LAUNCH: tl.constexpr, AXIS: tl.constexpr):
    """What each element adds to its line's loss, per step of the logit."""
    negative_top, negative_slope = tl.load(slopes_ptr + line, valid), tl.load(slopes_ptr + lines + line, valid)
    slopes_ptr += 2 * lines
    positive_top, positive_slope = tl.load(slopes_ptr + line, valid), tl.load(slopes_ptr + lines + line, valid)
    top = by_class(tile.positive, positive_top, negative_top, AXIS)
    slope = by_class(tile.positive, positive_slope * factor, negative_slope * factor, AXIS)
    return slope * exponential(tile.tv, top, tile.positive, T, True, LAUNCH.fast)


@triton.jit
def _gradient_kernel(
    operands,  # elements.Operands
    row_slopes_ptr,  # [4, N], from _combine_kernel
    col_slopes_ptr,  # [4, L], or None
    denominators_ptr,  # [1], or [2]: of rows and of columns; or None for 1
    factors,  # each [N]
    upstream,  # Upstream
    grad_ptr,  # [N, L]
    num_rows,
    T: tl.constexpr,
    WRITTEN: tl.constexpr,  # grad is written already, for the upstream that was expected
    LAUNCH: tl.constexpr,  # elements.Launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    L: tl.constexpr = LAUNCH.num_labels
    strips: tl.constexpr = (L + BLOCK - 1) // BLOCK
    tiles = tl.cdiv(num_rows, ROWS) * strips
    value, done = receive(upstream, pid, WRITTEN, LAUNCH.dtype)
    scale = inverse(denominators_ptr, LAUNCH.dtype) * value
    if WRITTEN:
        tiles = tl.where(done, 0, tiles)
    for index in range(pid, tiles, tl.num_programs(0)):
        start = index % strips * BLOCK
        first = index // strips * ROWS
        tile = load_tile(operands, first, start, num_rows, LAUNCH, ROWS, BLOCK)
        row = first + tl.arange(0, ROWS)
        factor = row_factor(factors, row, row < num_rows, LAUNCH.dtype) * scale
        gradient = _slopes(row_slopes_ptr, num_rows, row, row < num_rows, tile, factor, T, LAUNCH, 1)
        if col_slopes_ptr is not None:
            col = start + tl.arange(0, BLOCK)
            factor = inverse(denominators_ptr + 1, LAUNCH.dtype) * value
            gradient += _slopes(col_slopes_ptr, L, col, col < L, tile, factor, T, LAUNCH, 0)
        store_gradient(grad_ptr, tile, gradient, LAUNCH.ignored is not None or operands.mask is not None)


# 32 logits a thread, 8 in fp64: enough for the loads, few enough for the registers.
_WARP = {4: 1024, 8: 256}
# Rows alone: tiles of one row. With columns: wide enough that a row's sums are a hundredth of it, and of few warps,
# which have the fewer sums to exchange.
_ROW_TILE, _TILE, _WIDTH = 8192, 2048, 512
# Columns leave sums for each chunk of rows: of 64 rows, and of more where a thousand programs remain.
_SHORTEST_CHUNK, _LONGEST_CHUNK, _ENOUGH_PROGRAMS = 64, 512, 1024
_MAX_PROGRAMS = 8192


class Cut(NamedTuple):
    """How a matrix is cut into tiles, strips of columns and chunks of rows."""

    rows: int
    block: int
    num_warps: int
    chunk_rows: int
    strips: int
    chunks: int


def cut(shape: tuple[int, int], *, columns: bool, compute_dtype: torch.dtype) -> Cut:
    """The cut of an [N, L] matrix for rows, or for rows and columns."""
    num_rows, num_labels = shape
    most_rows, most_labels = triton.next_power_of_2(num_rows), triton.next_power_of_2(num_labels)
    tile = (_TILE if columns else _ROW_TILE) * 4 // compute_dtype.itemsize
    block = min(max(_WIDTH, tile // most_rows) if columns else tile, most_labels)
    rows = min(tile // block, most_rows) if columns else 1
    chunk_rows = rows
    if columns:
        enough = triton.next_power_of_2(num_rows * num_labels // (_ENOUGH_PROGRAMS * block) + 1)
        chunk_rows = max(rows, min(max(enough, _SHORTEST_CHUNK), _LONGEST_CHUNK))
    return Cut(
        rows=rows,
        block=block,
        num_warps=max(rows * block // _WARP[compute_dtype.itemsize], 1),
        chunk_rows=chunk_rows,
        strips=triton.cdiv(num_labels, block),
        chunks=triton.cdiv(num_rows, chunk_rows),
    )


def partials_launcher(
    matrices: Matrices, rows: Tensor, cols: Tensor | None, cut: Cut, *, temperatures: tuple[float, ...], count: str
) -> None:
    """Partial sums ``rows`` [5, strips, N] and ``cols`` [4, chunks, L] of matrices of any strides."""
    inputs = matrices.inputs
    operands, launch = prepare(matrices, inputs.shape, cut.rows * cut.block, by_row=True)
    with launch_scope(inputs):
        _partials_kernel[(cut.chunks * cut.strips,)](
            operands,
            rows,
            cols,
            inputs.shape[0],
            cut.chunk_rows,
            T=temperatures,
            COUNT=count,
            LAUNCH=launch,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )


def gradient_launcher(
    matrices: Matrices,
    row_slopes: Tensor,
    col_slopes: Tensor | None,
    denominators: Tensor | None,
    factors: tuple[Tensor, ...],
    upstream: Upstream,
    grad: Tensor,
    cut: Cut,
    *,
    temperatures: tuple[float, ...],
    written: bool,
) -> None:
    """The gradient from the slopes of its rows and columns."""
    inputs = matrices.inputs
    operands, launch = prepare(matrices, inputs.shape, cut.rows * cut.block, by_row=True)
    tiles = triton.cdiv(inputs.shape[0], cut.rows) * cut.strips
    with launch_scope(inputs):
        _gradient_kernel[(min(tiles, _MAX_PROGRAMS),)](
            operands,
            row_slopes,
            col_slopes,
            denominators,
            factors,
            upstream,
            grad,
            inputs.shape[0],
            T=temperatures,
            WRITTEN=written,
            LAUNCH=launch,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )
