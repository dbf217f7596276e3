"""The multi-label family under autograd: allocation, what is saved for backward, and the choice of code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import sigmoid as reference
from . import dispatch
from .blocks import block_size, blocks, has_soft_labels

if dispatch.TRITON_ERROR is None:
    from ..kernels.sigmoid import num_programs, sigmoid_launcher, sum_launcher

# Formulas of so few operations that torch's autograd in C++ beats a Function in Python, which costs as much as ten.
_SHORT = ("bce",)
_SMALL = 65536


class Spec(NamedTuple):
    """What a loss is, apart from its tensors."""

    formula: str
    params: tuple[float, ...]
    alpha: float | None
    reduction: str
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype


class Operands(NamedTuple):
    """The tensors of a call; inputs and targets [..., L], weight broadcastable to them, the others [L] or a scalar."""

    inputs: Tensor
    targets: Tensor
    alpha: Tensor | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None


def sigmoid_loss(spec: Spec, operands: Operands, backend: str) -> Tensor:
    """A loss of the family, on valid arguments."""
    if dispatch.needs_plain_operations():
        return _differentiable(spec, operands, soft=operands.targets.is_floating_point())
    if not torch.is_grad_enabled() or not (operands.inputs.requires_grad or operands.targets.requires_grad):
        return _FORWARD[backend](spec, operands, _denominator(spec, operands), with_grad=False)[0]
    small = operands.inputs.device.type == "cpu" and operands.inputs.numel() <= _SMALL
    if backend == "eager" and small and spec.formula in _SHORT:
        return _differentiable(spec, operands, soft=has_soft_labels(operands.targets))
    loss: Tensor = _SigmoidLoss.apply(*operands, spec, backend)  # type: ignore[no-untyped-call]
    return loss


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        targets: Tensor,
        alpha: Tensor | None,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        spec: Spec,
        backend: str,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        operands = Operands(inputs, targets, alpha, weight, pos_weight)
        denominator = _denominator(spec, operands)
        # The gradient for an upstream of 1. Whether it is 1 can be told without a synchronisation by a kernel and by
        # the CPU; elsewhere backward computes the gradient.
        with_grad = (
            ctx.needs_input_grad[0]
            and spec.reduction != "none"
            and (backend == "triton" or inputs.device.type == "cpu")
        )
        loss, grad = _FORWARD[backend](spec, operands, denominator, with_grad)
        ctx.spec, ctx.backend, ctx.handed_out = spec, backend, False
        ctx.count = denominator if isinstance(denominator, int) else None
        ctx.save_for_backward(*operands, None if isinstance(denominator, int) else denominator, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        *saved, denominator, grad = ctx.saved_tensors
        operands = Operands(*saved)
        of_inputs, of_targets, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or dispatch.needs_plain_operations() or dispatch.is_batched(upstream):
            return *_by_autograd(ctx.spec, operands, upstream, of_inputs, of_targets), *(None,) * 5
        grad_targets = _by_autograd(ctx.spec, operands, upstream, False, True)[1] if of_targets else None
        if not of_inputs:
            return None, grad_targets, *(None,) * 5
        # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
        written = None if ctx.handed_out else grad
        ctx.handed_out = True
        count = denominator if ctx.count is None else ctx.count
        grad = _BACKWARD[ctx.backend](ctx.spec, operands, count, upstream, written)
        # With a version of its own: autograd would take a write to it for one to what it saved.
        return grad.data, grad_targets, *(None,) * 5


def _denominator(spec: Spec, operands: Operands) -> int | Tensor:
    return reference.denominator(spec.reduction, operands.inputs, operands.targets, spec.compute_dtype)


def _differentiable(spec: Spec, operands: Operands, *, soft: bool) -> Tensor:
    return reference.loss(
        spec.formula,
        spec.params,
        operands.inputs,
        operands.targets,
        alpha=spec.alpha if operands.alpha is None else operands.alpha,
        weight=operands.weight,
        pos_weight=operands.pos_weight,
        reduction=spec.reduction,
        dtype=spec.compute_dtype,
        soft=soft,
    ).to(spec.loss_dtype)


def _by_autograd(
    spec: Spec, operands: Operands, upstream: Tensor, of_inputs: bool, of_targets: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again when grad mode is on, and those of soft targets."""
    create_graph = torch.is_grad_enabled()
    inputs, targets = operands.inputs, operands.targets
    with torch.enable_grad():
        if create_graph:
            # Aliases, so that the gradient stops at this loss: what led to its inputs is the outer graph's.
            inputs, targets = inputs.view_as(inputs), targets.view_as(targets)
        else:
            inputs, targets = inputs.detach().requires_grad_(of_inputs), targets.detach().requires_grad_(of_targets)
        operands = operands._replace(inputs=inputs, targets=targets)
        loss = _differentiable(spec, operands, soft=targets.is_floating_point())
    sources = [tensor for tensor, wanted in ((inputs, of_inputs), (targets, of_targets)) if wanted]
    grads = iter(torch.autograd.grad(loss, sources, upstream, create_graph=create_graph))
    return next(grads) if of_inputs else None, next(grads) if of_targets else None


def _rows_and_labels(inputs: Tensor) -> tuple[int, int]:
    """[..., L] as [N, L]; a single logit is a row of one label."""
    num_labels = inputs.shape[-1] if inputs.dim() else 1
    return inputs.numel() // max(num_labels, 1), num_labels


