"""ZLPR's and two-way's forward and backward in plain PyTorch; rowwise_launch.py has them in kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import rowwise as reference
from ..reference.rowwise import Classes, Slopes, Sums
from ..reference.sigmoid import Operands, Spec
from . import dispatch
from .autograd import compute_loss
from .blocks import block_size
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .inductor import with_inductor
from .operands import as_matrices, with_dense_targets
from .sparse import dense_blocks
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.rowwise import fits
    from .rowwise_launch import triton_backward, triton_forward


def rowwise_loss(spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None) -> Tensor:
    """A loss of the family, on valid arguments."""
    if backend == "inductor":
        operands = with_dense_targets(operands)
    return compute_loss(FAMILY, spec, operands, backend, memory)


def _plain(spec: Spec, operands: Operands) -> Tensor:
    return reference.loss(spec, with_dense_targets(operands))


def _forward(
    backend: str, spec: Spec, operands: Operands, expected: Expected | None, wanted: Wanted
) -> tuple[Tensor, Saved]:
    forward = triton_forward if backend == "triton" else _EAGER_FORWARD[spec.formula]
    return forward(spec, operands, expected, wanted.inputs)


def _backward(
    backend: str,
    spec: Spec,
    operands: Operands,
    saved: Saved,
    upstream: Tensor,
    expected: Expected | None,
    wanted: Wanted,
) -> Gradients:
    backward = triton_backward if backend == "triton" else _EAGER_BACKWARD[spec.formula]
    return Gradients(backward(spec, operands, saved, upstream, expected))


def _loss_shape(spec: Spec, operands: Operands) -> Shape:
    return tuple(operands.inputs.shape[:-1]) if spec.reduction == "none" else ()


def _saved_shapes(spec: Spec, operands: Operands) -> tuple[Shape | None, Shape | None, Shape | None]:
    """Of the kernels."""
    num_rows, num_labels = operands.inputs.shape[:-1].numel(), operands.inputs.shape[-1]
    if spec.formula == "two_way":
        return (2,), (4, num_rows), (4, num_labels)
    in_parts = not fits(num_labels, spec.compute_dtype)
    return (
        (1,) if reference.known_denominator(spec, operands) is None else None,
        (4, num_rows) if in_parts else None,
        None,
    )


FAMILY = register(
    with_inductor(Family("rowwise", Spec, Operands, _plain, _forward, _backward, _loss_shape, _saved_shapes))
)


def _parts(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """Rows in groups that stay in the cache, on the CPU; with dense targets."""
    num_labels = operands.inputs.shape[-1]
    on_cpu = operands.inputs.device.type == "cpu"
    operands = as_matrices(operands if on_cpu else with_dense_targets(operands))
    inputs, mask = operands.inputs, operands.mask
    step = max(block_size(inputs) // num_labels, 1)
    groups = [slice(start, min(start + step, len(inputs))) for start in range(0, len(inputs), step)]
    if operands.crow is not None and operands.col is not None:
        places = [(rows, slice(0, num_labels)) for rows in groups]
        targets = dense_blocks(operands.crow, operands.col, num_labels, places)
    else:
        targets = (cast(Tensor, operands.targets)[rows] for rows in groups)
    for rows, of_rows in zip(groups, targets, strict=True):
        yield rows, Operands(inputs[rows], of_rows, mask=None if mask is None else mask[rows])


def _row_scale(spec: Spec, operands: Operands, denominator: int | Tensor | None) -> Tensor:
    """What multiplies each row's loss, [N, 1]."""
    scale = operands.inputs.new_ones((), dtype=spec.compute_dtype) / cast(Tensor, denominator)
    if operands.sample_weight is not None:
        scale = scale * operands.sample_weight.to(spec.compute_dtype)
    return scale.expand(operands.inputs.shape[:-1]).reshape(-1, 1)


def _eager_zlpr(spec: Spec, operands: Operands, expected: Expected | None, with_grad: bool) -> tuple[Tensor, Saved]:
    inputs = operands.inputs
    known, counted = reference.known_denominator(spec, operands), None
    if known is None:
        counted = torch.stack([reference.count(spec, part) for _, part in _parts(operands)]).sum().clamp_min(1)
    scale = _row_scale(spec, operands, known if counted is None else counted)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    note = None if expected is None else expected.value
    losses = _eager_zlpr_rows(spec, operands, scale, scale if note is None else scale * note, grad)
    loss = losses.reshape(inputs.shape[:-1]) if spec.reduction == "none" else losses.sum()
    return loss.to(spec.loss_dtype), Saved(Gradients(grad), note=note, denominator=counted)


