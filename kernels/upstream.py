"""What multiplies a gradient: 1 over the denominator of the loss, and the upstream gradient.

A launch that computes a loss also writes its gradient, for the upstream that is expected, and notes which one that was.
Backward compares the note with what came: where they are equal the gradient is there, and its launch returns at once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import load_as, store_rounded
from .launch import launch_scope


class Upstream(NamedTuple):
    """The gradient that comes to a scalar loss: pointers to numbers in []."""

    value: Any = None  # what came, or in forward what is expected; None for 1
    note: Any = None  # what the gradient is written for: forward stores it, backward compares; None for 1
    memory: Any = None  # where backward leaves what came, for the next forward to expect it


@triton.jit
def receive(upstream, pid, WRITTEN: tl.constexpr, DTYPE: tl.constexpr):
    """The upstream gradient, and whether the gradient is WRITTEN for it already."""
    done = False
    value = tl.full([], 1.0, DTYPE)
    if upstream.value is not None:
        value = load_as(upstream.value, None, None, DTYPE)
    if WRITTEN:
        done = value == (1.0 if upstream.note is None else tl.load(upstream.note))
    elif upstream.note is not None:
        tl.store(upstream.note, value, pid == 0)
    if upstream.memory is not None:
        tl.store(upstream.memory, value, pid == 0)
    return value, done


@triton.jit
def inverse(denominator, DTYPE: tl.constexpr):
    """1 over an integer, over the number that a pointer points to, or over None for 1."""
    if denominator is None:
        return tl.full([], 1.0, DTYPE)
    elif denominator.dtype.is_ptr():
        return 1.0 / tl.load(denominator).to(DTYPE)
    else:
        return 1.0 / denominator.to(DTYPE)


# Of a launch that mostly returns at once: programs enough to fill a GPU.
_RESCALE_PROGRAMS, _RESCALE_BLOCK = 1024, 1024


@triton.jit
def _rescale_kernel(
    values_ptr,  # [count], written for the upstream in the note
    upstream_ptr,  # [], what came
    note_ptr,  # []
    memory_ptr,  # [], where what came is left for the next forward; or None
    smallest,  # of what is left there
    largest,
    count,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        pid = pid.to(tl.int64)
        lanes = lanes.to(tl.int64)
    upstream = tl.load(upstream_ptr).to(DTYPE)
    note = tl.load(note_ptr).to(DTYPE)
    if memory_ptr is not None:
        usable = (tl.abs(upstream) >= smallest) & (tl.abs(upstream) <= largest)
        tl.store(memory_ptr, upstream, (pid == 0) & usable)
    end = tl.where(upstream == note, 0, count)
    ratio = upstream / note
    for start in range(pid * BLOCK, end, tl.num_programs(0) * BLOCK):
        offs = start + lanes
        values = load_as(values_ptr + offs, offs < count, 0.0, DTYPE)
        store_rounded(values_ptr + offs, values * ratio, offs < count)


def rescale_launcher(
    values: Tensor, upstream: Tensor, note: Tensor, memory: Tensor | None, *, smallest: float, largest: float
) -> None:
    """Make contiguous ``values`` of one upstream those of another; where they are equal, return at once."""
    programs = min(triton.cdiv(values.numel(), _RESCALE_BLOCK), _RESCALE_PROGRAMS)
    with launch_scope(values):
        _rescale_kernel[(programs,)](
            values,
            upstream,
            note,
            memory,
            smallest,
            largest,
            values.numel(),
            DTYPE=tl.float64 if values.dtype == torch.float64 else tl.float32,
            WIDE=values.numel() + programs * _RESCALE_BLOCK >= 2**31,
            BLOCK=_RESCALE_BLOCK,
        )
