"""ZLPR where a row fits a tile: rows are read once, and their gradient is written with their loss.

lines.py has the mathematics, parts.py the longer rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import store_rounded
from .elements import Matrices, prepare
from .launch import launch_scope
from .lines import by_class, line_count, line_sums, load_tile, row_factor, store_gradient, zlpr
from .upstream import Upstream, inverse, receive


@triton.jit(do_not_specialize=["denominator"])
def _zlpr_kernel(
    operands,  # elements.Operands
    factors,  # each [N]
    denominator,  # an integer, a pointer to a number in [], or None for 1
    upstream,  # Upstream
    loss_ptr,  # [N], [programs] when REDUCED, or None
    count_ptr,  # [programs], or None
    grad_ptr,  # [N, L], or None
    num_rows,
    REDUCED: tl.constexpr,
    COUNT: tl.constexpr,
    WRITTEN: tl.constexpr,  # grad is written already, for the upstream that was expected
    LAUNCH: tl.constexpr,  # elements.Launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if LAUNCH.wide:
        pid = pid.to(tl.int64)
    scale = inverse(denominator, LAUNCH.dtype)
    value, done = receive(upstream, pid, WRITTEN, LAUNCH.dtype)
    end = num_rows
    if WRITTEN:
        end = tl.where(done, 0, num_rows)
    losses = tl.zeros([ROWS], LAUNCH.dtype)
    counts = tl.zeros([ROWS], LAUNCH.dtype)
    for first in range(pid * ROWS, end, tl.num_programs(0) * ROWS):
        tile = load_tile(operands, first, 0, num_rows, LAUNCH, ROWS, BLOCK)
        negative, positive, e = line_sums(tile, None, (1.0, 1.0), True, LAUNCH.fast, 1)
        loss, negative_slope, positive_slope = zlpr(negative, positive, (1.0, 1.0))
        row = first + tl.arange(0, ROWS)
        factor = row_factor(factors, row, row < num_rows, LAUNCH.dtype) * scale
        if REDUCED:
            losses += loss * factor
        elif loss_ptr is not None:
            store_rounded(loss_ptr + row, loss * factor, row < num_rows)
        if count_ptr is not None:
            counts += line_count(negative, positive, tl.sum(tile.positive.to(LAUNCH.dtype), 1), COUNT)
        if grad_ptr is not None:
            factor *= value
            slope = by_class(tile.positive, positive_slope * factor, negative_slope * factor, 1)
            store_gradient(grad_ptr, tile, slope * e, LAUNCH.ignored is not None or operands.mask is not None)
    if REDUCED and loss_ptr is not None:
        tl.store(loss_ptr + pid, tl.sum(losses))
    if count_ptr is not None:
        tl.store(count_ptr + pid, tl.sum(counts))


# The longest row that is one tile; half of it in fp64. 32 logits a thread of four bytes: with their exponentials they
# stay in registers.
_LONGEST, _BYTES_A_WARP = 16384, 4096
# Shorter rows share a tile of one warp (in fp64 of two), which needs no barrier to add up a row.
_TILE, _MOST_ROWS = 1024, 8
# Enough programs to fill the largest GPU several times over, and few enough for one program to add up their sums.
_MAX_PROGRAMS = 8192


def fits(num_labels: int, compute_dtype: torch.dtype) -> bool:
    """Whether a row is one tile."""
    return num_labels * compute_dtype.itemsize <= 4 * _LONGEST


def num_programs(shape: tuple[int, int]) -> int:
    """How many partial sums a reduced loss has."""
    return min(triton.cdiv(shape[0], _tile(shape)[0]), _MAX_PROGRAMS)


def _tile(shape: tuple[int, int]) -> tuple[int, int]:
    block = triton.next_power_of_2(shape[1])
    return max(min(_TILE // block, _MOST_ROWS, triton.next_power_of_2(shape[0])), 1), block


def zlpr_launcher(
    matrices: Matrices,
    factors: tuple[Tensor, ...],
    denominator: int | Tensor | None,
    upstream: Upstream,
    loss: Tensor | None,
    counts: Tensor | None,
    grad: Tensor | None,
    *,
    reduced: bool,
    count: str,
    written: bool,
) -> None:
    """Launch one pass over [N, L] matrices of any strides.

    ``factors`` [N], ``loss``, ``counts`` and ``grad`` are contiguous; an upstream is a scalar.
    """
    inputs = matrices.inputs
    rows, block = _tile(inputs.shape)
    operands, launch = prepare(matrices, inputs.shape, rows * block, by_row=True)
    with launch_scope(inputs):
        _zlpr_kernel[(num_programs(inputs.shape),)](
            operands,
            factors,
            denominator,
            upstream,
            loss,
            counts,
            grad,
            inputs.shape[0],
            REDUCED=reduced,
            COUNT=count,
            WRITTEN=written,
            LAUNCH=launch,
            ROWS=rows,
            BLOCK=block,
            num_warps=max(rows * block * matrices.compute_dtype.itemsize // _BYTES_A_WARP, 1),
        )
