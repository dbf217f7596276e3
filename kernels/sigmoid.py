"""The multi-label family: losses of one logit and one label, any number of them in one launch.

=====  ================  ===========================
loss   value             d/dv
=====  ================  ===========================
bce    -log p            q
focal  -q^gamma log p    q^gamma (q - gamma p log p)
=====  ================  ===========================

v = (1 - 2y) x, q = sigmoid(v) is the probability of the wrong label and p = 1 - q. A label y between 0 and 1 lies at a
distance d = |y - h| from a hard label h: then bce is -a log p - b v and the factor q becomes m = q + d (p - q), where
b is the share of the cross-entropy that belongs to the label 1 - h, times pos_weight if that is 1, and a the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import LARGE, launch_scope, load_as, log_sigmoids, power, store_rounded


@triton.jit
def bce(v, soft, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Binary cross-entropy and its slope."""
    _, q, nll, _ = log_sigmoids(v, FAST)
    if soft is None:
        return nll, q
    else:
        a, b, _ = soft
        return a * nll - tl.where(b == 0, 0.0, b * v), a * q - b


@triton.jit
def focal(v, soft, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002) and its slope; PARAMS is (gamma,)."""
    GAMMA: tl.constexpr = PARAMS[0]
    if GAMMA == 0:
        return bce(v, soft, PARAMS, FAST)
    p, q, nll, neg_log_q = log_sigmoids(v, FAST)
    # An infinite logit has p = 0 and an infinite loss, whose product is 0.
    if soft is None:
        modulation = power(q, neg_log_q, GAMMA, FAST)
        growth = p * tl.minimum(nll, LARGE)
        return modulation * nll, modulation * (GAMMA * growth + q)
    else:
        ce, slope = bce(v, soft, PARAMS, FAST)
        _, _, d = soft
        m = q + d * (p - q)
        # m underflows before its logarithm does, and only where d is 0.
        neg_log_m = tl.where(d == 0, neg_log_q, -tl.log(m))
        relative_slope = tl.where(d == 0, p, p * q * (1.0 - 2.0 * d) / tl.where(d == 0, 1.0, m))
        modulation = power(m, neg_log_m, GAMMA, FAST)
        growth = relative_slope * tl.minimum(ce, LARGE)
        return modulation * ce, modulation * (GAMMA * growth + slope)


@triton.jit
def _element(offs, row, col, strides):
    """Where an operand's elements lie; one without strides is contiguous, and loads in full vectors."""
    if strides is None:
        return offs
    else:
        return row * strides[0] + col * strides[1]


@triton.jit
def _label(positive, y, when_positive, when_negative):
    """A label's share of two values: one of them, or for a soft label y their mean."""
    if y is None:
        return tl.where(positive, when_positive, when_negative)
    else:
        return y * when_positive + (1.0 - y) * when_negative


@triton.jit
def _soft_label(positive, y, pos_weight):
    """(a, b, d) of the module's docstring."""
    distance = tl.where(positive, 1.0 - y, y)
    if pos_weight is None:
        return 1.0, distance, distance
    else:
        return y * pos_weight + (1.0 - y), tl.where(positive, 1.0 - y, y * pos_weight), distance


@triton.jit(do_not_specialize=["denominator"])
def _sigmoid_kernel(
    inputs_ptr,  # [N, L]
    targets_ptr,  # [N, L]
    alpha_ptr,  # [L], or None
    weight_ptr,  # [N, L], or None
    pos_weight_ptr,  # [L], or None
    denominator,  # an integer, or a pointer to a count in []
    upstream_ptr,  # [N, L], [] when REDUCED, or None for 1
    loss_ptr,  # [N, L], [programs] when REDUCED, or None
    grad_ptr,  # [N, L], or None
    # scalars: strides are (row, column), or None for a contiguous operand
    numel,
    inputs_strides,
    targets_strides,
    alpha_stride,
    weight_strides,
    pos_weight_stride,
    upstream_strides,
    # what is compiled in
    FORMULA: tl.constexpr,
    PARAMS: tl.constexpr,
    ALPHA: tl.constexpr,  # a number, or None
    L: tl.constexpr,  # None when no operand needs row and column
    REDUCED: tl.constexpr,
    WRITTEN: tl.constexpr,  # grad holds the gradient for an upstream of 1 already
    SOFT: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,  # offsets past 2^31
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if denominator.dtype.is_ptr():
        scale = 1.0 / tl.maximum(tl.load(denominator).to(COMPUTE), 1.0)
    else:
        scale = 1.0 / denominator.to(COMPUTE)
    if REDUCED and upstream_ptr is not None:
        upstream = load_as(upstream_ptr, None, None, COMPUTE)
        scale *= upstream
        if WRITTEN:
            numel = tl.where(upstream == 1, 0, numel)

    partial = tl.zeros([BLOCK], COMPUTE)
    full_tiles = numel // BLOCK
    # Full tiles need no mask, which would cost an instruction an element; the rest is one tile of program 0's.
    for REST in tl.static_range(2):
        first = full_tiles + pid if REST else pid
        end = tl.cdiv(numel, BLOCK) if REST else full_tiles
        for tile in range(first, end, programs):
            start = tile.to(tl.int64) * BLOCK if WIDE else tile * BLOCK
            offs = start + tl.arange(0, BLOCK)
            valid = offs < numel if REST else None
            row = offs // L if L is not None else None
            col = offs % L if L is not None else None

            # A negative label at -inf has no loss: lanes past the end add nothing.
            zero = 0.0 if REST else None
            lowest = -float("inf") if REST else None
            x = load_as(inputs_ptr + _element(offs, row, col, inputs_strides), valid, lowest, COMPUTE)
            target_ptrs = targets_ptr + _element(offs, row, col, targets_strides)
            if SOFT:
                y = load_as(target_ptrs, valid, zero, COMPUTE)
                positive = y > 0.5
            else:
                y = None
                positive = tl.load(target_ptrs, valid, 0 if REST else None) != 0
            v = tl.where(positive, -x, x)

            coef = scale
            if alpha_ptr is not None:
                alpha = load_as(alpha_ptr + col * alpha_stride, valid, zero, COMPUTE)
                coef *= _label(positive, y, alpha, 1.0 - alpha)
            elif ALPHA is not None:
                coef = _label(positive, y, scale * ALPHA, scale * (1.0 - ALPHA))
            if weight_ptr is not None:
                coef *= load_as(weight_ptr + _element(offs, row, col, weight_strides), valid, zero, COMPUTE)
            if upstream_ptr is not None and not REDUCED:
                coef *= load_as(upstream_ptr + _element(offs, row, col, upstream_strides), valid, zero, COMPUTE)
            pos_weight = None
            if pos_weight_ptr is not None:
                pos_weight = load_as(pos_weight_ptr + col * pos_weight_stride, valid, zero, COMPUTE)
            soft = None
            if SOFT:
                soft = _soft_label(positive, y, pos_weight)
            elif pos_weight_ptr is not None:
                coef *= tl.where(positive, pos_weight, 1.0)

            loss, slope = FORMULA(v, soft, PARAMS, FAST)
            if REDUCED:
                partial += coef * loss
            elif loss_ptr is not None:
                store_rounded(loss_ptr + offs, coef * loss, valid)
            if grad_ptr is not None:
                slope *= coef
                store_rounded(grad_ptr + offs, tl.where(positive, -slope, slope), valid)
    if REDUCED and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(partial))


