"""What multiplies a gradient: 1 over the denominator of the loss, and the upstream gradient.

A launch that computes a loss also writes its gradient, for the upstream that is expected, and notes which one that was.
Backward compares the note with what came: where they are equal the gradient is there, and its launch returns at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import load_as


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
