"""The elements of flat tiles: where they lie, their logits and their labels.

An [N, L] matrix is cut into tiles of consecutive elements, which programs take in turn.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import select
from .formulas import Soft
from .labels import Sparse
from .operands import Matrix, Place, extent, load, matrix


class Operands(NamedTuple):
    """What tells a tile's logits and labels."""

    inputs: Matrix | None
    targets: Matrix | Sparse | None
    mask: Matrix | None


class Launch(NamedTuple):
    """What is compiled into the kernels that read them."""

    smoothing: float
    ignored: float | None  # the target of an element that does not count
    num_labels: int | None  # None when no operand needs row and column
    sparse: bool  # or without targets
    soft: bool
    fast: bool
    wide: bool  # offsets past 2^31
    dtype: tl.dtype


class Matrices(NamedTuple):
    """What launchers take: [N, L] matrices of any strides."""

    inputs: Tensor | None
    targets: Tensor | tuple[Tensor, Tensor] | None  # sparse ones as (crow, col) indices
    mask: Tensor | None
    ignored: float | None  # the target of an element that does not count
    compute_dtype: torch.dtype


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Of a computation."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def prepare(
    matrices: Matrices,
    shape: tuple[int, int],
    block: int,
    *,
    others: Sequence[Tensor] = (),
    by_row: bool = False,
    smoothing: float = 0.0,
) -> tuple[Operands, Launch]:
    """Operands as a kernel takes them, which may have ``others`` of the same shape, or need its rows and columns."""
    inputs, targets, mask, ignored, compute_dtype = matrices
    dense = targets if isinstance(targets, Tensor) else None
    labels = targets if isinstance(targets, tuple) else None
    tensors = [tensor for tensor in (inputs, dense, mask, *others) if tensor is not None]
    last_offset = max(shape[0] * shape[1], *map(extent, tensors), labels[1].numel() if labels else 0)
    launch = Launch(
        smoothing=smoothing,
        ignored=ignored,
        num_labels=shape[1] if labels or by_row or not all(t.is_contiguous() for t in tensors) else None,
        sparse=dense is None,
        soft=dense is not None and dense.is_floating_point(),
        fast=inputs is not None and inputs.element_size() == 2 and compute_dtype == torch.float32,
        wide=last_offset + block >= 2**31,
        dtype=triton_dtype(compute_dtype),
    )
    return Operands(matrix(inputs), Sparse(*labels) if labels else matrix(dense), matrix(mask)), launch


NUM_WARPS = 4
# Programs take their tiles in turn: enough of them to fill the largest GPU several times over, so that the last round
# is a small part of the whole, and few enough for one program to add up their sums. A constant: the order of the
# additions does not depend on the number of multiprocessors.
_MAX_PROGRAMS = 8192


def tile_size(inputs: Tensor, *, sparse: bool = False) -> int:
    """16 bytes of logits a thread: the widest load, and labels land in the same threads without an exchange.

    Without labels to load, twice as many, to halve the cost of looking for the tile's own; registers that hold 64-bit
    offsets have no room for that.
    """
    twice = sparse and inputs.numel() < 2**31
    return 32 * NUM_WARPS * (16 // inputs.element_size()) * (2 if twice else 1)


def num_programs(inputs: Tensor, *, sparse: bool = False) -> int:
    """How many partial sums a reduced loss has."""
    return min(triton.cdiv(inputs.numel(), tile_size(inputs, sparse=sparse)), _MAX_PROGRAMS)


class Targets(NamedTuple):
    """Dense targets of a tile."""

    value: Any  # None where they are sparse
    kept: Any  # which elements count; None where all do


class Elements(NamedTuple):
    """Logits and labels of a tile."""

    v: Any  # (1 - 2y) x, with the nearest hard label for y
    positive: Any  # that label; None where all are negative
    y: Any  # the label itself where it is soft, or None
    kept: Any  # which elements count; None where all do


@triton.jit
def program(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """This program's number, and the lanes of its tiles."""
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        pid = pid.to(tl.int64)
        lanes = lanes.to(tl.int64)
    return pid, lanes


@triton.jit
def tiles_of(pid, numel, REST: tl.constexpr, BLOCK: tl.constexpr):
    """The first tile of a program, and where they end: of the full ones, or of the REST, which is one of program 0's.

    Full tiles need no mask, which would cost an instruction an element and the width of the loads.
    """
    full_tiles = numel // BLOCK
    if REST:
        return full_tiles + pid, full_tiles + tl.cdiv(numel - full_tiles * BLOCK, BLOCK)
    else:
        return pid, full_tiles


@triton.jit
def place_of(start, lanes, numel, REST: tl.constexpr, L: tl.constexpr):
    """The elements of the tile from ``start`` on; L is None when no operand needs row and column."""
    offs = start + lanes
    valid = offs < numel if REST else None
    row = offs // L if L is not None else None
    col = offs % L if L is not None else None
    return Place(None, offs, row, col, valid, L)


@triton.jit
def within(kept, place):
    """Which elements count, without the lanes past the end."""
    if place.valid is None:
        return kept
    elif kept is None:
        return place.valid
    else:
        return kept & place.valid


@triton.jit
def load_targets(operands, place, LAUNCH: tl.constexpr):
    """Targets of a tile; a lane past the end has the target 0, and may count."""
    zero = None if place.valid is None else 0.0
    value = None
    kept = None
    if not LAUNCH.sparse:
        value = load(operands.targets, place, zero, LAUNCH.dtype if LAUNCH.soft else None)
        if LAUNCH.ignored is not None:
            kept = value != LAUNCH.ignored
    if operands.mask is not None:
        unmasked = load(operands.mask, place, zero, None) != 0
        kept = unmasked if kept is None else kept & unmasked
    return Targets(value, kept)


@triton.jit
def load_elements(operands, place, marked, LAUNCH: tl.constexpr):
    """Logits and labels of a tile; ``marked`` are sparse targets, None where it has none.

    A lane past the end has a negative label at -inf, whose loss is 0.
    """
    lowest = None if place.valid is None else -float("inf")
    x = load(operands.inputs, place, lowest, LAUNCH.dtype)
    target, kept = load_targets(operands, place, LAUNCH)
    y = None
    positive = marked
    if LAUNCH.soft:
        y = target
        positive = y > 0.5
    elif not LAUNCH.sparse:
        positive = target != 0
    if LAUNCH.smoothing != 0:
        if y is None:
            zero = tl.zeros_like(x)
            y = select(positive, zero + 1.0, zero)
        y = y * (1.0 - LAUNCH.smoothing) + 0.5 * LAUNCH.smoothing
        kept = within(kept, place)  # a smoothed label has a loss at -inf
    return Elements(select(positive, -x, x), positive, y, kept)


@triton.jit
def soft_label(positive, y, pos_weight):
    """A label between 0 and 1, as the formulas want it."""
    distance = select(positive, 1.0 - y, y)
    if pos_weight is None:
        return Soft(1.0, distance, distance, y, None)
    else:
        return Soft(y * pos_weight + (1.0 - y), select(positive, 1.0 - y, y * pos_weight), distance, y, pos_weight)