@triton.jit
def _sum_kernel(
    partials_ptr,  # [count]
    total_ptr,  # []
    count,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    store_rounded(total_ptr, tl.sum(tl.load(partials_ptr + index, index < count, 0)), None)


FORMULAS = {"bce": bce, "focal": focal}

_NUM_WARPS = 4
# Programs take their tiles in turn: enough of them to fill the largest GPU several times over, so that the last round
# is a small part of the whole, and few enough for one program to add up their sums. A constant, so that the order of
# the additions, and with it the last bit of the loss, is the same on every GPU.
_MAX_PROGRAMS = 8192


def _block(inputs: Tensor) -> int:
    """16 bytes of logits a thread: the widest load, and labels land in the same threads without an exchange."""
    return 32 * _NUM_WARPS * (16 // inputs.element_size())


def num_programs(inputs: Tensor) -> int:
    """How many partial sums a reduced loss has."""
    return min(triton.cdiv(inputs.numel(), _block(inputs)), _MAX_PROGRAMS)


def sigmoid_launcher(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    denominator: int | Tensor,
    upstream: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    reduced: bool,
    written: bool,
    compute_dtype: torch.dtype,
) -> None:
    """Launch one pass over [N, L] matrices of any strides; vectors are [L]; ``loss`` and ``grad`` are contiguous."""
    by_label = [vector for vector in (alpha, pos_weight) if isinstance(vector, Tensor)]
    matrices = [inputs, targets] + [m for m in (weight, None if reduced else upstream) if m is not None]
    strides = {id(matrix): None if matrix.is_contiguous() else matrix.stride() for matrix in matrices}
    extent = max(sum((n - 1) * s for n, s in zip(m.shape, m.stride(), strict=True)) for m in [inputs, *matrices])
    with launch_scope(inputs):
        _sigmoid_kernel[(num_programs(inputs),)](
            inputs,
            targets.view(torch.uint8) if targets.dtype == torch.bool else targets,
            alpha if isinstance(alpha, Tensor) else None,
            weight,
            pos_weight,
            denominator,
            upstream,
            loss,
            grad,
            inputs.numel(),
            strides[id(inputs)],
            strides[id(targets)],
            alpha.stride(0) if isinstance(alpha, Tensor) else None,
            strides.get(id(weight)),
            pos_weight.stride(0) if pos_weight is not None else None,
            strides.get(id(upstream)),
            FORMULA=FORMULAS[formula],
            PARAMS=params,
            ALPHA=alpha if isinstance(alpha, float) else None,
            L=inputs.shape[1] if by_label or any(strides.values()) else None,
            REDUCED=reduced,
            WRITTEN=written,
            SOFT=targets.is_floating_point(),
            FAST=inputs.element_size() == 2 and compute_dtype == torch.float32,
            WIDE=max(inputs.numel(), extent) >= 2**31,
            COMPUTE=tl.float64 if compute_dtype == torch.float64 else tl.float32,
            BLOCK=_block(inputs),
            num_warps=_NUM_WARPS,
        )


def sum_launcher(partials: Tensor, total: Tensor) -> None:
    """Add up partial sums in a fixed order, and round once, to the total's dtype."""
    with launch_scope(partials):
        _sum_kernel[(1,)](
            partials, total, partials.numel(), BLOCK=triton.next_power_of_2(partials.numel()), num_warps=8
        )
