"""The multi-label family's forward and backward: allocation, and the choice of code."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import few_passes
from ..reference import sigmoid as reference
from ..reference.formulas import Result
from ..reference.sigmoid import Operands, Spec, as_dtype
from . import dispatch
from .autograd import compute_loss
from .blocks import Block, block_size, has_soft_labels
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .few_labels import take_apart
from .inductor import with_inductor
from .operands import as_matrices, parts, rows_and_labels, with_dense_targets
from .passes import denominator, is_counted
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.elements import num_programs
    from ..kernels.formulas import Values
    from ..kernels.passes import sum_launcher
    from ..kernels.sigmoid import sigmoid_launcher
    from ..kernels.upstream import Upstream
    from .launch import expected_upstream, matrices, upstream_of

Place = Block | tuple[Tensor, Tensor]

# Formulas of so few operations that torch's autograd in C++ beats a Function in Python, which costs as much as ten.
_SHORT = ("bce",)
_SMALL = 65536


def sigmoid_loss(spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None) -> Tensor:
    """A loss of the family, on valid arguments."""
    inputs = operands.inputs
    if backend == "inductor":
        operands = with_dense_targets(operands)
        if spec.soft is None and dispatch.can_check_values(inputs.device) and inputs.device.type == "cpu":
            return _of_labels_unseen(spec, operands, memory)
    if spec.formula in _SHORT and backend == "eager" and inputs.device.type == "cpu" and inputs.numel() <= _SMALL:
        operands = with_dense_targets(operands)
        return reference.loss(spec, operands, soft=_is_soft(spec, cast(Tensor, operands.targets)))
    return compute_loss(FAMILY, spec, operands, backend, memory)


def _of_labels_unseen(spec: Spec, operands: Operands, memory: UpstreamMemory | None) -> Tensor:
    """By inductor: the pass of hard labels tells whether they are, but not of each loss."""
    targets = cast(Tensor, operands.targets)
    if spec.reduction != "none" and targets.is_floating_point() and not targets.requires_grad:
        loss = compute_loss(FAMILY, spec._replace(soft=False, guarded=True), operands, "inductor", memory)
        if not loss.isnan():
            return loss
    return compute_loss(FAMILY, spec._replace(soft=_is_soft(spec, targets)), operands, "inductor", memory)


def _is_soft(spec: Spec, targets: Tensor) -> bool:
    """Whether the longer formula is needed."""
    if spec.soft is not None:
        return spec.soft
    if not targets.is_floating_point() or dispatch.needs_plain_operations():
        return targets.is_floating_point()
    return has_soft_labels(targets, strict=spec.formula != "bce")


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
    forward = _triton_forward if backend == "triton" else _eager_forward
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
    backward = _triton_backward if backend == "triton" else _eager_backward
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
        values = torch.where(targets * targets == targets, values, math.nan)
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
    grad = _room(inputs, room) if with_grad else None
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
    grad = _room(inputs, saved.grads.inputs)
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


def _room(inputs: Tensor, room: Tensor | None) -> Tensor:
    """For the gradient."""
    return inputs.new_empty(inputs.shape) if room is None else room


def _inverse(count: int | Tensor) -> float | Tensor:
    """1 over the denominator, as a number where a look is free: it then goes into the class weights."""
    number = count.item() if isinstance(count, Tensor) and count.device.type == "cpu" else count
    return 1 / number if isinstance(number, Tensor) or number else math.inf


def _eager_forward(
    spec: Spec,
    operands: Operands,
    count: int | Tensor,
    expected: Expected | None,
    with_grad: bool,
    room: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The closed forms of ``reference``, on the CPU block by block."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    scale = _inverse(count)
    note = None if expected is None else expected.value  # once: another thread may put another in its place
    upstream = None if note is None else note.item()
    if inputs.numel() <= block_size(inputs):
        values, slopes = _eager_block(spec, with_dense_targets(operands), scale, upstream, with_grad, out=room)
        loss = values.sum() if reduced else values
        return as_dtype(loss, spec.loss_dtype), None if slopes is None else as_dtype(slopes, inputs.dtype), note
    grad = _room(inputs, room) if with_grad else None
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    shape = rows_and_labels(inputs)
    total = _eager_blocks(
        spec,
        operands,
        scale,
        upstream,
        loss=None if reduced else loss.view(shape),
        grad=None if grad is None else grad.view(shape),
        summed=reduced,
    )
    return loss if total is None else loss.copy_(total), grad, note


def _eager_backward(
    spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None
) -> Tensor:
    inputs = operands.inputs
    number = number_that_came(upstream, expected)
    if saved.is_written_for(number):
        return cast(Tensor, saved.grads.inputs)
    count = denominator(spec, operands, "eager") if saved.denominator is None else saved.denominator
    scale: float | Tensor = _inverse(count)
    if number is None:
        scale = as_dtype(upstream, spec.compute_dtype).expand(inputs.shape) * scale
    if inputs.numel() <= block_size(inputs):
        operands = with_dense_targets(operands)
        return as_dtype(cast(Tensor, _eager_block(spec, operands, scale, number, True)[1]), inputs.dtype)
    shape = rows_and_labels(inputs)
    grad = _room(inputs, saved.grads.inputs)
    scale = scale.reshape(shape) if isinstance(scale, Tensor) else scale
    # What is written is not what autograd saved for a second use: its version stays.
    with _unsafe_preserve_version_counter(grad):
        _eager_blocks(spec, operands, scale, number, grad=grad.view(shape))
    return grad


def _eager_blocks(
    spec: Spec,
    operands: Operands,
    scale: float | Tensor,
    upstream: float | None,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """Losses and gradients, written to the matrices that are given; the sum of the losses where it is ``summed``.

    ``scale`` is a matrix, if it is a tensor.
    """
    sums: list[Tensor] = []
    room = few_passes.Room() if few_passes.is_served(spec, operands, scale) else None

    def keep(values: Tensor, place: Place, times: float = 1.0, total: Tensor | None = None) -> None:
        if summed:
            sums.append(values.sum() if total is None else total)
        if loss is not None:
            loss[place] = as_dtype(values if times == 1 else values / times, loss.dtype)

    def compute(block: Block, part: Operands, others: Tensor | None = None) -> None:
        """Of zeros alone where ``others`` are left out."""
        out = None if grad is None else grad[block]
        if room is not None:
            found = few_passes.elementwise(
                spec, part, room, scale=cast(float, scale), upstream=upstream, others=others, out=out
            )
            if found is not None:
                return keep(found.values, block, found.times, found.total)
        of_part = scale[block] if isinstance(scale, Tensor) else scale
        values, _ = _eager_block(spec, part, of_part, upstream, grad is not None, zeros=others is not None, out=out)
        if others is not None:
            values.put_(others, values.new_zeros(others.shape))
        return keep(values, block)

    few = take_apart(operands)
    if few is None:
        for block, part in parts(operands):
            compute(block, part)
    else:
        for block, part, of_block in few.blocks():
            compute(block, part, of_block)
        place = few.rows, few.cols
        of_others = scale[place].unsqueeze(1) if isinstance(scale, Tensor) else scale
        values, slopes = _eager_block(spec, few.others, of_others, upstream, grad is not None)
        keep(values.squeeze(1), place)
        if grad is not None and slopes is not None:
            grad[place] = as_dtype(slopes.squeeze(1), grad.dtype)
    return torch.stack(sums).sum() if summed else None


def _eager_block(
    spec: Spec,
    operands: Operands,
    scale: float | Tensor,
    upstream: float | None,
    with_grad: bool,
    *,
    zeros: bool = False,
    out: Tensor | None = None,
) -> Result:
    soft = not zeros and _is_soft(spec, cast(Tensor, operands.targets))
    return reference.elementwise(
        spec, operands, scale=scale, upstream=upstream, soft=soft, zeros=zeros, slope=with_grad, out=out
    )
