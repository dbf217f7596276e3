"""What the kernels of rows of logits share: what they are launched with, and what they load of each row."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .device import load_as, sigmoids, tanh, two_sum
from .elements import triton_dtype
from .launch import launch_scope
from .operands import Place, extent, load
from .upstream import inverse


class Operands(NamedTuple):
    """What a kernel reads: matrices [N, C] of any strides, and contiguous vectors."""

    inputs: Any
    targets: Any  # class probabilities, or None
    labels: Any  # [N], or None
    weight: Any  # [C], or None
    margins: Any  # [C], or None
    factors: tuple[Any, ...]  # each [N], multiplies the loss of its row


class Loss(NamedTuple):
    """What a loss is, beside its tensors."""

    formula: str
    params: tuple[float, ...]
    smoothing: float
    ignored: int
    softcap: float
    scale: float  # of the logits
    z_loss: float
    spread_weight: bool  # the weight is each class's own; else that of the label


class Launch(NamedTuple):
    """What is compiled in."""

    loss: Loss
    num_classes: int
    reduced: bool
    written: bool  # grad is written already, for the upstream that was expected
    fast: bool
    wide: bool  # offsets past 2^31
    dtype: tl.dtype


class Logits(NamedTuple):
    """As the loss is of them."""

    x: Any
    slope: Any  # the derivative in the given ones, without the scale; None for 1


class Work(NamedTuple):
    """What a program works on, and where it leaves what it finds."""

    operands: Any
    denominator: Any  # an integer, or a pointer to a number in []
    z_denominator: Any  # the same for z_loss, or None
    upstream: Any  # the number that came, or is expected
    upstreams_ptr: Any  # [N], or None
    loss_ptr: Any  # [N]; when reduced [programs]; or None
    grad_ptrs: Any  # each [N, C], or None
    num_rows: Any


class Rows(NamedTuple):
    """Of each row, [ROWS]."""

    row: Any
    kept: Any
    label: Any  # in 32 bits, in which each class is compared with it; -1 for none
    x: Any  # the label's logit
    slope: Any  # and its derivative, as in Logits
    weight: Any  # the label's; None for 1
    hard: Any  # what the target has on the label; None where it is class probabilities


class Sums(NamedTuple):
    """Over the classes of each row, all but ``at`` without the label's."""

    top: Any  # the greatest logit
    total: Any  # of e^(x - top)
    at: Any  # of class probabilities, the label's; else None
    others: Any  # of the target; None for 0, as the rest
    distance: Any  # spread (x_t - x)
    mixed: Any  # spread e^(x - top)


class Margin(NamedTuple):
    """What u gives."""

    p: Any
    q: Any
    nll: Any  # -log p
    neg_log_q: Any
    inverse: Any  # 1 / Sums.total, 0 for none


@triton.jit
def transform(x, LAUNCH: tl.constexpr):
    """The logits, capped or scaled."""
    slope = None
    if LAUNCH.loss.softcap != 0:
        ratio, slope = tanh(x * (1.0 / LAUNCH.loss.softcap))
        x = tl.where(x == -float("inf"), x, LAUNCH.loss.softcap * ratio)
    if LAUNCH.loss.scale != 1:
        x *= LAUNCH.loss.scale
    return Logits(x, slope)


@triton.jit
def place_of(row, col, valid, LAUNCH: tl.constexpr):
    return Place(None, row * LAUNCH.num_classes + col, row, col, valid, LAUNCH.num_classes)


@triton.jit
def load_rows(operands, row, num_rows, LAUNCH: tl.constexpr):
    """What each row has beside its logits; without labels, the greatest logit is still to be found."""
    DTYPE: tl.constexpr = LAUNCH.dtype
    kept = row < num_rows
    if operands.labels is None:
        return Rows(row, kept, None, None, None, None, None)
    else:
        C: tl.constexpr = LAUNCH.num_classes
        label = tl.load(operands.labels + row, kept, 0)
        kept &= label != LAUNCH.loss.ignored
        known = kept & (label >= 0) & (label < C)
        place = place_of(row, label, known, LAUNCH)
        logits = transform(load(operands.inputs, place, 0.0, DTYPE), LAUNCH)
        x = logits.x
        if operands.margins is not None:
            x -= LAUNCH.loss.scale * load_as(operands.margins + label, known, 0.0, DTYPE)
        x = tl.where(kept & ~known, float("nan"), x)  # a label out of range is loud
        weight = None
        hard = tl.where(kept, 1.0, 0.0).to(DTYPE) * (1.0 - LAUNCH.loss.smoothing + LAUNCH.loss.smoothing / C)
        if operands.weight is not None:
            weight = load_as(operands.weight + label, known, 0.0, DTYPE)
            if LAUNCH.loss.spread_weight:
                hard *= weight
                weight = None
        label = tl.where(known, label, -1).to(tl.int32)
        return Rows(row, kept, label, x, logits.slope, weight, hard)


