"""The multi-label family under autograd: allocation, what is saved for backward, and the choice of code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..reference import sigmoid as reference
from . import dispatch

if dispatch.TRITON_ERROR is None:
    from ..kernels.sigmoid import num_programs, sigmoid_launcher, sum_launcher

# Elements that one thread works on at a time on the CPU: a block's dozen intermediates then stay in its L2 cache.
_CPU_BLOCK = 65536


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
        return _differentiable(spec, operands)
    if torch.is_grad_enabled() and (operands.inputs.requires_grad or operands.targets.requires_grad):
        loss: Tensor = _SigmoidLoss.apply(*operands, spec, backend)  # type: ignore[no-untyped-call]
        return loss
    return _forward(spec, operands, backend, with_grad=False)[0]


def _differentiable(spec: Spec, operands: Operands) -> Tensor:
    alpha = spec.alpha if operands.alpha is None else operands.alpha
    return reference.loss(
        spec.formula,
        spec.params,
        operands.inputs,
        operands.targets,
        alpha=alpha,
        weight=operands.weight,
        pos_weight=operands.pos_weight,
        reduction=spec.reduction,
        dtype=spec.compute_dtype,
    ).to(spec.loss_dtype)


def _forward(
    spec: Spec, operands: Operands, backend: str, with_grad: bool
) -> tuple[Tensor, Tensor | None, int | Tensor]:
    """The loss; the gradient for an upstream of 1; and the denominator, which backward needs again."""
    inputs = operands.inputs
    denominator = reference.denominator(spec.reduction, inputs, operands.targets, spec.compute_dtype)
    loss = inputs.new_empty(inputs.shape if spec.reduction == "none" else (), dtype=spec.loss_dtype)
    grad = inputs.new_empty(inputs.shape) if with_grad else None
    _RUN[backend](spec, operands, denominator, loss=loss, grad=grad)
    return loss, grad, denominator


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
        ctx.spec, ctx.backend = spec, backend
        # Whether the upstream is 1 is known without a synchronisation to a kernel and on the CPU, elsewhere to nobody.
        ctx.written = (
            ctx.needs_input_grad[0] and spec.reduction != "none" and (backend == "triton" or not inputs.is_cuda)
        )
        operands = Operands(inputs, targets, alpha, weight, pos_weight)
        loss, grad, denominator = _forward(spec, operands, backend, ctx.written)
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
        if torch.is_grad_enabled():
            return *_by_autograd(ctx.spec, operands, upstream, of_inputs, of_targets), *(None,) * 5
        grad_targets = _by_autograd(ctx.spec, operands, upstream, False, True)[1] if of_targets else None
        if not of_inputs:
            return None, grad_targets, *(None,) * 5
        # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
        written, ctx.written = ctx.written, False
        if not written:
            grad = operands.inputs.new_empty(operands.inputs.shape)
        count = denominator if ctx.count is None else ctx.count
        _RUN[ctx.backend](ctx.spec, operands, count, grad=grad, upstream=upstream, written=written)
        return grad, grad_targets, *(None,) * 5


def _by_autograd(
    spec: Spec, operands: Operands, upstream: Tensor, of_inputs: bool, of_targets: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again when grad mode is on, and those of soft targets."""
    create_graph = torch.is_grad_enabled()
    inputs, targets = operands.inputs, operands.targets
    if not create_graph:
        inputs, targets = inputs.detach().requires_grad_(of_inputs), targets.detach().requires_grad_(of_targets)
    with torch.enable_grad():
        loss = _differentiable(spec, operands._replace(inputs=inputs, targets=targets))
    sources = [tensor for tensor, wanted in ((inputs, of_inputs), (targets, of_targets)) if wanted]
    grads = iter(torch.autograd.grad(loss, sources, upstream, create_graph=create_graph))
    return next(grads) if of_inputs else None, next(grads) if of_targets else None


