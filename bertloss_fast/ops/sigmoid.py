"""The multi-label family's forward and backward: allocation, and the choice of code."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from ..reference import sigmoid as reference
from ..reference.sigmoid import Operands, Spec
from . import dispatch
from .autograd import compute_loss
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .inductor import with_inductor
from .operands import as_matrices, with_dense_targets
from .passes import denominator, is_counted
from .sigmoid_eager import eager_backward, eager_forward, is_soft, room_for
from .upstream import Expected, UpstreamMemory

if dispatch.TRITON_ERROR is None:
    from ..kernels.elements import num_programs
    from ..kernels.formulas import Values
    from ..kernels.passes import sum_launcher
    from ..kernels.sigmoid import sigmoid_launcher
    from ..kernels.upstream import Upstream
    from .launch import expected_upstream, matrices, upstream_of

# Formulas of so few operations that torch's autograd in C++ beats a Function in Python, which costs as much as ten.
_SHORT = ("bce",)
_SMALL = 65536


def sigmoid_loss(spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None) -> Tensor:
    """A loss of the family, on valid arguments."""
    inputs = operands.inputs
    if backend == "inductor":
        operands = with_dense_targets(operands)
        can_look = inputs.device.type == "cpu" and not dispatch.needs_plain_operations()
        if spec.soft is None and can_look and cast(Tensor, operands.targets).is_floating_point():
            return _hard_unless_nan(spec, operands, memory)
    if spec.formula in _SHORT and backend == "eager" and inputs.device.type == "cpu" and inputs.numel() <= _SMALL:
        operands = with_dense_targets(operands)
        return reference.loss(spec, operands, soft=is_soft(spec, cast(Tensor, operands.targets)))
    return compute_loss(FAMILY, spec, operands, backend, memory)


def _hard_unless_nan(spec: Spec, operands: Operands, memory: UpstreamMemory | None) -> Tensor:
    """By inductor, of labels that nobody has looked at: its pass of hard labels tells, in the sum of the losses."""
    targets = cast(Tensor, operands.targets)
    if spec.reduction == "none":
        return compute_loss(FAMILY, spec._replace(soft=is_soft(spec, targets)), operands, "inductor", memory)
    loss = compute_loss(FAMILY, spec._replace(soft=False, guarded=True), operands, "inductor", memory)
    if not (loss.isnan() and is_soft(spec, targets)):
        return loss
    del loss  # and its gradient, as large as the inputs
    return compute_loss(FAMILY, spec._replace(soft=True), operands, "inductor", memory)


def _plain(spec: Spec, operands: Operands) -> Tensor:
    operands = with_dense_targets(operands)
    return reference.loss(spec, operands, soft=cast(Tensor, operands.targets).is_floating_point())


def _forward(
    backend: str,
    spec: Spec,
    operands: Operands,
    expected: Expected | None,
    wanted: Wanted,
    room: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    count = denominator(spec, operands, backend)
    forward = _triton_forward if backend == "triton" else eager_forward
    loss, grad, note = forward(spec, operands, count, expected, wanted.inputs, room)
    return loss, Saved(Gradients(grad), note=note, denominator=count if isinstance(count, Tensor) else None)


def _backward(
    backend: str,
    spec: Spec,
    operands: Operands,
    saved: Saved,
    upstream: Tensor,
    expected: Expected | None,
    wanted: Wanted,
) -> Gradients:
    backward = _triton_backward if backend == "triton" else eager_backward
    return Gradients(backward(spec, operands, saved, upstream, expected))


def _loss_shape(spec: Spec, operands: Operands) -> Shape:
    return tuple(operands.inputs.shape) if spec.reduction == "none" else ()


def _saved_shapes(spec: Spec, operands: Operands) -> tuple[Shape | None, Shape | None, Shape | None]:
    return () if is_counted(spec, operands) else None, None, None


def _one_pass(spec: Spec, operands: Operands, upstream: Tensor, wanted: Wanted) -> tuple[Tensor, Gradients]:
    """The closed forms, for a compiler."""
    soft = cast(Tensor, operands.targets).is_floating_point() and spec.soft is not False
    values, slopes = reference.elementwise(spec, operands, soft=soft, slope=wanted.inputs)
    if spec.guarded:
        targets = cast(Tensor, operands.targets)
        values = torch.where(targets - targets * targets == 0, values, math.nan)
    count = reference.denominator(spec, operands)
    loss = values if spec.reduction == "none" else values.sum() / count
    return loss, Gradients(None if slopes is None else (slopes * (upstream / count)).to(operands.inputs.dtype))


FAMILY = register(
    with_inductor(Family("sigmoid", Spec, Operands, _plain, _forward, _backward, _loss_shape, _saved_shapes), _one_pass)
)


def _triton_forward(
    spec: Spec,
    operands: Operands,
    count: int | Tensor,
    expected: Expected | None,
    with_grad: bool,
    room: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One launch for the loss and its gradient, and one that adds up the partial sums of a reduced loss."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    grad = room_for(inputs, room) if with_grad else None
    upstream, note = expected_upstream(expected, grad)
    programs = num_programs(inputs, sparse=operands.targets is None)
    partials = inputs.new_empty(programs, dtype=spec.compute_dtype) if reduced else None
    _launch(spec, operands, count, upstream, None, loss if partials is None else partials, grad)
    if partials is not None:
        sum_launcher(partials, loss, denominator=count)
    return loss, grad, note


def _triton_backward(
    spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None
) -> Tensor:
    """The gradient; a launch that returns at once where it is written and what came was expected."""
    inputs = operands.inputs
    count = denominator(spec, operands, "triton") if saved.denominator is None else saved.denominator
    grad = room_for(inputs, saved.grads.inputs)
    if any(upstream.stride()):
        _launch(spec, operands, count, Upstream(), upstream, None, grad)
    else:
        scalar = upstream_of(upstream, saved, expected)
        _launch(spec, operands, count, scalar, None, None, grad, written=saved.grads.inputs is not None)
    return grad


def _launch(
    spec: Spec,
    operands: Operands,
    count: int | Tensor,
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    written: bool = False,
) -> None:
    """The upstream gradient is one of a scalar, or ``upstreams`` of the losses."""
    operands = as_matrices(operands)
    shape = operands.inputs.shape
    alpha, pos_weight, sample_weight = operands.alpha, operands.pos_weight, operands.sample_weight
    factors = (
        operands.weight,
        None if sample_weight is None else sample_weight[:, None].expand(shape),
        None if upstreams is None else upstreams.reshape(shape),
    )
    sigmoid_launcher(
        spec.formula,
        spec.params,
        matrices(spec, operands),
        spec.alpha if alpha is None else alpha.expand(shape),
        None if pos_weight is None else pos_weight.expand(shape),
        tuple(factor for factor in factors if factor is not None),
        Values(operands.by_label, operands.by_row, operands.table),
        count,
        upstream,
        loss,
        grad,
        smoothing=spec.smoothing,
        reduced=spec.reduction != "none",
        written=written,
    )
