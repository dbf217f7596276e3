"""The multi-label family under autograd: allocation, what is saved for backward, and the choice of code."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import sigmoid as reference
from ..reference.sigmoid import Operands, Spec, as_dtype
from . import dispatch
from .blocks import block_size, has_soft_labels
from .operands import as_matrices, parts, rows_and_labels, with_dense_targets
from .passes import denominator

if dispatch.TRITON_ERROR is None:
    from ..kernels.formulas import Values
    from ..kernels.passes import sum_launcher
    from ..kernels.sigmoid import num_programs, sigmoid_launcher

# Formulas of so few operations that torch's autograd in C++ beats a Function in Python, which costs as much as ten.
_SHORT = ("bce",)
_SMALL = 65536


def sigmoid_loss(spec: Spec, operands: Operands, backend: str) -> Tensor:
    """A loss of the family, on valid arguments."""
    if dispatch.needs_plain_operations():
        return _differentiable(spec, operands)
    targets_require_grad = operands.targets is not None and operands.targets.requires_grad
    if not torch.is_grad_enabled() or not (operands.inputs.requires_grad or targets_require_grad):
        return _FORWARD[backend](spec, operands, denominator(spec, operands, backend), with_grad=False)[0]
    small = operands.inputs.device.type == "cpu" and operands.inputs.numel() <= _SMALL
    if backend == "eager" and small and spec.formula in _SHORT:
        return _differentiable(spec, operands)
    loss: Tensor = _SigmoidLoss.apply(*operands, spec, backend)  # type: ignore[no-untyped-call]
    return loss


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, spec, backend = arguments
        ctx.set_materialize_grads(False)
        operands = Operands(*tensors)
        count = denominator(spec, operands, backend)
        # The gradient for an upstream of 1. Whether it is 1 can be told without a synchronisation by a kernel and by
        # the CPU; elsewhere backward computes the gradient.
        with_grad = (
            ctx.needs_input_grad[0]
            and spec.reduction != "none"
            and (backend == "triton" or operands.inputs.device.type == "cpu")
        )
        loss, grad = _FORWARD[backend](spec, operands, count, with_grad)
        ctx.spec, ctx.backend, ctx.handed_out = spec, backend, False
        ctx.count = count if isinstance(count, int) else None
        ctx.save_for_backward(*operands, None if isinstance(count, int) else count, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return _gradients(None, None)
        *saved, count, grad = ctx.saved_tensors
        operands = Operands(*saved)
        of_inputs, of_targets = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or dispatch.needs_plain_operations() or dispatch.is_batched(upstream):
            return _gradients(*_by_autograd(ctx.spec, operands, upstream, of_inputs, of_targets))
        grad_targets = _by_autograd(ctx.spec, operands, upstream, False, True)[1] if of_targets else None
        if not of_inputs:
            return _gradients(None, grad_targets)
        # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
        written = None if ctx.handed_out else grad
        ctx.handed_out = True
        count = count if ctx.count is None else ctx.count
        grad = _BACKWARD[ctx.backend](ctx.spec, operands, count, upstream, written)
        # With a version of its own: autograd would take a write to it for one to what it saved.
        return _gradients(grad.data, grad_targets)


def _gradients(of_inputs: Tensor | None, of_targets: Tensor | None) -> tuple[Tensor | None, ...]:
    """One for each argument of the Function: the operands, their spec and the backend."""
    return of_inputs, of_targets, *(None,) * len(Operands._fields)


def _differentiable(spec: Spec, operands: Operands) -> Tensor:
    operands = with_dense_targets(operands)
    targets = cast(Tensor, operands.targets)
    soft = targets.is_floating_point() if dispatch.needs_plain_operations() else has_soft_labels(targets)
    return reference.loss(spec, operands, soft=soft)


def _by_autograd(
    spec: Spec, operands: Operands, upstream: Tensor, of_inputs: bool, of_targets: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again when grad mode is on, and those of soft targets."""
    create_graph = torch.is_grad_enabled()
    operands = with_dense_targets(operands)
    inputs, targets = operands.inputs, cast(Tensor, operands.targets)
    with torch.enable_grad():
        if create_graph:
            # Aliases, so that the gradient stops at this loss: what led to its inputs is the outer graph's.
            inputs, targets = inputs.view_as(inputs), targets.view_as(targets)
        else:
            inputs, targets = inputs.detach().requires_grad_(of_inputs), targets.detach().requires_grad_(of_targets)
        operands = operands._replace(inputs=inputs, targets=targets)
        loss = reference.loss(spec, operands, soft=targets.is_floating_point())
    sources = [tensor for tensor, wanted in ((inputs, of_inputs), (targets, of_targets)) if wanted]
    grads = iter(torch.autograd.grad(loss, sources, upstream, create_graph=create_graph))
    return next(grads) if of_inputs else None, next(grads) if of_targets else None


