"""The driver of losses of two rows of logits, whose formulas pair_formulas.py has: a teacher's, or a second pass's.

A pair of rows is one tile, or goes by in tiles and once more for the gradients; of the Jensen-Shannon divergence, whose
value needs the sums of whole rows, once more for that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import store_rounded
from .launch import launch_scope
from .operands import load, matrix, pointers_to
from .pair_formulas import FORMULAS, Labels, Tile, add_mixture
from .rows import (
    MANY,
    Config,
    Loss,
    Operands,
    Work,
    factor_of,
    load_rows,
    num_programs,
    num_warps,
    place_of,
    prepare,
    upstream_of,
)
from .upstream import Upstream, receive


@triton.jit
def _load_labels(operands, row, num_rows, FIRST: tl.constexpr, LAUNCH: tl.constexpr):
    """Each row's label, which with FIRST is 0."""
    if FIRST:
        kept = row < num_rows
        place = place_of(row, tl.zeros_like(row), kept, LAUNCH)
        x = load(operands.inputs, place, 0.0, LAUNCH.dtype)
        return Labels(row, kept, None, x, load(operands.targets, place, 0.0, LAUNCH.dtype))
    elif operands.labels is None:
        return Labels(row, row < num_rows, None, None, None)
    else:
        of_x = load_rows(operands, row, num_rows, LAUNCH)
        other = Operands(operands.targets, None, operands.labels, None, None, ())
        return Labels(row, of_x.kept, of_x.label, of_x.x, load_rows(other, row, num_rows, LAUNCH).x)


@triton.jit
def _load_tile(operands, labels, start, LAUNCH: tl.constexpr, BLOCK: tl.constexpr):
    col = start + tl.arange(0, BLOCK)[None, :]
    if LAUNCH.wide:
        col = col.to(tl.int64)
    place = place_of(labels.row[:, None], col, labels.kept[:, None] & (col < LAUNCH.num_classes), LAUNCH)
    x = load(operands.inputs, place, -float("inf"), LAUNCH.dtype)
    y = load(operands.targets, place, -float("inf"), LAUNCH.dtype)
    return Tile(x, y, None if labels.label is None else col == labels.label[:, None], place)


@triton.jit
def _store(grad_ptr, tile, gradient, factor, num_rows, LAUNCH: tl.constexpr):
    gradient = tl.where((factor == 0)[:, None], 0.0, gradient * factor[:, None])  # a row that does not count has NaN
    place = tile.place
    store_rounded(pointers_to(grad_ptr, place), gradient, (place.row < num_rows) & (place.col < LAUNCH.num_classes))


