"""The driver of the multi-label family: losses of one logit and one label, any number of them in one launch.

It goes through [N, L] matrices in flat tiles, reads logits and labels once, and writes the loss and the gradient. What
a loss is, its formula tells (formulas.py); everything else is the same for all of them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import elements
from .device import select, store_rounded
from .elements import (
    NUM_WARPS,
    Matrices,
    load_elements,
    num_programs,
    place_of,
    program,
    soft_label,
    tile_size,
    tiles_of,
)
from .formulas import FORMULAS, Label, Values
from .labels import find_labels, mark_labels
from .launch import launch_scope
from .operands import Matrix, load, load_product, matrix
from .upstream import Upstream, inverse, receive


@triton.jit
def _by_label(positive, y, when_positive, when_negative):
    """One of two values by a hard label, or their mean by a soft one."""
    if y is None:
        return select(positive, when_positive, when_negative)
    else:
        return y * when_positive + (1.0 - y) * when_negative


class Operands(NamedTuple):
    """What a kernel reads."""

    elements: elements.Operands
    alpha: Matrix | None
    pos_weight: Matrix | None
    factors: tuple[Matrix, ...]  # each multiplies the losses of its elements


class Launch(NamedTuple):
    """What is compiled in, beside the formula."""

    elements: elements.Launch
    params: tuple[float, ...]
    alpha: float | None
    reduced: bool
    written: bool  # grad is written already, for the upstream that was expected


@triton.jit
def _tile(operands, values, place, marked, scale, loss_ptr, grad_ptr, FORMULA: tl.constexpr, LAUNCH: tl.constexpr):
    """Losses of a tile, and ``scale`` times its gradient, which is stored.

    ``marked`` are sparse targets, None where the tile has none.
    """
    DTYPE: tl.constexpr = LAUNCH.elements.dtype
    v, positive, y, kept = load_elements(operands.elements, place, marked, LAUNCH.elements)
    zero = None if place.valid is None else 0.0
    pos_weight = None
    if operands.pos_weight is not None:
        pos_weight = load(operands.pos_weight, place, zero, DTYPE)
    soft = None
    share = None
    if y is not None:
        soft = soft_label(positive, y, pos_weight)
    elif pos_weight is not None and positive is not None:
        share = tl.where(positive, pos_weight, 1.0)

    loss, slope = FORMULA(v, Label(positive, share, soft), values, place, LAUNCH.params, LAUNCH.elements.fast)
    if operands.alpha is not None:
        alpha = load(operands.alpha, place, zero, DTYPE)
        factor = _by_label(positive, y, alpha, 1.0 - alpha)
        loss *= factor
        slope *= factor
    elif LAUNCH.alpha is not None:
        one = tl.full([], 1.0, DTYPE)
        factor = _by_label(positive, y, one * LAUNCH.alpha, one * (1.0 - LAUNCH.alpha))
        loss *= factor
        slope *= factor
    factor = load_product(operands.factors, place, zero, DTYPE)
    if factor is not None:
        loss *= factor
        slope *= factor
    slope *= scale
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
    upstream,  # Upstream
    loss_ptr,  # [N, L]; when reduced [programs], of sums that no denominator divides; or None
    grad_ptr,  # [N, L], or None
    numel,
    FORMULA: tl.constexpr,
    LAUNCH: tl.constexpr,  # Launch
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = LAUNCH.elements.dtype
    L: tl.constexpr = LAUNCH.elements.num_labels
    programs = tl.num_programs(0)
    pid, lanes = program(BLOCK, LAUNCH.elements.wide)
    value, done = receive(upstream, pid, LAUNCH.written, DTYPE)
    scale = inverse(denominator, DTYPE) * value
    if LAUNCH.written:
        numel = tl.where(done, 0, numel)

    partial = tl.zeros([BLOCK], DTYPE)
    for REST in tl.static_range(2):
        first, end = tiles_of(pid, numel, REST, BLOCK)
        for tile in range(first, end, programs):
            start = tile * BLOCK
            place = place_of(start, lanes, numel, REST, L)
            if LAUNCH.elements.sparse:
                labels = operands.elements.targets
                last = tl.minimum(start + BLOCK, numel) - 1
                label, found = find_labels(labels, start, last, L)
                # The common tile has no labels: in its copy of the formula nothing is selected by them.
                if found:
                    marked = mark_labels(labels, label, start, last, L, BLOCK)
                    loss = _tile(operands, values, place, marked, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
                else:
                    loss = _tile(operands, values, place, None, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
            else:
                loss = _tile(operands, values, place, None, scale, loss_ptr, grad_ptr, FORMULA, LAUNCH)
            if LAUNCH.reduced:
                partial += loss
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(partial))


def sigmoid_launcher(
    formula: str,
    params: tuple[float, ...],
    matrices: Matrices,
    alpha: float | Tensor | None,
    pos_weight: Tensor | None,
    factors: tuple[Tensor, ...],
    values: Values,
    denominator: int | Tensor,
    upstream: Upstream,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    smoothing: float,
    reduced: bool,
    written: bool,
) -> None:
    """Launch one pass over [N, L] matrices of any strides; vectors come expanded.

    ``loss``, ``grad`` and ``values`` are contiguous; an upstream is a scalar. The denominator divides the gradient; a
    reduced loss comes as partial sums, and ``sum_launcher`` divides it.
    """
    inputs = matrices.inputs
    sparse = isinstance(matrices.targets, tuple)
    block = tile_size(inputs, sparse=sparse)
    alphas = alpha if isinstance(alpha, Tensor) else None
    read, launch = elements.prepare(
        matrices,
        inputs.shape,
        block,
        others=[tensor for tensor in (alphas, pos_weight, *factors) if tensor is not None],
        by_row=any(value is not None for value in values),
        smoothing=smoothing,
    )
    with launch_scope(inputs):
        _sigmoid_kernel[(num_programs(inputs, sparse=sparse),)](
            Operands(read, matrix(alphas), matrix(pos_weight), tuple(matrix(factor) for factor in factors)),
            values,
            denominator,
            upstream,
            loss,
            grad,
            inputs.numel(),
            FORMULA=FORMULAS[formula],
            LAUNCH=Launch(launch, params, None if isinstance(alpha, Tensor) else alpha, reduced, written),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
