"""Every loss under autograd: the route of a call, what is saved for backward, and the upstream that is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sigmoid import Operands, Spec
from . import dispatch
from .compiled import compiled_gradient, compiled_loss
from .families import Family, Saved
from .operands import with_dense_targets
from .upstream import UpstreamMemory


def compute_loss(
    family: Family, spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None
) -> Tensor:
    """A loss, on valid arguments."""
    targets_require_grad = operands.targets is not None and operands.targets.requires_grad
    if dispatch.needs_plain_operations() or operands.inputs.numel() == 0:
        # The compiler makes one kernel of plain operations, and two of what they reduce; ours are fewer passes.
        if backend == "triton" and not targets_require_grad and dispatch.can_keep_operators():
            return compiled_loss(family.name, spec, operands)
        return family.plain(spec, with_dense_targets(operands))
    if not torch.is_grad_enabled() or not (operands.inputs.requires_grad or targets_require_grad):
        return family.forward(backend, spec, operands, None, False)[0]
    # Only what a gradient can flow to is an argument of its own: each costs a small loss time.
    inputs, targets = operands[:2]
    loss: Tensor = _Loss.apply(inputs, targets, operands, spec, family, backend, memory)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *_, operands, spec, family, backend, memory = arguments
        loss: Tensor
        ctx.set_materialize_grads(False)
        # Whether an upstream is the expected one can be told without a synchronisation by a kernel and by the CPU;
        # elsewhere backward computes the gradient.
        with_grad = (
            ctx.needs_input_grad[0]
            and spec.reduction != "none"
            and (backend == "triton" or operands.inputs.device.type == "cpu")
        )
        expected = None
        if with_grad and memory is not None:
            expected = memory.expected(backend, operands.inputs, spec.compute_dtype)
        loss, saved = family.forward(backend, spec, operands, expected, with_grad)
        ctx.spec, ctx.family, ctx.backend, ctx.expected, ctx.handed_out = spec, family, backend, expected, False
        ctx.save_for_backward(*operands, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return _gradients(None, None)
        tensors = ctx.saved_tensors
        operands, saved = Operands(*tensors[: len(Operands._fields)]), Saved(*tensors[len(Operands._fields) :])
        of_inputs, of_targets = ctx.needs_input_grad[:2]
        if dispatch.can_keep_operators() and not of_targets and not torch.is_grad_enabled():
            gradient = compiled_gradient(ctx.backend, ctx.family.name, ctx.spec, operands, saved, upstream)
            return _gradients(gradient, None)
        if torch.is_grad_enabled() or dispatch.needs_plain_operations() or dispatch.is_batched(upstream):
            return _gradients(*_by_autograd(ctx.family, ctx.spec, operands, upstream, of_inputs, of_targets))
        grad_targets = _by_autograd(ctx.family, ctx.spec, operands, upstream, False, True)[1] if of_targets else None
        if not of_inputs:
            return _gradients(None, grad_targets)
        # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
        if ctx.handed_out:
            saved = saved._replace(grad=None, note=None)
        ctx.handed_out = True
        grad = ctx.family.backward(ctx.backend, ctx.spec, operands, saved, upstream.resolve_neg(), ctx.expected)
        # With a version of its own: autograd would take a write to it for one to what it saved.
        return _gradients(grad.data, grad_targets)


def _gradients(of_inputs: Tensor | None, of_targets: Tensor | None) -> tuple[Tensor | None, ...]:
    """One for each argument of the Function."""
    return of_inputs, of_targets, None, None, None, None, None


def _by_autograd(
    family: Family, spec: Spec, operands: Operands, upstream: Tensor, of_inputs: bool, of_targets: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that can be differentiated again when grad mode is on, and those of soft targets."""
    create_graph = torch.is_grad_enabled()
    operands = with_dense_targets(operands)
    inputs, targets = operands.inputs, operands.targets
    assert targets is not None
    with torch.enable_grad():
        if create_graph:
            # Aliases, so that the gradient stops at this loss: what led to its inputs is the outer graph's.
            inputs, targets = inputs.view_as(inputs), targets.view_as(targets)
        else:
            inputs, targets = inputs.detach().requires_grad_(of_inputs), targets.detach().requires_grad_(of_targets)
        loss = family.plain(spec, operands._replace(inputs=inputs, targets=targets))
    sources = [tensor for tensor, wanted in ((inputs, of_inputs), (targets, of_targets)) if wanted]
    grads = iter(torch.autograd.grad(loss, sources, upstream, create_graph=create_graph))
    return next(grads) if of_inputs else None, next(grads) if of_targets else None