def _as_matrices(operands: Operands) -> Operands:
    """Every operand as [N, L] or [L], by views wherever strides allow them."""
    inputs, targets, alpha, weight, pos_weight = operands
    shape = _rows_and_labels(inputs)

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.expand(inputs.shape).reshape(shape).resolve_neg()  # a negation that torch has put off

    def vector(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(shape[1]).resolve_neg()

    weight = None if weight is None else matrix(weight)
    return Operands(matrix(inputs), matrix(targets), vector(alpha), weight, vector(pos_weight))


def _triton_forward(
    spec: Spec, operands: Operands, denominator: int | Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """One launch for the loss and its gradient, and one that adds up the partial sums of a reduced loss."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    if inputs.numel() == 0:
        return loss.zero_(), grad
    partials = inputs.new_empty(num_programs(inputs), dtype=spec.compute_dtype) if reduced else None
    _launch(spec, operands, denominator, None, loss if partials is None else partials, grad, reduced=reduced)
    if partials is not None:
        sum_launcher(partials, loss)
    return loss, grad


def _triton_backward(
    spec: Spec, operands: Operands, denominator: int | Tensor, upstream: Tensor, written: Tensor | None
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
    if not reduced:
        upstream = upstream.reshape(_rows_and_labels(inputs))
    _launch(spec, operands, denominator, upstream, None, grad, reduced=reduced, written=written is not None)
    return grad


def _launch(
    spec: Spec,
    operands: Operands,
    denominator: int | Tensor,
    upstream: Tensor | None,
    loss: Tensor | None,
    grad: Tensor | None,
    *,
    reduced: bool,
    written: bool = False,
) -> None:
    inputs, targets, alpha, weight, pos_weight = _as_matrices(operands)
    sigmoid_launcher(
        spec.formula,
        spec.params,
        inputs,
        targets,
        spec.alpha if alpha is None else alpha,
        weight,
        pos_weight,
        denominator,
        upstream,
        loss,
        grad,
        reduced=reduced,
        written=written,
        compute_dtype=spec.compute_dtype,
    )


def _eager_forward(
    spec: Spec, operands: Operands, denominator: int | Tensor, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The closed forms of ``reference``, on the CPU block by block."""
    inputs = operands.inputs
    reduced = spec.reduction != "none"
    scale = 1 / denominator
    if inputs.numel() <= block_size(inputs):
        values, slopes = _eager_block(spec, operands, scale, with_grad)
        loss = values.sum() if reduced else values
        return loss.to(spec.loss_dtype), None if slopes is None else slopes.to(inputs.dtype)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    sums = []
    shape = _rows_and_labels(inputs)
    for block, part in _parts(operands):
        values, _ = _eager_block(spec, part, scale, with_grad, out=None if grad is None else grad.view(shape)[block])
        if reduced:
            sums.append(values.sum())
        else:
            loss.view(shape)[block] = values
    return loss.copy_(torch.stack(sums).sum()) if reduced else loss, grad


def _eager_backward(
    spec: Spec, operands: Operands, denominator: int | Tensor, upstream: Tensor, written: Tensor | None
) -> Tensor:
    if written is not None and upstream.item() == 1:
        return written
    inputs = operands.inputs
    scale: float | Tensor = upstream.to(spec.compute_dtype) / denominator
    if inputs.device.type == "cpu" and upstream.dim() == 0 and upstream.isfinite():
        scale = upstream.item() / denominator  # as in forward, bit for bit
    if inputs.numel() <= block_size(inputs):
        return cast(Tensor, _eager_block(spec, operands, scale, True)[1]).to(inputs.dtype)
    shape = _rows_and_labels(inputs)
    grad = inputs.new_empty(inputs.shape) if written is None else written
    scales = scale.expand(inputs.shape).reshape(shape) if isinstance(scale, Tensor) else None
    for block, part in _parts(operands):
        # What is written is not what autograd saved for a second use: its version stays.
        with _unsafe_preserve_version_counter(grad):
            _eager_block(spec, part, scale if scales is None else scales[block], True, out=grad.view(shape)[block])
    return grad


def _eager_block(
    spec: Spec, operands: Operands, scale: float | Tensor, with_grad: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    return reference.elementwise(
        spec.formula,
        spec.params,
        operands.inputs,
        operands.targets,
        alpha=spec.alpha if operands.alpha is None else operands.alpha,
        weight=operands.weight,
        pos_weight=operands.pos_weight,
        scale=scale,
        dtype=spec.compute_dtype,
        soft=has_soft_labels(operands.targets),
        slope=with_grad,
        out=out,
    )


def _parts(operands: Operands) -> Iterator[tuple[tuple[slice, slice], Operands]]:
    """The blocks of a call, and the operands' parts that they cut out."""
    inputs, targets, alpha, weight, pos_weight = _as_matrices(operands)
    for block in blocks(inputs):
        labels = block[1]
        yield (
            block,
            Operands(
                inputs[block],
                targets[block],
                None if alpha is None else alpha[labels],
                None if weight is None else weight[block],
                None if pos_weight is None else pos_weight[labels],
            ),
        )


_FORWARD = {"triton": _triton_forward, "eager": _eager_forward}
_BACKWARD = {"triton": _triton_backward, "eager": _eager_backward}
