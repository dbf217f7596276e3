"""The pointwise family: losses of one input and one target number, any number of them in one launch.

| loss | value | d/dx | d/dt |
|---|---|---|---|
| squared error | (x - t)² | 2 (x - t) | -2 (x - t) |
| KL divergence, x log-probabilities | t (log t - x) | -t | log t - x + 1 |
| the same of t = log p | p (t - x) | -p | p (t - x + 1) |

A target of probability 0 has no loss, whatever x is, and passes no gradient on: 0 log 0 is 0, and 0 times the infinite
derivative of t log t would be NaN to a softmax that made the target.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import elements
from .device import TINY, neg_log, store_rounded
from .elements import NUM_WARPS, Matrices, load_targets, num_programs, place_of, program, tile_size, tiles_of
from .launch import launch_scope
from .operands import Matrix, load, load_product, matrix
from .upstream import Upstream, inverse, receive


@triton.jit
def _squared_error(x, t, FAST: tl.constexpr):
    error = x - t
    return error * error, 2.0 * error, -2.0 * error


@triton.jit
def _kl_divergence(x, t, FAST: tl.constexpr):
    counts = t != 0
    if FAST:  # to whose logarithm a subnormal number is 0
        counts = tl.abs(t) >= TINY
    difference = -neg_log(tl.where(counts, t, 1.0), FAST) - tl.where(counts, x, 0.0)
    return t * difference, -t, tl.where(counts, difference + 1.0, 0.0)


@triton.jit
def _kl_divergence_of_logs(x, t, FAST: tl.constexpr):
    p = tl.exp(t)  # in fp32 within 1.2e-6 for t >= -20, 4e-6 for t >= -80
    counts = p != 0
    loss = p * (tl.where(counts, t, 0.0) - tl.where(counts, x, 0.0))
    return loss, -p, loss + p


FORMULAS = {"mse": _squared_error, "kl": _kl_divergence, "kl of logs": _kl_divergence_of_logs}


class Operands(NamedTuple):
    """What a kernel reads."""

    elements: elements.Operands
    factors: tuple[Matrix, ...]  # each multiplies the losses of its elements


class Gradients(NamedTuple):
    """Pointers to [N, L], or None."""

    inputs: Any
    targets: Any


class Launch(NamedTuple):
    """What is compiled in, beside the formula."""

    elements: elements.Launch
    reduced: bool
    written: bool  # gradients are written already, for the upstream that was expected


@triton.jit
def _tile(operands, place, scale, loss_ptr, grads, FORMULA: tl.constexpr, LAUNCH: tl.constexpr):
    """Losses of a tile, and ``scale`` times their gradients, which are stored. Past the end, x = t = 0 has none."""
    DTYPE: tl.constexpr = LAUNCH.elements.dtype
    zero = None if place.valid is None else 0.0
    x = load(operands.elements.inputs, place, zero, DTYPE)
    target, kept = load_targets(operands.elements, place, LAUNCH.elements)
    loss, slope, target_slope = FORMULA(x, target.to(DTYPE), LAUNCH.elements.fast)
    factor = load_product(operands.factors, place, zero, DTYPE)
    if factor is not None:
        loss *= factor
        slope *= factor
        target_slope *= factor
    slope *= scale
    target_slope *= scale
    if kept is not None:
        loss = tl.where(kept, loss, 0.0)
        slope = tl.where(kept, slope, 0.0)
        target_slope = tl.where(kept, target_slope, 0.0)
    if not LAUNCH.reduced and loss_ptr is not None:
        store_rounded(loss_ptr + place.offs, loss, place.valid)
    if grads.inputs is not None:
        store_rounded(grads.inputs + place.offs, slope, place.valid)
    if grads.targets is not None:
        store_rounded(grads.targets + place.offs, target_slope, place.valid)
    return loss


@triton.jit(do_not_specialize=["denominator"])
def _pointwise_kernel(
    operands,  # Operands
    denominator,  # an integer, or a pointer to a number in []
    upstream,  # Upstream
    loss_ptr,  # [N, L]; when reduced [programs], of sums that no denominator divides; or None
    grads,  # Gradients
    numel,
    FORMULA: tl.constexpr,
    LAUNCH: tl.constexpr,  # Launch
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = LAUNCH.elements.dtype
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
            place = place_of(tile * BLOCK, lanes, numel, REST, LAUNCH.elements.num_labels)
            loss = _tile(operands, place, scale, loss_ptr, grads, FORMULA, LAUNCH)
            if LAUNCH.reduced:
                partial += loss
    if LAUNCH.reduced and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(partial))


def pointwise_launcher(
    formula: str,
    matrices: Matrices,
    factors: tuple[Tensor, ...],
    denominator: int | Tensor,
    upstream: Upstream,
    loss: Tensor | None,
    grads: Gradients,
    *,
    reduced: bool,
    written: bool,
) -> None:
    """Launch one pass over [N, L] matrices of any strides.

    ``loss`` and ``grads`` are contiguous; an upstream is a scalar. The denominator divides the gradients; a reduced
    loss comes as partial sums, and ``sum_launcher`` divides it.
    """
    inputs = matrices.inputs
    block = tile_size(inputs)
    read, launch = elements.prepare(matrices, inputs.shape, block, others=factors)
    with launch_scope(inputs):
        _pointwise_kernel[(num_programs(inputs),)](
            Operands(read, tuple(matrix(factor) for factor in factors)),
            denominator,
            upstream,
            loss,
            grads,
            inputs.numel(),
            FORMULA=FORMULAS[formula],
            LAUNCH=Launch(launch, reduced, written),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
