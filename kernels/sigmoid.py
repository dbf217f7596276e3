"""The multi-label family: losses of one logit and one label, any number of them in one launch.

=====  ================  ===========================
loss   value             d/dv
=====  ================  ===========================
bce    -log p            q
focal  -q^gamma log p    q^gamma (q - gamma p log p)
=====  ================  ===========================

v = (1 - 2y) x, q = sigmoid(v) is the probability of the wrong label and p = 1 - q.

A label y between 0 and 1 lies at a ``distance`` d from a hard label, and v is that one's. Then the cross-entropy is
whole * (-log p) - rejected * v, where ``whole`` is pos_weight * y + (1 - y) and ``rejected`` the term of the other hard
label, (1 - y) or pos_weight * y; and the focal factor q becomes q + d (p - q).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import LARGE, LARGEST, load_as, power, sigmoids, store_rounded
from .launch import launch_scope


@triton.jit
def bce(v, soft, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Binary cross-entropy and its slope."""
    _, q, nll, _ = sigmoids(v, FAST)
    if soft is None:
        return nll, q
    else:
        whole, rejected, _ = soft
        # No two infinities are subtracted, and none is multiplied by 0.
        linear = tl.where(rejected == 0, 0.0, rejected * tl.minimum(v, LARGEST))
        return whole * nll - linear, whole * q - rejected


@triton.jit
def focal(v, soft, PARAMS: tl.constexpr, FAST: tl.constexpr):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002) and its slope; PARAMS is (gamma,)."""
    GAMMA: tl.constexpr = PARAMS[0]
    if GAMMA == 0:
        return bce(v, soft, PARAMS, FAST)
    p, q, nll, neg_log_q = sigmoids(v, FAST)
    # An infinite logit has p = 0 and an infinite loss, whose product is 0.
    if soft is None:
        modulation = power(q, neg_log_q, GAMMA, FAST)
        growth = p * tl.minimum(nll, LARGE)
        return modulation * nll, modulation * (GAMMA * growth + q)
    else:
        ce, slope = bce(v, soft, PARAMS, FAST)
        _, _, distance = soft
        hard = distance == 0
        m = q + distance * (p - q)
        # m underflows before its logarithm does, and only at a hard label.
        neg_log_m = tl.where(hard, neg_log_q, -tl.log(m))
        relative_slope = tl.where(hard, p, p * q * (1.0 - 2.0 * distance) / tl.where(hard, 1.0, m))
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
def _times(coef, pointer, offs, row, col, strides, valid, zero):
    """coef times an [N, L] operand, if there is one."""
    if pointer is None:
        return coef
    else:
        return coef * load_as(pointer + _element(offs, row, col, strides), valid, zero, coef.dtype)


@triton.jit
def _mean_of_label(positive, y, when_positive, when_negative):
    """One of two values by a hard label, or their mean by a soft one."""
    if y is None:
        return tl.where(positive, when_positive, when_negative)
    else:
        return y * when_positive + (1.0 - y) * when_negative


@triton.jit
def _soft_label(positive, y, pos_weight):
    """(whole, rejected, distance) of the module's docstring."""
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
    denominator,  # an integer, or a pointer to a number in []
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
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        pid = pid.to(tl.int64)
        lanes = lanes.to(tl.int64)
    if denominator.dtype.is_ptr():
        scale = 1.0 / tl.load(denominator).to(COMPUTE)
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
        end = full_tiles + tl.cdiv(numel - full_tiles * BLOCK, BLOCK) if REST else full_tiles
        for tile in range(first, end, programs):
            offs = tile * BLOCK + lanes
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
                coef *= _mean_of_label(positive, y, alpha, 1.0 - alpha)
            elif ALPHA is not None:
                coef = _mean_of_label(positive, y, scale * ALPHA, scale * (1.0 - ALPHA))
            coef = _times(coef, weight_ptr, offs, row, col, weight_strides, valid, zero)
            if not REDUCED:
                coef = _times(coef, upstream_ptr, offs, row, col, upstream_strides, valid, zero)
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
# is a small part of the whole, and few enough for one program to add up their sums. A constant: the order of the
# additions does not depend on the number of multiprocessors.
_MAX_PROGRAMS = 8192


def _block(inputs: Tensor) -> int:
    """16 bytes of logits a thread: the widest load, and labels land in the same threads without an exchange."""
    return 32 * _NUM_WARPS * (16 // inputs.element_size())


def num_programs(inputs: Tensor) -> int:
    """How many partial sums a reduced loss has."""
    return min(triton.cdiv(inputs.numel(), _block(inputs)), _MAX_PROGRAMS)


def _strides(matrix: Tensor | None) -> tuple[int, ...] | None:
    return None if matrix is None or matrix.is_contiguous() else matrix.stride()


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
    matrices = [m for m in (inputs, targets, weight, None if reduced else upstream) if m is not None]
    extent = max(sum((n - 1) * s for n, s in zip(m.shape, m.stride(), strict=True)) for m in matrices)
    block = _block(inputs)
    by_label = isinstance(alpha, Tensor) or pos_weight is not None or any(_strides(m) for m in matrices)
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
            _strides(inputs),
            _strides(targets),
            alpha.stride(0) if isinstance(alpha, Tensor) else None,
            _strides(weight),
            pos_weight.stride(0) if pos_weight is not None else None,
            None if reduced else _strides(upstream),
            FORMULA=FORMULAS[formula],
            PARAMS=params,
            ALPHA=alpha if isinstance(alpha, float) else None,
            L=inputs.shape[1] if by_label else None,
            REDUCED=reduced,
            WRITTEN=written,
            SOFT=targets.is_floating_point(),
            FAST=inputs.element_size() == 2 and compute_dtype == torch.float32,
            WIDE=max(inputs.numel(), extent) + block >= 2**31,
            COMPUTE=tl.float64 if compute_dtype == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )


def sum_launcher(partials: Tensor, total: Tensor) -> None:
    """Add up partial sums in a fixed order, and round once, to the total's dtype."""
    with launch_scope(partials):
        _sum_kernel[(1,)](
            partials, total, partials.numel(), BLOCK=triton.next_power_of_2(partials.numel()), num_warps=8
        )