@triton.jit
def finite(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def margin_of(sums, x):
    """u, and what the rounding of it lost, as the probabilities and their logarithms."""
    distance, low = two_sum(finite(sums.top), -x)
    u, lost = two_sum(distance, tl.log(sums.total))
    lost += low
    lost = tl.where(lost == lost, lost, 0.0)  # of infinities
    p, q, nll, neg_log_q = sigmoids(u, False)
    nll += q * lost
    neg_log_q -= p * lost
    return Margin(p - p * q * lost, q + p * q * lost, nll, neg_log_q, tl.where(sums.total == 0, 0.0, 1.0 / sums.total))


@triton.jit
def factor_of(work, row, kept, weight, DTYPE: tl.constexpr):
    """What the loss of each row is multiplied by: nothing that does not count, whatever it holds."""
    factor = inverse(work.denominator, DTYPE)
    if weight is not None:
        factor *= weight
    for i in tl.static_range(len(work.operands.factors)):
        factor *= load_as(work.operands.factors[i] + row, row < work.num_rows, 0.0, DTYPE)
    return tl.where(kept, factor, 0.0)


@triton.jit
def upstream_of(work, row, kept, DTYPE: tl.constexpr):
    """The upstream gradient of each row."""
    upstream = work.upstream
    if work.upstreams_ptr is not None:
        upstream *= load_as(work.upstreams_ptr + row, row < work.num_rows, 0.0, DTYPE)
    return tl.where(kept, upstream, 0.0)


class Config(NamedTuple):
    """How rows are cut."""

    rows: int
    block: int
    num_warps: int
    loop: bool  # programs take rows in turn; else each has its own, and more registers


# Enough programs to fill the largest GPU several times over, and few enough for one program to add up their sums.
_MAX_PROGRAMS = 8192
MANY = 4096  # classes of a row; of longer ones there are never so many that programs have to take turns


def num_warps(threads: int) -> int:
    return max(threads // device.LANES, 1)


def num_programs(num_rows: int, cut: Config) -> int:
    """How many partial sums a reduced loss has."""
    programs = triton.cdiv(num_rows, cut.rows)
    return min(programs, _MAX_PROGRAMS) if cut.loop else programs


def prepare(
    loss_of: Loss,
    tensors: Operands,
    cut: Config,
    *logits: Tensor,
    compute_dtype: torch.dtype,
    reduced: bool,
    written: bool,
) -> Launch:
    """What is compiled into a kernel for these tensors, of which some are ``logits``."""
    matrices = [tensor for tensor in (tensors.inputs, tensors.targets) if tensor is not None]
    last_offset = max(tensors.inputs.numel(), *map(extent, matrices))
    return Launch(
        loss=loss_of,
        num_classes=tensors.inputs.shape[1],
        reduced=reduced,
        written=written,
        fast=compute_dtype == torch.float32 and all(tensor.element_size() == 2 for tensor in logits),
        wide=last_offset + cut.rows * cut.block >= 2**31,
        dtype=triton_dtype(compute_dtype),
    )


@triton.jit
def _count_kernel(
    labels_ptr,  # [N]
    weight_ptr,  # [C], or None
    counts_ptr,  # [2]: the weights of the labels that count, infinity for 0, and how many they are
    num_rows,
    num_classes,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = counts_ptr.dtype.element_ty
    weights = tl.zeros([BLOCK], DTYPE)
    counts = tl.zeros([BLOCK], DTYPE)
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + row, row < num_rows, IGNORED)
        kept = (label != IGNORED) & (row < num_rows)
        counts += tl.where(kept, 1.0, 0.0)
        if weight_ptr is not None:
            weights += load_as(weight_ptr + label, kept & (label >= 0) & (label < num_classes), 0.0, DTYPE)
    count = tl.sum(counts)
    weight = count
    if weight_ptr is not None:
        weight = tl.sum(weights)
    tl.store(counts_ptr, tl.where(weight == 0, float("inf"), weight))  # where nothing counts, the mean is 0
    tl.store(counts_ptr + 1, tl.maximum(count, 1.0))


_COUNT_BLOCK = 1024
MAX_COUNTED = 2**17  # rows that one program counts in less time than the loss takes


def count_launcher(labels: Tensor, weight: Tensor | None, counts: Tensor, *, num_classes: int, ignored: int) -> None:
    """The two denominators of a mean, neither of them 0."""
    with launch_scope(labels):
        _count_kernel[(1,)](labels, weight, counts, len(labels), num_classes, IGNORED=ignored, BLOCK=_COUNT_BLOCK)