def _eager_zlpr_rows(spec: Spec, operands: Operands, scale: Tensor, grad_scale: Tensor, grad: Tensor | None) -> Tensor:
    """The loss of each row, and into ``grad`` the gradient."""
    losses = scale.new_empty(len(scale))
    for rows, part in _parts(operands):
        of = reference.classes(spec, part)
        negative, positive, e = reference.line_sums(of, spec.params, 1)
        losses_of_rows, slopes = reference.line_losses(spec, negative, positive)
        losses[rows] = (losses_of_rows * scale[rows]).squeeze(1)
        if grad is not None:
            _write(grad, rows, of, reference.gradient(of, spec.params, slopes, e).mul_(grad_scale[rows]))
    return losses


def _write(grad: Tensor, rows: slice, of: Classes, values: Tensor) -> None:
    if of.kept is not None:
        values.masked_fill_(~of.kept, 0)
    # What is written is not what autograd saved for a second use: its version stays.
    with _unsafe_preserve_version_counter(grad):
        grad.view(-1, grad.shape[-1])[rows] = values


def _eager_zlpr_backward(
    spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None
) -> Tensor:
    number = number_that_came(upstream, expected)
    if saved.is_written_for(number):
        return cast(Tensor, saved.grads.inputs)
    denominator = reference.known_denominator(spec, operands) if saved.denominator is None else saved.denominator
    grad = operands.inputs.new_empty(operands.inputs.shape) if saved.grads.inputs is None else saved.grads.inputs
    scale = _row_scale(spec, operands, denominator)
    upstream = upstream.to(spec.compute_dtype).expand(operands.inputs.shape[:-1]).reshape(-1, 1)
    _eager_zlpr_rows(spec, operands, scale, scale * upstream, grad)
    return grad


def _eager_two_way(spec: Spec, operands: Operands, expected: Expected | None, with_grad: bool) -> tuple[Tensor, Saved]:
    losses, row_slopes, counts = [], [], []
    columns: tuple[Sums, Sums] | None = None
    for _, part in _parts(operands):
        of = reference.classes(spec, part)
        negative, positive, _ = reference.line_sums(of, spec.params, 1)
        losses_of_rows, slopes = reference.line_losses(spec, negative, positive)
        losses.append(losses_of_rows.sum())
        row_slopes.append(torch.cat(slopes, 1))
        counts.append((positive.total != 0).sum())
        negative, positive, _ = reference.line_sums(of, spec.params, 0)
        if columns is not None:
            negative = reference.add_sums(columns[0], negative, spec.params[0])
            positive = reference.add_sums(columns[1], positive, spec.params[1])
        columns = negative, positive
    assert columns is not None
    losses_of_cols, slopes = reference.line_losses(spec, *columns)
    of_rows = torch.stack(counts).sum().clamp_min(1)
    of_cols = (columns[1].total != 0).sum().clamp_min(1)
    loss = torch.stack(losses).sum() / of_rows + losses_of_cols.sum() / of_cols
    rows = Slopes(*torch.cat(row_slopes).T).divided_by(of_rows)
    return loss.to(spec.loss_dtype), Saved(
        row_slopes=torch.stack(rows), col_slopes=torch.cat(slopes.divided_by(of_cols))
    )


def _eager_two_way_backward(
    spec: Spec, operands: Operands, saved: Saved, upstream: Tensor, expected: Expected | None
) -> Tensor:
    grad = operands.inputs.new_empty(operands.inputs.shape)
    of_rows = Slopes(*cast(Tensor, saved.row_slopes).unsqueeze(2))
    of_cols = Slopes(*cast(Tensor, saved.col_slopes).unsqueeze(1))
    for rows, part in _parts(operands):
        of = reference.classes(spec, part)
        values = reference.gradient(of, spec.params, Slopes(*(of_row[rows] for of_row in of_rows)))
        values += reference.gradient(of, spec.params, of_cols)
        _write(grad, rows, of, values.mul_(upstream))
    return grad


_EAGER_FORWARD = {"zlpr": _eager_zlpr, "two_way": _eager_two_way}
_EAGER_BACKWARD = {"zlpr": _eager_zlpr_backward, "two_way": _eager_two_way_backward}
