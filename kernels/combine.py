"""From the sums of the parts of lines to the loss, and to what the gradient needs of each line."""

import triton
import triton.language as tl
from torch import Tensor

from .device import store_rounded
from .elements import triton_dtype
from .launch import launch_scope
from .lines import ABSENT, Sums, add, add_parts, line_count, row_factor, store_sums, two_way, zlpr
from .upstream import inverse


@triton.jit
def _combine(
    sums_ptr,  # [4 or 5, parts, lines]
    slopes_ptr,  # [4, lines]
    parts,
    lines,
    line,  # [LINES]
    factor,  # [LINES]
    DTYPE: tl.constexpr,
    FORMULA: tl.constexpr,
    T: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
):
    """The losses of some lines, and what they add to the denominator."""
    negative = Sums(tl.full([LINES], ABSENT, DTYPE), tl.zeros([LINES], DTYPE))
    positive = negative
    num_positive = tl.zeros([LINES], DTYPE)
    size = tl.cast(parts, tl.int64) * lines
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        pointer = sums_ptr + part * lines + line[None, :]
        valid = (part < parts) & (line < lines)[None, :]
        top, total = tl.load(pointer, valid, ABSENT), tl.load(pointer + size, valid, 0.0)
        negative = add(negative, add_parts(Sums(top, total), T[0]), T[0])
        top, total = tl.load(pointer + 2 * size, valid, ABSENT), tl.load(pointer + 3 * size, valid, 0.0)
        positive = add(positive, add_parts(Sums(top, total), T[1]), T[1])
        if COUNT == "positives":
            num_positive += tl.sum(tl.load(pointer + 4 * size, valid, 0.0), 0)
    loss, negative_slope, positive_slope = FORMULA(negative, positive, T)
    negative_slopes = Sums(negative.top, negative_slope * factor)
    store_sums(slopes_ptr + line, lines, negative_slopes, Sums(positive.top, positive_slope * factor), line < lines)
    return loss * factor, line_count(negative, positive, num_positive, COUNT)


@triton.jit(do_not_specialize=["denominator"])
def _combine_kernel(
    rows_ptr,  # [5, row_parts, N], from _partials_kernel
    cols_ptr,  # [4, col_parts, L], or None
    factors,  # each [N]
    denominator,  # an integer, a pointer to a number in [], or None for 1
    row_slopes_ptr,  # [4, N]: the tops of both classes, and the factor of e^(v - top / t) in the gradient
    col_slopes_ptr,  # [4, L], or None
    loss_ptr,  # [N], or [programs] when REDUCED
    count_ptr,  # [programs], or None
    row_parts,
    num_rows,
    col_parts,
    num_cols,
    DTYPE: tl.constexpr,
    FORMULA: tl.constexpr,
    T: tl.constexpr,
    COUNT: tl.constexpr,
    REDUCED: tl.constexpr,
    PARTS: tl.constexpr,
    LINES: tl.constexpr,
):
    """A program puts together some rows, or some columns."""
    pid = tl.program_id(0)
    of_rows = tl.cdiv(num_rows, LINES)
    line = pid * LINES + tl.arange(0, LINES)
    if cols_ptr is None or pid < of_rows:
        factor = row_factor(factors, line, line < num_rows, DTYPE) * inverse(denominator, DTYPE)
        loss, count = _combine(
            rows_ptr, row_slopes_ptr, row_parts, num_rows, line, factor, DTYPE, FORMULA, T, COUNT, PARTS, LINES
        )
    else:
        line -= of_rows * LINES
        loss, count = _combine(
            cols_ptr, col_slopes_ptr, col_parts, num_cols, line, 1.0, DTYPE, FORMULA, T, COUNT, PARTS, LINES
        )
    if REDUCED:
        tl.store(loss_ptr + pid, tl.sum(loss))
        if count_ptr is not None:
            tl.store(count_ptr + pid, tl.sum(count))
    else:
        store_rounded(loss_ptr + line, loss, line < num_rows)


@triton.jit
def _total_kernel(
    losses_ptr,  # [programs]
    counts_ptr,  # [programs], or None
    loss_ptr,  # []
    denominators_ptr,  # [1], or [2]: of rows and of columns; None without counts
    row_programs,
    programs,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of each group of programs, divided by the group's count if it has one, and added up."""
    DTYPE: tl.constexpr = losses_ptr.dtype.element_ty
    total = tl.full([], 0.0, DTYPE)
    for group in tl.static_range(GROUPS):
        losses = tl.zeros([BLOCK], DTYPE)
        counts = tl.zeros([BLOCK], DTYPE)
        end = row_programs if group == 0 else programs
        for first in range(0 if group == 0 else row_programs, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            losses += tl.load(losses_ptr + index, index < end, 0.0)
            if counts_ptr is not None:
                counts += tl.load(counts_ptr + index, index < end, 0.0)
        loss = tl.sum(losses)
        if counts_ptr is not None:
            count = tl.maximum(tl.sum(counts), 1.0)
            tl.store(denominators_ptr + group, count)
            loss /= count
        total += loss
    store_rounded(loss_ptr, total, None)


FORMULAS = {"zlpr": zlpr, "two_way": two_way}
_LINES, _PARTS = 32, 32


def num_programs(num_rows: int, num_cols: int = 0) -> tuple[int, int]:
    """How many partial losses of rows, and of rows and columns."""
    of_rows = triton.cdiv(num_rows, _LINES)
    return of_rows, of_rows + triton.cdiv(num_cols, _LINES)


def combine_launcher(
    formula: str,
    rows: Tensor,
    cols: Tensor | None,
    factors: tuple[Tensor, ...],
    denominator: int | Tensor | None,
    row_slopes: Tensor,
    col_slopes: Tensor | None,
    loss: Tensor,
    counts: Tensor | None,
    *,
    temperatures: tuple[float, ...],
    count: str,
    reduced: bool,
) -> None:
    """Slopes ``row_slopes`` [4, N] and ``col_slopes`` [4, L], and losses and counts by program, or the loss by row."""
    of_rows, of_cols = rows.shape[1:], (0, 0) if cols is None else cols.shape[1:]
    with launch_scope(rows):
        _combine_kernel[(num_programs(of_rows[1], of_cols[1])[1],)](
            rows,
            cols,
            factors,
            denominator,
            row_slopes,
            col_slopes,
            loss,
            counts,
            *of_rows,
            *of_cols,
            DTYPE=triton_dtype(rows.dtype),
            FORMULA=FORMULAS[formula],
            T=temperatures,
            COUNT=count,
            REDUCED=reduced,
            PARTS=_PARTS,
            LINES=_LINES,
        )


def total_launcher(
    losses: Tensor, counts: Tensor | None, loss: Tensor, denominators: Tensor | None, programs: int
) -> None:
    """Add up the losses of the first programs and of the rest, each divided by its count, which is at least 1."""
    with launch_scope(losses):
        _total_kernel[(1,)](
            losses,
            counts,
            loss,
            denominators,
            programs,
            len(losses),
            GROUPS=2 if programs < len(losses) else 1,
            BLOCK=1024,
        )
