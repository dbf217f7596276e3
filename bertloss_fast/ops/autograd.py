"""Every loss under autograd: the route of a call, what is saved for backward, and the upstream that is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .compiled import compiled_gradients, compiled_loss
from .families import Family, Gradients, Saved, Wanted
from .upstream import UpstreamMemory


def compute_loss(
    family: Family, spec: Any, operands: Any, backend: str, memory: UpstreamMemory | None = None
) -> Tensor:
    """A loss, on valid arguments."""
    sources = operands[: len(family.sources)]
    targets_require_grad = operands.targets is not None and operands.targets.requires_grad
    if dispatch.needs_plain_operations() or operands.inputs.numel() == 0 or operands.inputs.is_meta:
        # The compiler makes one kernel of plain operations, and two of what they reduce; ours are fewer passes.
        has_gradients = family.grads_of_targets or not targets_require_grad
        keeps = (backend == "triton" or family.whole) and has_gradients and dispatch.can_keep_operators()
        if keeps and operands.inputs.numel():
            return compiled_loss(family, spec, operands, backend)
        return family.plain(spec, operands)
    if not torch.is_grad_enabled() or not any(source is not None and source.requires_grad for source in sources):
        return family.forward(backend, spec, operands, None, Wanted())[0]
    # Only what a gradient can flow to is an argument of its own: each costs a small loss time.
    loss: Tensor = _Loss.apply(*sources, operands, spec, family, backend, memory)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        operands, spec, family, backend, memory = arguments[-_NOT_SOURCES:]
        loss: Tensor
        ctx.set_materialize_grads(False)
        # Whether an upstream is the expected one can be told without a synchronisation by a kernel and by the CPU;
        # elsewhere backward computes the gradient.
        can_expect = spec.reduction != "none" and (backend == "triton" or operands.inputs.device.type == "cpu")
        wanted = _of_family(family, _asked(ctx)) if can_expect or family.keeps_slopes else Wanted()
        expected = None
        if memory is not None and any(wanted):
            expected = memory.expected(backend, operands.inputs, spec.compute_dtype)
        loss, saved = family.forward(backend, spec, operands, expected, wanted)
        ctx.spec, ctx.family, ctx.backend, ctx.expected, ctx.handed_out = spec, family, backend, expected, False
        ctx.save_for_backward(*operands, *saved.grads, *saved[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        family, spec, backend = ctx.family, ctx.spec, ctx.backend
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        num_operands = len(family.operands._fields)
        operands, tensors = family.operands(*tensors[:num_operands]), tensors[num_operands:]
        saved = Saved(Gradients(*tensors[: len(Wanted())]), *tensors[len(Wanted()) :])
        asked = _asked(ctx)
        wanted = _of_family(family, asked)
        if dispatch.can_keep_operators() and wanted == asked and not torch.is_grad_enabled():
            return _of_arguments(family, compiled_gradients(family, backend, spec, operands, saved, upstream, wanted))
        if torch.is_grad_enabled() or dispatch.needs_plain_operations() or dispatch.is_batched(upstream):
            return _of_arguments(family, _by_autograd(family, spec, operands, upstream, asked))
        grads = Gradients()
        if any(wanted):
            # A gradient is handed out once: who got it may write to it, and a second backward needs memory of its own.
            if ctx.handed_out:
                saved = saved._replace(grads=Gradients())
            ctx.handed_out = True
            found = family.backward(backend, spec, operands, saved, upstream.resolve_neg(), ctx.expected, wanted)
            # With a version of its own: autograd would take a write to it for one to what it saved.
            grads = Gradients(*(None if grad is None else grad.data for grad in found))
        if wanted != asked:
            of_targets = _by_autograd(family, spec, operands, upstream, Wanted(targets=True))
            grads = grads._replace(targets=of_targets.targets)
        return _of_arguments(family, grads)


_NOT_SOURCES = 5  # arguments to which no gradient flows


def _asked(ctx: Any) -> Wanted:
    return Wanted(*ctx.needs_input_grad[:-_NOT_SOURCES])


def _of_family(family: Family, asked: Wanted) -> Wanted:
    """What its own code has."""
    return asked._replace(targets=False) if asked.targets and not family.grads_of_targets else asked


def _of_arguments(family: Family, grads: Gradients) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the Function."""
    return *grads[: len(family.sources)], *(None,) * _NOT_SOURCES


def _by_autograd(family: Family, spec: Any, operands: Any, upstream: Tensor, wanted: Wanted) -> Gradients:
    """Gradients that can be differentiated again when grad mode is on, and those of soft targets."""
    create_graph = torch.is_grad_enabled()
    tensors = {name: getattr(operands, name) for name in family.sources}
    with torch.enable_grad():
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if create_graph:
                # Aliases, so that the gradient stops at this loss: what led to its inputs is the outer graph's.
                tensors[name] = tensor.view_as(tensor)
            else:
                tensors[name] = tensor.detach().requires_grad_(getattr(wanted, name))
        loss = family.plain(spec, operands._replace(**tensors))
    names = [name for name in tensors if getattr(wanted, name)]
    grads = torch.autograd.grad(loss, [tensors[name] for name in names], upstream, create_graph=create_graph)
    return Gradients(**dict(zip(names, grads, strict=True)))