def _triton_forward(
    spec: Spec, operands: Operands, count: int | Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """One launch for the loss and its gradient, and one that adds up the partial sums of a reduced loss."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    if inputs.numel() == 0:
        return loss.zero_(), grad
    programs = num_programs(inputs, sparse=operands.targets is None)
    partials = inputs.new_empty(programs, dtype=spec.compute_dtype) if reduced else None
    _launch(spec, operands, count, None, loss if partials is None else partials, grad, reduced=reduced)
    if partials is not None:
        sum_launcher(partials, loss)
    return loss, grad


def _triton_backward(
    spec: Spec, operands: Operands, count: int | Tensor, upstream: Tensor, written: Tensor | None
) -> Tensor:
    """The gradient; a launch that returns at once where it is written and the upstream is 1."""
    inputs = operands.inputs
    upstream = upstream.resolve_neg()
    grad = inputs.new_empty(inputs.shape) if written is None else written
    if inputs.numel() == 0:
        return grad
    reduced = spec.reduction != "none"
    if not reduced and not any(upstream.stride()):
        reduced, upstream = True, upstream.as_strided((), ())  # from sum() or mean(): one value, expanded
    _launch(spec, operands, count, upstream, None, grad, reduced=reduced, written=written is not None)
    return grad


def _launch(
    spec: Spec,
    operands: Operands,
    count: int | Tensor,
    upstream: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    reduced: bool,
    written: bool = False,
) -> None:
    operands = as_matrices(operands)
    shape = operands.inputs.shape
    alpha, pos_weight, sample_weight = operands.alpha, operands.pos_weight, operands.sample_weight
    factors = (
        operands.weight,
        None if sample_weight is None else sample_weight[:, None].expand(shape),
        None if reduced or upstream is None else upstream.reshape(shape),
    )
    sigmoid_launcher(
        spec.formula,
        spec.params,
        operands.inputs,
        (operands.crow, operands.col) if operands.targets is None else operands.targets,
        spec.alpha if alpha is None else alpha.expand(shape),
        None if pos_weight is None else pos_weight.expand(shape),
        tuple(factor for factor in factors if factor is not None),
        operands.mask,
        Values(operands.by_label, operands.by_row, operands.table),
        count,
        upstream if reduced else None,
        loss,
        grad,
        smoothing=spec.smoothing,
        ignored=spec.ignored,
        reduced=reduced,
        written=written,
        compute_dtype=spec.compute_dtype,
    )


def _number(count: int | Tensor) -> float | Tensor:
    """A denominator as a number where a look is free: it then goes into the class weights."""
    return count.item() if isinstance(count, Tensor) and count.device.type == "cpu" else count


def _eager_forward(
    spec: Spec, operands: Operands, count: int | Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The closed forms of ``reference``, on the CPU block by block."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    scale = 1 / _number(count)
    if inputs.numel() <= block_size(inputs):
        values, slopes = _eager_block(spec, operands, scale, with_grad)
        loss = values.sum() if reduced else values
        return as_dtype(loss, spec.loss_dtype), None if slopes is None else as_dtype(slopes, inputs.dtype)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    sums = []
    shape = rows_and_labels(inputs)
    for block, part in parts(operands):
        values, _ = _eager_block(spec, part, scale, with_grad, out=None if grad is None else grad.view(shape)[block])
        if reduced:
            sums.append(values.sum())
        else:
            loss.view(shape)[block] = values
    return loss.copy_(torch.stack(sums).sum()) if reduced else loss, grad


def _eager_backward(
    spec: Spec, operands: Operands, count: int | Tensor, upstream: Tensor, written: Tensor | None
) -> Tensor:
    if written is not None and upstream.item() == 1:
        return written
    inputs = operands.inputs
    scale: float | Tensor = as_dtype(upstream, spec.compute_dtype) / count
    if inputs.device.type == "cpu" and upstream.dim() == 0 and upstream.isfinite():
        scale = upstream.item() / _number(count)  # as in forward, bit for bit
    if inputs.numel() <= block_size(inputs):
        return cast(Tensor, _eager_block(spec, operands, scale, True)[1]).to(inputs.dtype)
    shape = rows_and_labels(inputs)
    grad = inputs.new_empty(inputs.shape) if written is None else written
    scales = scale.expand(inputs.shape).reshape(shape) if isinstance(scale, Tensor) else None
    for block, part in parts(operands):
        # What is written is not what autograd saved for a second use: its version stays.
        with _unsafe_preserve_version_counter(grad):
            _eager_block(spec, part, scale if scales is None else scales[block], True, out=grad.view(shape)[block])
    return grad


def _eager_block(
    spec: Spec, operands: Operands, scale: float | Tensor, with_grad: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    operands = with_dense_targets(operands)
    soft = has_soft_labels(cast(Tensor, operands.targets))
    return reference.elementwise(spec, operands, scale=scale, soft=soft, slope=with_grad, out=out)


_FORWARD = {"triton": _triton_forward, "eager": _eager_forward}
_BACKWARD = {"triton": _triton_backward, "eager": _eager_backward}
