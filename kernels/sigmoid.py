"""The driver of the multi-label family: losses of one logit and one label, any number of them in one launch.

It goes through [N, L] matrices in flat tiles, reads logits and labels once, and writes the loss and the gradient. What
a loss is, its formula tells (formulas.py); everything else is the same for all of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import load_as, select, store_rounded
from .elements import load_elements, place_of, soft_label, tiles_of
from .formulas import FORMULAS, Label, Values
from .labels import Sparse, find_labels, mark_labels
from .launch import launch_scope
from .operands import Matrix, extent, load, matrix


@triton.jit
def _by_label(positive, y, when_positive, when_negative):
    """One of two values by a hard label, or their mean by a soft one."""
    if y is None:
        return select(positive, when_positive, when_negative)
    else:
        return y * when_positive + (1.0 - y) * when_negative


class Operands(NamedTuple):
    """What a kernel reads."""

    inputs: Matrix
    targets: Matrix | Sparse
    alpha: Matrix | None
    pos_weight: Matrix | None
    factors: tuple[Matrix, ...]  # each multiplies the losses of its elements
    mask: Matrix | None


class Launch(NamedTuple):
    """What is compiled in, beside the formula."""

    params: tuple[float, ...]
    alpha: float | None
    smoothing: float
    ignored: float | None  # the target of an element that does not count
    num_labels: int | None  # None when no operand needs row and column
    reduced: bool
    written: bool  # grad holds the gradient for an upstream of 1 already
    sparse: bool
    soft: bool
    fast: bool
    wide: bool  # offsets past 2^31
    dtype: tl.dtype


@triton.jit
def _tile(operands, values, place, marked, scale, loss_ptr, grad_ptr, FORMULA: tl.constexpr, LAUNCH: tl.constexpr):
    """Losses of a tile, and its gradient, which is stored; ``marked`` are sparse targets, None where there is none."""
    v, positive, y, kept = load_elements(operands, place, marked, LAUNCH)
    zero = None if place.valid is None else 0.0
    coef = scale
    if operands.alpha is not None:
        alpha = load(operands.alpha, place, zero, LAUNCH.dtype)
        coef *= _by_label(positive, y, alpha, 1.0 - alpha)
    elif LAUNCH.alpha is not None:
        coef = _by_label(positive, y, scale * LAUNCH.alpha, scale * (1.0 - LAUNCH.alpha))
    for i in tl.static_range(len(operands.factors)):
        coef *= load(operands.factors[i], place, zero, LAUNCH.dtype)
    pos_weight = None
    if operands.pos_weight is not None:
        pos_weight = load(operands.pos_weight, place, zero, LAUNCH.dtype)
    soft = None
    share = None
    if y is not None:
        soft = soft_label(positive, y, pos_weight)
    elif pos_weight is not None and positive is not None:
        share = tl.where(positive, pos_weight, 1.0)

    loss, slope = FORMULA(v, Label(positive, share, soft), values, place, LAUNCH.params, LAUNCH.fast)
    loss *= coef
    slope *= coef
    if kept is not None:
        loss = tl.where(kept, loss, 0.0)
        slope = tl.where(kept, slope, 0.0)
    if not LAUNCH.reduced and loss_ptr is not None:
        store_rounded(loss_ptr + place.offs, loss, place.valid)
    if grad_ptr is not None:
        store_rounded(grad_ptr + place.offs, select(positive, -slope, slope), place.valid)
    return loss


@triton.jit(do_not_specialize=["denominator"])
def _sigmoid_kernel(
    operands,  # Operands
    values,  # Values
    denominator,  # an integer, or a pointer to a number in []
    upstream_ptr,  # [], or None for 1
    loss_ptr,  # [N, L], [programs] when reduced, or None
    grad_ptr,  # [N, L], or None
    numel,
    FORMULA: tl.constexpr,
    LAUNCH: tl.constexpr,  # Launch
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
        lanes = lanes.to(tl.int64)
    if denominator.dtype.is_ptr():
        scale = 1.0 / tl.load(denominator).to(LAUNCH.dtype)
    else:
        scale = 1.0 / denominator.to(LAUNCH.dtype)
    if upstream_ptr is not None:
        upstream = load_as(upstream_ptr, None, None, LAUNCH.dtype)
        scale *= upstream
        if LAUNCH.written:
            numel = tl.where(upstream == 1, 0, numel)

    L: tl.constexpr = LAUNCH.num_labels
    partial = tl.zeros([BLOCK], LAUNCH.dtype)
    for REST in tl.static_range(2):
        first, end = tiles_of(pid, numel, REST, BLOCK)
        for tile in range(first, end, programs):
            start = tile * BLOCK
            place = place_of(start, lanes, numel, REST, L)
            if LAUNCH.sparse:
                last = tl.minimum(start + BLOCK, numel) - 1
                label, found = find_labels(operands.targets, start, last, L)
                # The common tile has no labels: in its copy of the formula nothing is selected by them.
                if found:
                    marked = mark_labels(operands.targets, label, start, last, L, BLOCK)
                    loss = _tile(operands, values, place, marked, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
                else:
                    loss = _tile(operands, values, place, None, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
            else:
                loss = _tile(operands, values, place, None, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
            if LAUNCH.reduced:
                partial += loss
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(partial))


_NUM_WARPS = 4
# Programs take their tiles in turn: enough of them to fill the largest GPU several times over, so that the last round
# is a small part of the whole, and few enough for one program to add up their sums. A constant: the order of the
# additions does not depend on the number of multiprocessors.
_MAX_PROGRAMS = 8192


def _block(inputs: Tensor, sparse: bool) -> int:
    """16 bytes of logits a thread: the widest load, and labels land in the same threads without an exchange.

    Without labels to load, twice as many, to halve the cost of looking for the tile's own; registers that hold 64-bit
    offsets have no room for that.
    """
    twice = sparse and inputs.numel() < 2**31
    return 32 * _NUM_WARPS * (16 // inputs.element_size()) * (2 if twice else 1)


def num_programs(inputs: Tensor, *, sparse: bool) -> int:
    """How many partial sums a reduced loss has."""
    return min(triton.cdiv(inputs.numel(), _block(inputs, sparse)), _MAX_PROGRAMS)


def sigmoid_launcher(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor | tuple[Tensor, Tensor],
    alpha: float | Tensor | None,
    pos_weight: Tensor | None,
    factors: tuple[Tensor, ...],
    mask: Tensor | None,
    values: Values,
    denominator: int | Tensor,
    upstream: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    smoothing: float,
    ignored: float | None,
    reduced: bool,
    written: bool,
    compute_dtype: torch.dtype,
) -> None:
    """Launch one pass over [N, L] matrices of any strides; vectors come expanded, sparse targets as (crow, col).

    ``loss``, ``grad`` and ``values`` are contiguous; ``upstream`` is a scalar.
    """
    sparse = isinstance(targets, tuple)
    alphas = alpha if isinstance(alpha, Tensor) else None
    matrices = [m for m in (inputs, None if sparse else targets, alphas, pos_weight, mask, *factors) if m is not None]
    block = _block(inputs, sparse)
    by_place = sparse or any(v is not None for v in values) or not all(m.is_contiguous() for m in matrices)
    last_offset = max(inputs.numel(), *map(extent, matrices), targets[1].numel() if sparse else 0)
    operands = Operands(
        matrix(inputs),
        Sparse(*targets) if sparse else matrix(targets),
        matrix(alphas),
        matrix(pos_weight),
        tuple(matrix(factor) for factor in factors),
        matrix(mask),
    )
    launch = Launch(
        params=params,
        alpha=None if isinstance(alpha, Tensor) else alpha,
        smoothing=smoothing,
        ignored=ignored,
        num_labels=inputs.shape[1] if by_place else None,
        reduced=reduced,
        written=written,
        sparse=sparse,
        soft=not sparse and targets.is_floating_point(),
        fast=inputs.element_size() == 2 and compute_dtype == torch.float32,
        wide=last_offset + block >= 2**31,
        dtype=tl.float64 if compute_dtype == torch.float64 else tl.float32,
    )
    with launch_scope(inputs):
        _sigmoid_kernel[(num_programs(inputs, sparse=sparse),)](
            operands,
            values,
            denominator,
            upstream,
            loss,
            grad,
            inputs.numel(),
            FORMULA=FORMULAS[formula],
            LAUNCH=launch,
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )
