"""ZLPR and two-way under autograd: allocation, what is saved for backward, and the choice of code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import rowwise as reference
from ..reference.rowwise import Classes, Saved, Slopes, Sums
from ..reference.sigmoid import Operands, Spec
from . import dispatch
from .blocks import block_size
from .operands import as_matrices, with_dense_targets
from .sparse import dense_block

if dispatch.TRITON_ERROR is None:
    from .rowwise_launch import triton_backward, triton_forward


def rowwise_loss(spec: Spec, operands: Operands, backend: str) -> Tensor:
    """A loss of the family, on valid arguments."""
    if dispatch.needs_plain_operations() or operands.inputs.numel() == 0:
        return reference.loss(spec, with_dense_targets(operands))
    if not torch.is_grad_enabled() or not operands.inputs.requires_grad:
        return _forward(backend, spec, operands, with_grad=False)[0]
    loss: Tensor = _RowwiseLoss.apply(*operands, spec, backend)  # type: ignore[no-untyped-call]
    return loss


class _RowwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, spec, backend = arguments
        ctx.set_materialize_grads(False)
        operands = Operands(*tensors)
        # The gradient for an upstream of 1. Whether it is 1 can be told without a synchronisation by a kernel and by
        # the CPU; elsewhere backward computes the gradient.
        with_grad = spec.reduction != "none" and (backend == "triton" or operands.inputs.device.type == "cpu")
        loss, saved = _forward(backend, spec, operands, with_grad=with_grad)
        ctx.spec, ctx.backend, ctx.handed_out = spec, backend, False
        ctx.save_for_backward(*operands, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(Operands._fields) + 1)
        if upstream is None:
            return None, *nothing
        tensors = ctx.saved_tensors
        operands, saved = Operands(*tensors[: len(Operands._fields)]), Saved(*tensors[len(Operands._fields) :])
        if torch.is_grad_enabled() or dispatch.needs_plain_operations() or dispatch.is_batched(upstream):
            return _by_autograd(ctx.spec, operands, upstream), *nothing
        # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
        if ctx.handed_out:
            saved = saved._replace(grad=None)
        ctx.handed_out = True
        backward = triton_backward if ctx.backend == "triton" else _BACKWARD[ctx.spec.formula]
        grad = backward(ctx.spec, operands, saved, upstream.resolve_neg())
        # With a version of its own: autograd would take a write to it for one to what it saved.
        return grad.data, *nothing


def _by_autograd(spec: Spec, operands: Operands, upstream: Tensor) -> Tensor:
    """The gradient, which can be differentiated again when grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias, so that the gradient stops at this loss: what led to its inputs is the outer graph's.
        inputs = operands.inputs.view_as(operands.inputs) if create_graph else operands.inputs.detach().requires_grad_()
        loss = reference.loss(spec, with_dense_targets(operands._replace(inputs=inputs)))
    return torch.autograd.grad(loss, inputs, upstream, create_graph=create_graph)[0]


def _forward(backend: str, spec: Spec, operands: Operands, *, with_grad: bool) -> tuple[Tensor, Saved]:
    forward = triton_forward if backend == "triton" else _FORWARD[spec.formula]
    return forward(spec, operands, with_grad)