def _matrix(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """[..., L] as [N, L], without a copy wherever its strides allow."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _triton(
    spec: Spec,
    operands: Operands,
    denominator: int | Tensor,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    written: bool = False,
) -> None:
    """Fill ``loss`` or ``grad`` or both in one launch; a second one adds up the partial sums of a reduced loss."""
    inputs, targets, alpha, weight, pos_weight = operands
    reduced = spec.reduction != "none"
    if inputs.numel() == 0:
        if loss is not None:
            loss.zero_()
        return
    num_labels = inputs.shape[-1] if inputs.dim() else 1
    shape = inputs.numel() // num_labels, num_labels
    if upstream is not None and not reduced and not any(upstream.stride()):
        reduced, upstream = True, upstream.as_strided((), ())  # what sum() and mean() pass back: one value, expanded
    partials = None
    if reduced and loss is not None:
        partials = inputs.new_empty(num_programs(inputs), dtype=spec.compute_dtype)
    sigmoid_launcher(
        spec.formula,
        spec.params,
        _matrix(inputs, shape),
        _matrix(targets, shape),
        spec.alpha if alpha is None else alpha.expand(num_labels),
        None if weight is None else _matrix(weight.expand(inputs.shape), shape),
        None if pos_weight is None else pos_weight.expand(num_labels),
        denominator,
        upstream if upstream is None or reduced else _matrix(upstream, shape),
        loss if partials is None else partials,
        grad,
        reduced=reduced,
        written=written,
        compute_dtype=spec.compute_dtype,
    )
    if partials is not None:
        sum_launcher(partials, loss)


def _eager(
    spec: Spec,
    operands: Operands,
    denominator: int | Tensor,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    written: bool = False,
) -> None:
    """The same from the closed forms of ``reference``, on the CPU block by block."""
    if written and upstream == 1:
        return
    inputs, targets, alpha, weight, pos_weight = operands
    num_labels = inputs.shape[-1] if inputs.dim() else 1
    shape = inputs.numel() // max(num_labels, 1), num_labels
    x, t = _matrix(inputs, shape), _matrix(targets, shape)
    alpha = None if alpha is None else alpha.expand(num_labels)
    weight = None if weight is None else _matrix(weight.expand(inputs.shape), shape)
    pos_weight = None if pos_weight is None else pos_weight.expand(num_labels)
    scale: float | Tensor = 1 / denominator
    if upstream is not None:
        scale = upstream.to(spec.compute_dtype) * scale
    reduced = spec.reduction != "none"
    sums = []
    for block in _blocks(shape, inputs.device):
        labels = block[1]
        values, slopes = reference.elementwise(
            spec.formula,
            spec.params,
            x[block],
            t[block],
            alpha=spec.alpha if alpha is None else alpha[labels],
            weight=None if weight is None else weight[block],
            pos_weight=None if pos_weight is None else pos_weight[labels],
            dtype=spec.compute_dtype,
            soft=_has_soft_labels(t[block]),
            slope=grad is not None,
        )
        if grad is not None and slopes is not None:
            factor = _matrix(scale, shape)[block] if isinstance(scale, Tensor) and not reduced else scale
            # Its next use is as a gradient, not as what autograd saved: nothing to tell the version counter.
            with _unsafe_preserve_version_counter(grad):
                grad.view(shape)[block] = slopes * factor
        if loss is not None and reduced:
            sums.append(values.sum())
        elif loss is not None:
            loss.view(shape)[block] = values
    if loss is not None and reduced:
        loss.copy_(torch.stack(sums).sum() * scale if sums else loss.new_zeros(()))


def _blocks(shape: tuple[int, int], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rectangles that cover a matrix: on the CPU of a size that stays in the cache, elsewhere the whole."""
    rows, cols = shape
    size = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else max(rows * cols, 1)
    col_step = max(min(cols, size), 1)
    row_step = max(size // col_step, 1)
    for row in range(0, rows, row_step):
        for col in range(0, cols, col_step):
            yield slice(row, row + row_step), slice(col, col + col_step)


def _has_soft_labels(targets: Tensor) -> bool:
    if not targets.is_floating_point():
        return False
    # Looking at the values costs a synchronisation elsewhere.
    return targets.device.type != "cpu" or not torch.equal(targets * targets, targets)


_RUN = {"triton": _triton, "eager": _eager}
