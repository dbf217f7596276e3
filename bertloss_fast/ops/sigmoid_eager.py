"""The multi-label family's eager backend: the closed forms of ``reference``, on the CPU block by block."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import sigmoid as reference
from ..reference.sigmoid import Operands, Spec, as_dtype
from . import dispatch
from .blocks import Block, NotProbabilitiesError, are_surely_hard, is_one_block, spread
from .families import Saved
from .few_labels import take_apart
from .few_passes import FewPasses, Scratch, clear
from .operands import parts, rows_and_labels, with_dense_targets
from .passes import denominator
from .upstream import Expected, number_that_came

Place = Block | tuple[Tensor, Tensor]

# Up to so many logits an operation costs more than its arithmetic, and the ordinary formulas have fewer.
_FEWER_OPERATIONS = 32768
# As torch's does.
_OF_ANY_LABEL = ("bce",)


def is_soft(spec: Spec, targets: Tensor, scratch: Scratch | None = None) -> bool:
    """Whether the longer formula is needed."""
    if spec.soft is not None:
        return spec.soft
    if not targets.is_floating_point() or dispatch.needs_plain_operations():
        return targets.is_floating_point()
    if targets.requires_grad or targets.device.type != "cpu" or not targets.numel():
        return bool(targets.numel())
    room = None if scratch is None else scratch.of("factor", targets, targets.dtype)
    if room is not None and are_surely_hard(targets, room):
        return False
    low, high = spread(targets, room)
    if spec.formula not in _OF_ANY_LABEL and (low < 0 or (math.isnan(low) and targets.isinf().any())):
        raise NotProbabilitiesError
    return not low == high == 0


def room_for(inputs: Tensor, room: Tensor | None) -> Tensor:
    """For the gradient."""
    return inputs.new_empty(inputs.shape) if room is None else room


def _inverse(count: int | Tensor) -> float | Tensor:
    """1 over the denominator, as a number where a look is free: it then goes into the class weights."""
    number = count.item() if isinstance(count, Tensor) and count.device.type == "cpu" else count
    return 1 / number if isinstance(number, Tensor) or number else math.inf


def eager_forward(
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
    if is_one_block(inputs):
        loss, grad = _whole(spec, with_dense_targets(operands), scale, upstream, with_grad, room)
        return as_dtype(loss, spec.loss_dtype), grad, note
    grad = room_for(inputs, room) if with_grad else None
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


def eager_backward(spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None) -> Tensor:
    inputs = operands.inputs
    number = number_that_came(upstream, expected)
    if saved.is_written_for(number):
        return cast(Tensor, saved.grads.inputs)
    count = denominator(spec, operands, "eager") if saved.denominator is None else saved.denominator
    scale: float | Tensor = _inverse(count)
    if number is None:
        scale = as_dtype(upstream, spec.compute_dtype).expand(inputs.shape) * scale
    if is_one_block(inputs):
        return cast(Tensor, _whole(spec, with_dense_targets(operands), scale, number, True)[1])
    shape = rows_and_labels(inputs)
    grad = room_for(inputs, saved.grads.inputs)
    scale = scale.reshape(shape) if isinstance(scale, Tensor) else scale
    # What is written is not what autograd saved for a second use: its version stays.
    with _unsafe_preserve_version_counter(grad):
        _eager_blocks(spec, operands, scale, number, grad=grad.view(shape))
    return grad


def _whole(
    spec: Spec,
    operands: Operands,
    scale: float | Tensor,
    upstream: float | None,
    with_grad: bool,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient of what is no larger than a block."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    soft = is_soft(spec, cast(Tensor, operands.targets))
    many = inputs.numel() > _FEWER_OPERATIONS
    few_passes = None if soft or not many else FewPasses.serving(spec, operands, scale, upstream, Scratch())
    if few_passes is not None:
        grad = room_for(inputs, room) if with_grad else None
        losses = None if reduced else inputs.new_empty(inputs.shape, dtype=spec.loss_dtype)
        total = few_passes.block(operands, None, losses, grad)
        if total is not None:
            return total if losses is None else losses, grad
    losses, slopes = reference.elementwise(
        spec, operands, scale=scale, upstream=upstream, soft=soft, slope=with_grad, out=room
    )
    return losses.sum() if reduced else losses, None if slopes is None else as_dtype(slopes, inputs.dtype)


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
    scratch = Scratch()
    few_passes = FewPasses.serving(spec, operands, scale, upstream, scratch)

    def general(part: Operands, place: Place, left_out: Tensor | None, soft: bool, out: Tensor | None) -> Tensor | None:
        """The slopes of a block, and what is asked for of its losses."""
        of_part = scale[place].view(part.inputs.shape) if isinstance(scale, Tensor) else scale
        values, slopes = reference.elementwise(
            spec,
            part,
            scale=of_part,
            upstream=upstream,
            soft=soft,
            zeros=left_out is not None,
            slope=grad is not None,
            out=out,
        )
        if left_out is not None:
            clear(values, left_out)
        if summed:
            sums.append(values.sum())
        if loss is not None:
            loss[place] = as_dtype(values, loss.dtype).view(loss[place].shape)
        return slopes

    def compute(block: Block, part: Operands, left_out: Tensor | None = None) -> None:
        """A block; of targets that are 0 but for those that are ``left_out``."""
        out = None if grad is None else grad[block]
        soft = left_out is None and is_soft(spec, cast(Tensor, part.targets), scratch)
        if few_passes is not None and not soft:
            total = few_passes.block(part, left_out, None if loss is None else loss[block], out)
            if total is not None:
                sums.append(total)
                return
        general(part, block, left_out, soft, out)

    few = take_apart(operands)
    if few is None:
        for block, part in parts(operands):
            compute(block, part)
    else:
        for block, part, offsets in few.blocks():
            compute(block, part, offsets)
        place = few.rows, few.cols
        slopes = general(few.others, place, None, is_soft(spec, cast(Tensor, few.others.targets)), None)
        if grad is not None and slopes is not None:
            grad[place] = as_dtype(slopes.squeeze(1), grad.dtype)
    return torch.stack(sums).sum() if summed else None