def _parts(operands: Operands) -> Iterator[tuple[slice, Operands]]:
    """Rows in groups that stay in the cache, on the CPU; with dense targets."""
    num_labels = operands.inputs.shape[-1]
    on_cpu = operands.inputs.device.type == "cpu"
    operands = as_matrices(operands if on_cpu else with_dense_targets(operands))
    inputs, targets, mask = operands.inputs, operands.targets, operands.mask
    step = max(block_size(inputs) // num_labels, 1)
    for start in range(0, len(inputs), step):
        rows = slice(start, min(start + step, len(inputs)))
        if operands.crow is not None and operands.col is not None:
            targets_of_rows = dense_block(operands.crow, operands.col, rows, slice(0, num_labels))
        else:
            targets_of_rows = cast(Tensor, targets)[rows]
        yield rows, Operands(inputs[rows], targets_of_rows, mask=None if mask is None else mask[rows])


def _row_scale(spec: Spec, operands: Operands, denominator: int | Tensor | None, upstream: Tensor) -> Tensor:
    """What multiplies each row's loss, [N, 1]."""
    scale = upstream.to(spec.compute_dtype) / cast(Tensor, denominator)
    if operands.sample_weight is not None:
        scale = scale * operands.sample_weight.to(spec.compute_dtype)
    return scale.expand(operands.inputs.shape[:-1]).reshape(-1, 1)


def _eager_zlpr(spec: Spec, operands: Operands, with_grad: bool) -> tuple[Tensor, Saved]:
    inputs = operands.inputs
    known, counted = reference.known_denominator(spec, operands), None
    if known is None:
        counted = torch.stack([reference.count(spec, part) for _, part in _parts(operands)]).sum().clamp_min(1)
    scale = _row_scale(
        spec, operands, known if counted is None else counted, inputs.new_ones((), dtype=spec.compute_dtype)
    )
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    losses = _eager_zlpr_rows(spec, operands, scale, grad)
    loss = losses.reshape(inputs.shape[:-1]) if spec.reduction == "none" else losses.sum()
    return loss.to(spec.loss_dtype), Saved(grad, counted)


def _eager_zlpr_rows(spec: Spec, operands: Operands, scale: Tensor, grad: Tensor | None) -> Tensor:
    """The loss of each row, and into ``grad`` the gradient."""
    losses = scale.new_empty(len(scale))
    for rows, part in _parts(operands):
        of = reference.classes(spec, part)
        negative, positive, e = reference.line_sums(of, spec.params, 1)
        losses_of_rows, slopes = reference.line_losses(spec, negative, positive)
        losses[rows] = (losses_of_rows * scale[rows]).squeeze(1)
        if grad is not None:
            _write(grad, rows, of, reference.gradient(of, spec.params, slopes, e).mul_(scale[rows]))
    return losses


def _write(grad: Tensor, rows: slice, of: Classes, values: Tensor) -> None:
    if of.kept is not None:
        values.masked_fill_(~of.kept, 0)
    # What is written is not what autograd saved for a second use: its version stays.
    with _unsafe_preserve_version_counter(grad):
        grad.view(-1, grad.shape[-1])[rows] = values


def _eager_zlpr_backward(spec: Spec, operands: Operands, saved: Saved, upstream: Tensor) -> Tensor:
    if saved.grad is not None and upstream.item() == 1:
        return saved.grad
    denominator = reference.known_denominator(spec, operands) if saved.denominators is None else saved.denominators
    grad = operands.inputs.new_empty(operands.inputs.shape) if saved.grad is None else saved.grad
    _eager_zlpr_rows(spec, operands, _row_scale(spec, operands, denominator, upstream), grad)
    return grad


def _eager_two_way(spec: Spec, operands: Operands, with_grad: bool) -> tuple[Tensor, Saved]:
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
    of_both = torch.cat(row_slopes).T, torch.cat(slopes)
    for slopes_of_lines, count in zip(of_both, (of_rows, of_cols), strict=True):
        slopes_of_lines[1::2] /= count
    return loss.to(spec.loss_dtype), Saved(None, None, *of_both)


def _eager_two_way_backward(spec: Spec, operands: Operands, saved: Saved, upstream: Tensor) -> Tensor:
    grad = operands.inputs.new_empty(operands.inputs.shape)
    of_rows = Slopes(*cast(Tensor, saved.row_slopes).unsqueeze(2))
    of_cols = Slopes(*cast(Tensor, saved.col_slopes).unsqueeze(1))
    for rows, part in _parts(operands):
        of = reference.classes(spec, part)
        values = reference.gradient(of, spec.params, Slopes(*(of_row[rows] for of_row in of_rows)))
        values += reference.gradient(of, spec.params, of_cols)
        _write(grad, rows, of, values.mul_(upstream))
    return grad


_FORWARD = {"zlpr": _eager_zlpr, "two_way": _eager_two_way}
_BACKWARD = {"zlpr": _eager_zlpr_backward, "two_way": _eager_two_way_backward}
