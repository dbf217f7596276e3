"""Passes that some losses need before their own: counts and sums over targets, and the histogram of gradient norms.

Every one of them adds in a fixed order: lanes over the tiles of a program, the lanes of a program, and in a launch of
its own, or at the caller's, the programs. In fp32 a lane counts exactly to 2^24, which is its share of 2^48 elements;
sums of several lanes are rounded past 2^24.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import NAN_STAYS, TINY, sigmoids, store_rounded
from .elements import (
    Matrices,
    load_elements,
    load_targets,
    place_of,
    prepare,
    program,
    soft_label,
    tiles_of,
    within,
)
from .formulas import Label, gradient_bin
from .labels import find_labels, mark_labels
from .launch import launch_scope
from .operands import Place
from .upstream import inverse

# Weights of hard labels are added as integers: the sum is the same in any order, of dense labels and of sparse ones.
# Up to 2^17 labels of weight 1, and a weight of 1e-6 to 8 digits.
FIXED = tl.constexpr(2**46)


@triton.jit(do_not_specialize=["denominator"])
def _sum_kernel(
    partials_ptr,  # [count]
    denominator,  # an integer, a pointer to a number in [], or None for 1
    total_ptr,  # []
    count,
    AT_LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    totals = tl.zeros([BLOCK], partials_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        totals += tl.load(partials_ptr + index, index < count, 0)
    total = tl.sum(totals)
    if denominator is not None:
        total *= inverse(denominator, total.dtype)
    if AT_LEAST is not None:
        total = tl.maximum(total, AT_LEAST, propagate_nan=NAN_STAYS)
    store_rounded(total_ptr, total, None)


@triton.jit
def _count_kernel(
    operands,  # elements.Operands
    partials_ptr,  # [programs]
    numel,
    POSITIVES: tl.constexpr,
    LAUNCH: tl.constexpr,  # elements.Launch
    BLOCK: tl.constexpr,
):
    programs = tl.num_programs(0)
    pid, lanes = program(BLOCK, LAUNCH.wide)
    partial = tl.zeros([BLOCK], LAUNCH.dtype)
    for REST in tl.static_range(2):
        first, end = tiles_of(pid, numel, REST, BLOCK)
        for tile in range(first, end, programs):
            place = place_of(tile * BLOCK, lanes, numel, REST, LAUNCH.num_labels)
            target, kept = load_targets(operands, place, LAUNCH)
            kept = within(kept, place)
            value = target.to(LAUNCH.dtype) if POSITIVES else 1.0
            partial += value if kept is None else tl.where(kept, value, 0.0)
    tl.store(partials_ptr + pid, tl.sum(partial))


@triton.jit
def _row_sum_kernel(
    operands,  # elements.Operands
    weights_ptr,  # [L], of hard labels in units of 1 / FIXED
    sums_ptr,  # [N]
    num_rows,
    LAUNCH: tl.constexpr,  # elements.Launch
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L: tl.constexpr = LAUNCH.num_labels
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    rows = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rows[:, None]
    lanes = tl.arange(0, BLOCK_L)[None, :]
    if LAUNCH.sparse:
        first = tl.load(operands.targets.crow_ptr + row, row < num_rows, 0)
        end = tl.load(operands.targets.crow_ptr + row + 1, row < num_rows, 0)
        longest = tl.max(end - first)
    else:
        first = 0
        end = L
        longest = L
    sums = tl.zeros([BLOCK_N, BLOCK_L], LAUNCH.dtype if LAUNCH.soft else tl.int64)
    for start in range(0, longest, BLOCK_L):
        index = first + start + lanes
        in_row = index < end
        if LAUNCH.sparse:
            col = tl.load(operands.targets.col_ptr + index, in_row, 0).to(row.dtype)
        else:
            col = index
        place = Place(None, row * L + col, row, col, in_row & (row < num_rows), L)
        term = tl.load(weights_ptr + col, in_row, 0)
        target, kept = load_targets(operands, place, LAUNCH)
        if LAUNCH.soft:
            term *= target
        elif target is not None:
            term = tl.where(target != 0, term, 0)
        sums += tl.where(within(kept, place), term, 0)
    total = tl.sum(sums, 1).to(LAUNCH.dtype)
    if not LAUNCH.soft:
        total *= 1.0 / FIXED
    tl.store(sums_ptr + rows, tl.maximum(total, TINY, propagate_nan=NAN_STAYS), rows < num_rows)


@triton.jit
def _histogram_kernel(
    operands,  # elements.Operands
    counts_ptr,  # [programs, BINS]
    numel,
    BINS: tl.constexpr,
    LAUNCH: tl.constexpr,  # elements.Launch
    BLOCK: tl.constexpr,
):
    L: tl.constexpr = LAUNCH.num_labels
    BINS_PADDED: tl.constexpr = triton.next_power_of_2(BINS)
    programs = tl.num_programs(0)
    pid, lanes = program(BLOCK, LAUNCH.wide)
    counts = tl.zeros([BINS_PADDED], tl.int32)
    for REST in tl.static_range(2):
        first, end = tiles_of(pid, numel, REST, BLOCK)
        for tile in range(first, end, programs):
            start = tile * BLOCK
            place = place_of(start, lanes, numel, REST, L)
            marked = None
            if LAUNCH.sparse:
                last = tl.minimum(start + BLOCK, numel) - 1
                label, _ = find_labels(operands.targets, start, last, L)
                marked = mark_labels(operands.targets, label, start, last, L, BLOCK)
            v, positive, y, kept = load_elements(operands, place, marked, LAUNCH)
            soft = None
            if y is not None:
                soft = soft_label(positive, y, None)
            _, q, _, _ = sigmoids(v, LAUNCH.fast)
            bins = gradient_bin(q, Label(positive, None, soft), BINS)
            counts += tl.histogram(bins, BINS_PADDED, mask=within(kept, place))
    column = tl.arange(0, BINS_PADDED)
    tl.store(counts_ptr + pid * BINS + column, counts, column < BINS)


_NUM_WARPS = 4
_BLOCK = 32 * _NUM_WARPS * 16  # 16 elements a thread: one load of targets in a byte, two of 16-bit logits
_MAX_PARTIALS = 8192  # as many as a loss has
_MAX_HISTOGRAMS = 1024


def num_partials(numel: int) -> int:
    """How many partial sums a count has."""
    return min(triton.cdiv(numel, _BLOCK), _MAX_PARTIALS)


def num_histograms(numel: int) -> int:
    """How many histograms there are to add up."""
    return min(triton.cdiv(numel, _BLOCK), _MAX_HISTOGRAMS)


def count_launcher(matrices: Matrices, shape: tuple[int, int], partials: Tensor, *, positives: bool) -> None:
    """How many elements [N, L] are not ignored, or the sum of their targets; as many partial sums as there is room for.

    Sparse targets are not read.
    """
    dense = None if isinstance(matrices.targets, tuple) else matrices.targets
    operands, launch = prepare(matrices._replace(inputs=None, targets=dense), shape, _BLOCK)
    with launch_scope(partials):
        _count_kernel[(partials.numel(),)](
            operands,
            partials,
            shape[0] * shape[1],
            POSITIVES=positives,
            LAUNCH=launch,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )


def row_sum_launcher(matrices: Matrices, weights: Tensor, sums: Tensor) -> None:
    """For each row of targets [N, L], the sum of weights [L] of its labels, and no less than fp32's ``tiny``.

    Weights are those of soft labels in the dtype of the computation, of hard ones in int64, in units of 1 / FIXED.
    """
    num_rows, num_labels = shape = sums.numel(), weights.numel()
    operands, launch = prepare(matrices._replace(inputs=None), shape, _BLOCK, by_row=True)
    # Most rows of sparse targets have few labels.
    block_l = 16 if launch.sparse else min(triton.next_power_of_2(num_labels), 1024)
    block_n = (512 if launch.sparse else 1024) // block_l
    with launch_scope(sums):
        _row_sum_kernel[(triton.cdiv(num_rows, block_n),)](
            operands, weights, sums, num_rows, LAUNCH=launch, BLOCK_N=block_n, BLOCK_L=block_l, num_warps=_NUM_WARPS
        )


def histogram_launcher(matrices: Matrices, counts: Tensor, *, bins: int, smoothing: float) -> None:
    """Elements [N, L] that are not ignored by their |sigmoid(x) - y|, in bins as ``formulas.gradient_bin`` has them.

    ``counts`` are [programs, bins] and the caller's to add up. One program counts in int32.
    """
    inputs = matrices.inputs
    operands, launch = prepare(matrices, inputs.shape, _BLOCK, smoothing=smoothing)
    # To look for labels takes registers, as fp64 does: half as many elements a thread leave enough.
    num_warps = _NUM_WARPS * (2 if launch.sparse or launch.dtype == tl.float64 else 1)
    with launch_scope(inputs):
        _histogram_kernel[(counts.shape[0],)](
            operands, counts, inputs.numel(), BINS=bins, LAUNCH=launch, BLOCK=_BLOCK, num_warps=num_warps
        )


def sum_launcher(
    partials: Tensor, total: Tensor, *, denominator: int | Tensor | None = None, at_least: float | None = None
) -> None:
    """Add up partial sums in a fixed order, divide, and round once, to the total's dtype."""
    count = partials.numel()
    with launch_scope(partials):
        block = min(triton.next_power_of_2(count), _MAX_PARTIALS)
        _sum_kernel[(1,)](partials, denominator, total, count, AT_LEAST=at_least, BLOCK=block, num_warps=8)
