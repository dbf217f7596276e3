"""The launches of ZLPR and two-way, and the memory that they need."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from ..kernels import combine, parts, rowwise
from ..kernels.upstream import Upstream
from ..reference.rowwise import known_denominator
from ..reference.sigmoid import Operands, Spec
from .families import Gradients, Saved
from .launch import expected_upstream, matrices, upstream_of
from .operands import as_matrices
from .upstream import Expected


def triton_forward(spec: Spec, operands: Operands, expected: Expected | None, with_grad: bool) -> tuple[Tensor, Saved]:
    """The loss, and what backward needs: for ZLPR with a denominator that is known beforehand, the gradient."""
    inputs = operands.inputs
    two_way = spec.formula == "two_way"
    denominator = None if two_way else known_denominator(spec, operands)
    grad = inputs.new_empty(inputs.shape) if with_grad and denominator is not None else None
    upstream, note = expected_upstream(expected, grad)
    reduced = spec.reduction != "none"
    loss = inputs.new_empty(() if reduced else inputs.shape[:-1], dtype=spec.loss_dtype)
    empty = partial(inputs.new_empty, dtype=spec.compute_dtype)
    operands = as_matrices(operands)
    shape = operands.inputs.shape
    saved = Saved(Gradients(grad), note=note, denominator=empty(2 if two_way else 1) if denominator is None else None)
    if not two_way and rowwise.fits(shape[1], spec.compute_dtype):
        row_programs = programs = rowwise.num_programs(shape)
    else:
        row_programs, programs = combine.num_programs(shape[0], shape[1] if two_way else 0)
        saved = saved._replace(row_slopes=empty(4, shape[0]), col_slopes=empty(4, shape[1]) if two_way else None)
    losses = empty(programs) if reduced else loss
    counts = empty(programs) if saved.denominator is not None else None
    if saved.row_slopes is None:
        _launch_zlpr(spec, operands, denominator, (), upstream, losses, counts, grad)
    else:
        _launch_sums(spec, operands, denominator, losses, counts, saved)
        if grad is not None:
            _launch_gradient(spec, operands, saved, (), upstream, grad)
    if reduced:
        combine.total_launcher(losses, counts, loss, saved.denominator, row_programs)
    return loss, saved


def triton_backward(
    spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None
) -> Tensor:
    """The gradient; a launch that returns at once where it is written and what came was expected."""
    grad = operands.inputs.new_empty(operands.inputs.shape) if saved.grads.inputs is None else saved.grads.inputs
    factors: tuple[Tensor, ...] = ()
    scalar = Upstream()
    if any(upstream.stride()):
        factors = (upstream.reshape(-1).contiguous(),)
    else:
        scalar = upstream_of(upstream, saved, expected)
    written = saved.grads.inputs is not None
    operands = as_matrices(operands)
    if saved.row_slopes is not None:
        _launch_gradient(spec, operands, saved, factors, scalar, grad, written=written)
        return grad
    denominator = known_denominator(spec, operands) if saved.denominator is None else saved.denominator
    _launch_zlpr(spec, operands, denominator, factors, scalar, None, None, grad, written=written)
    return grad


def _count(spec: Spec) -> str:
    """What the kernels count for the denominator."""
    if spec.formula == "two_way":
        return "any"
    return "positives" if spec.reduction == "mean_positive" else "elements"


def _weights(operands: Operands) -> tuple[Tensor, ...]:
    return () if operands.sample_weight is None else (operands.sample_weight.contiguous(),)


def _launch_zlpr(
    spec: Spec,
    operands: Operands,
    denominator: int | Tensor | None,
    factors: tuple[Tensor, ...],
    upstream: Upstream,
    losses: Tensor | None,
    counts: Tensor | None,
    grad: Tensor | None,
    *,
    written: bool = False,
) -> None:
    rowwise.zlpr_launcher(
        matrices(spec, operands),
        (*_weights(operands), *factors),
        denominator,
        upstream,
        losses,
        counts,
        grad,
        reduced=spec.reduction != "none",
        count=_count(spec),
        written=written,
    )


def _launch_sums(
    spec: Spec,
    operands: Operands,
    denominator: int | Tensor | None,
    losses: Tensor,
    counts: Tensor | None,
    saved: Saved,
) -> None:
    """Sums of the parts of lines, of which then the losses of the lines are made, and their slopes."""
    inputs = operands.inputs
    num_rows, num_labels = inputs.shape
    two_way = spec.formula == "two_way"
    cut = parts.cut(inputs.shape, columns=two_way, compute_dtype=spec.compute_dtype)
    planes = 5 if _count(spec) == "positives" else 4
    rows = inputs.new_empty(planes, cut.strips, num_rows, dtype=spec.compute_dtype)
    cols = inputs.new_empty(4, cut.chunks, num_labels, dtype=spec.compute_dtype) if two_way else None
    parts.partials_launcher(matrices(spec, operands), rows, cols, cut, temperatures=spec.params, count=_count(spec))
    combine.combine_launcher(
        spec.formula,
        rows,
        cols,
        _weights(operands),
        denominator,
        cast(Tensor, saved.row_slopes),
        saved.col_slopes,
        losses,
        counts,
        temperatures=spec.params,
        count=_count(spec),
        reduced=spec.reduction != "none",
    )


def _launch_gradient(
    spec: Spec,
    operands: Operands,
    saved: Saved,
    factors: tuple[Tensor, ...],
    upstream: Upstream,
    grad: Tensor,
    *,
    written: bool = False,
) -> None:
    columns = saved.col_slopes is not None
    parts.gradient_launcher(
        matrices(spec, operands),
        cast(Tensor, saved.row_slopes),
        saved.col_slopes,
        saved.denominator,
        factors,
        upstream,
        grad,
        parts.cut(operands.inputs.shape, columns=columns, compute_dtype=spec.compute_dtype),
        temperatures=spec.params,
        written=written,
    )