@triton.jit
def _store_both(
    grad_ptrs,
    tile,
    sums,
    slopes,
    factor,
    num_rows,
    FORMULA: tl.constexpr,
    WANTED: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    gradient = FORMULA.gradient(tile, sums, slopes, WANTED, LAUNCH.loss.params, LAUNCH.fast)
    if WANTED[0]:
        _store(grad_ptrs[0], tile, gradient.x, factor, num_rows, LAUNCH)
    if WANTED[1]:
        _store(grad_ptrs[1], tile, gradient.y, factor, num_rows, LAUNCH)


@triton.jit
def _loss_of_rows(
    work,
    first,
    FORMULA: tl.constexpr,
    WANTED: tl.constexpr,
    LAUNCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of the rows from the first on, and their gradients, which are stored."""
    operands = work.operands
    num_rows = work.num_rows
    DTYPE: tl.constexpr = LAUNCH.dtype
    PARAMS: tl.constexpr = LAUNCH.loss.params
    C: tl.constexpr = LAUNCH.num_classes
    row = first + tl.arange(0, ROWS)
    if LAUNCH.wide:
        row = row.to(tl.int64)
    labels = _load_labels(operands, row, num_rows, FORMULA.of_first, LAUNCH)
    tile = _load_tile(operands, labels, 0, LAUNCH, BLOCK)
    sums = FORMULA.add(tile, None, labels, PARAMS, LAUNCH.fast)
    if BLOCK < C:
        for start in range(BLOCK, C, BLOCK):
            sums = FORMULA.add(_load_tile(operands, labels, start, LAUNCH, BLOCK), sums, labels, PARAMS, LAUNCH.fast)
    if FORMULA.loss is None:
        slopes = (tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE))
        if BLOCK < C:
            for start in range(0, C, BLOCK):
                slopes = add_mixture(_load_tile(operands, labels, start, LAUNCH, BLOCK), sums, slopes, LAUNCH.fast)
        else:
            slopes = add_mixture(tile, sums, slopes, LAUNCH.fast)
        loss = 0.5 * (slopes[0] + slopes[1])
    else:
        outcome = FORMULA.loss(sums, labels, PARAMS)
        loss, slopes = outcome.loss, outcome.slopes

    factor = factor_of(work, row, labels.kept, None, DTYPE)
    loss = tl.where(labels.kept, loss * factor, 0.0)
    if not LAUNCH.reduced and work.loss_ptr is not None:
        store_rounded(work.loss_ptr + row, loss, row < num_rows)

    if WANTED[0] or WANTED[1]:
        factor *= upstream_of(work, row, labels.kept, DTYPE)
        if BLOCK < C:
            # From the end: what was read last is still in the cache.
            for back in range(0, C, BLOCK):
                tile = _load_tile(operands, labels, (C - 1) // BLOCK * BLOCK - back, LAUNCH, BLOCK)
                _store_both(work.grad_ptrs, tile, sums, slopes, factor, num_rows, FORMULA, WANTED, LAUNCH)
        else:
            _store_both(work.grad_ptrs, tile, sums, slopes, factor, num_rows, FORMULA, WANTED, LAUNCH)
    return loss


@triton.jit(do_not_specialize=["denominator"])
def _pairs_kernel(
    operands,  # softmax.Operands; targets are the second logits
    denominator,  # an integer, or a pointer to a number in []
    upstream,  # Upstream
    upstreams_ptr,  # [N], or None
    loss_ptr,  # [N]; when reduced [programs]; or None
    grad_ptrs,  # each [N, C], or None
    num_rows,
    FORMULA: tl.constexpr,  # Formula
    WANTED: tl.constexpr,  # which gradients
    LAUNCH: tl.constexpr,  # softmax.Launch
    LOOP: tl.constexpr,  # programs take rows in turn; else each has its own, and more registers
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    value, done = receive(upstream, pid, LAUNCH.written, LAUNCH.dtype)
    end = num_rows
    if LAUNCH.written:
        end = tl.where(done, 0, num_rows)
    work = Work(operands, denominator, None, value, upstreams_ptr, loss_ptr, grad_ptrs, num_rows)
    losses = tl.zeros([ROWS], LAUNCH.dtype)
    if LOOP:
        for first in range(pid * ROWS, end, tl.num_programs(0) * ROWS):
            losses += _loss_of_rows(work, first, FORMULA, WANTED, LAUNCH, ROWS, BLOCK)
    elif pid * ROWS < end:
        losses = _loss_of_rows(work, pid * ROWS, FORMULA, WANTED, LAUNCH, ROWS, BLOCK)
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(losses))


# Two rows in registers, 16 logits of each a thread of four bytes; longer ones in tiles, read once more for the
# gradient; of JS, whose both gradients need more at a time, 8 a thread there.
_LONGEST, _BYTES_A_THREAD, _TILE_OF_LONG = 8192, 64, 2048
_MORE_THREADS = ("js",)
# Shorter rows share a tile of one warp, half as many in fp64: what a row has beside its logits takes registers too.
_TILE, _MOST_ROWS = 512, 8


def pair_config(inputs: Tensor, formula: str, compute_dtype: torch.dtype) -> Config:
    """How rows are cut."""
    num_rows, num_classes = inputs.shape
    size = compute_dtype.itemsize
    block = triton.next_power_of_2(num_classes)
    threads = 1
    if block * size > 4 * _LONGEST:
        block = _TILE_OF_LONG * 4 // size
        threads = 2 if formula in _MORE_THREADS else 1
    rows = max(min(_TILE // block, _MOST_ROWS * 4 // size, triton.next_power_of_2(num_rows)), 1)
    return Config(rows, block, num_warps(threads * rows * block * size // _BYTES_A_THREAD), num_classes <= MANY)


def pairs_launcher(
    loss_of: Loss,
    tensors: Operands,
    denominator: int | Tensor,
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    *,
    compute_dtype: torch.dtype,
    reduced: bool,
    written: bool,
) -> None:
    """Launch one pass; an upstream is a scalar, or ``upstreams`` [N] of the losses. What is written is contiguous."""
    inputs, targets = tensors.inputs, tensors.targets
    cut = pair_config(inputs, loss_of.formula, compute_dtype)
    launch = prepare(
        loss_of, tensors, cut, inputs, targets, compute_dtype=compute_dtype, reduced=reduced, written=written
    )
    with launch_scope(inputs):
        _pairs_kernel[(num_programs(inputs.shape[0], cut),)](
            tensors._replace(inputs=matrix(inputs), targets=matrix(targets)),
            denominator,
            upstream,
            upstreams,
            loss,
            grads,
            inputs.shape[0],
            FORMULA=FORMULAS[loss_of.formula],
            WANTED=tuple(grad is not None for grad in grads),
            LAUNCH=launch,
            LOOP=cut.loop,
            ROWS=cut.rows,
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )
