"""The pointwise family's forward and backward: allocation, and the choice of code."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..reference import pointwise as reference
from ..reference.pointwise import Operands, Spec
from . import dispatch
from .autograd import compute_loss
from .compiled import register
from .families import Family, Saved, Shape, Wanted
from .families import Gradients as Grads
from .inductor import with_inductor
from .operands import as_matrix, rows_and_labels
from .upstream import Expected, UpstreamMemory

if dispatch.TRITON_ERROR is None:
    from ..kernels.elements import Matrices, num_programs
    from ..kernels.passes import count_launcher, num_partials, sum_launcher
    from ..kernels.pointwise import Gradients, pointwise_launcher
    from ..kernels.upstream import Upstream
    from .launch import expected_upstream, upstream_of


def pointwise_loss(spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None) -> Tensor:
    """A loss of the family, on valid arguments.

    Eager is plain operations: torch has kernels for these few, and its autograd in C++ beats a Function in Python. So
    is a loss whose weight is learned.
    """
    weight = operands.weight
    learned = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if backend == "eager" or learned:
        return reference.loss(spec, operands)
    return compute_loss(FAMILY, spec, operands, backend, memory)


def _forward(
    backend: str, spec: Spec, operands: Operands, expected: Expected | None, wanted: Wanted
) -> tuple[Tensor, Saved]:
    """One launch for the loss and its gradients, and one that adds up the partial sums of a reduced loss."""
    inputs, targets = operands[:2]
    count = _denominator(spec, operands)
    reduced = spec.reduction != "none"
    loss = inputs.new_empty(() if reduced else inputs.shape, dtype=spec.loss_dtype)
    grads = Grads(_room(inputs) if wanted.inputs else None, _room(targets) if wanted.targets else None)
    upstream, note = expected_upstream(expected, grads[0] if wanted.inputs else grads[1])
    partials = inputs.new_empty(num_programs(inputs), dtype=spec.compute_dtype) if reduced else None
    _launch(spec, operands, count, upstream, None, loss if partials is None else partials, grads)
    if partials is not None:
        sum_launcher(partials, loss, denominator=count)
    return loss, Saved(grads, note=note, denominator=count if isinstance(count, Tensor) else None)


def _backward(
    backend: str,
    spec: Spec,
    operands: Operands,
    saved: Saved,
    upstream: Tensor,
    expected: Expected | None,
    wanted: Wanted,
) -> Grads:
    """The gradients; a launch that returns at once where they are written and what came was expected."""
    inputs, targets = operands[:2]
    count = _denominator(spec, operands) if saved.denominator is None else saved.denominator
    written = all(grad is not None for grad, is_wanted in zip(saved.grads, wanted, strict=True) if is_wanted)
    grads = Grads(
        _room(inputs, saved.grads.inputs) if wanted.inputs else None,
        _room(targets, saved.grads.targets) if wanted.targets else None,
    )
    if any(upstream.stride()):
        _launch(spec, operands, count, Upstream(), upstream, None, grads)
    else:
        _launch(spec, operands, count, upstream_of(upstream, saved, expected), None, None, grads, written=written)
    return grads


def _room(tensor: Tensor, written: Tensor | None = None) -> Tensor:
    """For its gradient, which may be written there already."""
    return tensor.new_empty(tensor.shape) if written is None else written


def _loss_shape(spec: Spec, operands: Operands) -> Shape:
    return tuple(operands.inputs.shape) if spec.reduction == "none" else ()


def _saved_shapes(spec: Spec, operands: Operands) -> tuple[Shape | None, Shape | None, Shape | None]:
    return () if reference.is_counted(spec, operands) else None, None, None


FAMILY = register(
    with_inductor(
        Family(
            "pointwise",
            Spec,
            Operands,
            reference.loss,
            _forward,
            _backward,
            _loss_shape,
            _saved_shapes,
            grads_of_targets=True,
        )
    )
)


def _denominator(spec: Spec, operands: Operands) -> int | Tensor:
    """What the sum of the losses is divided by; a pass over mask and weight where it depends on them."""
    if not reference.is_counted(spec, operands):
        return reference.denominator(spec, operands)
    inputs, weight = operands.inputs, operands.weight
    partials = inputs.new_empty(num_partials(inputs.numel()), dtype=spec.compute_dtype)
    matrices = Matrices(None, as_matrix(weight, inputs), as_matrix(operands.mask, inputs), None, spec.compute_dtype)
    count_launcher(matrices, rows_and_labels(inputs), partials, positives=weight is not None)
    total = partials.new_empty(())
    sum_launcher(partials, total, at_least=1 if weight is None else None)
    return total if weight is None else reference.or_one(total)


def _launch(
    spec: Spec,
    operands: Operands,
    count: int | Tensor,
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grads: Grads,
    *,
    written: bool = False,
) -> None:
    """The upstream gradient is one of a scalar, or ``upstreams`` of the losses."""
    inputs, targets, weight, mask = (as_matrix(tensor, operands.inputs) for tensor in operands[:4])
    factors = weight, as_matrix(upstreams, operands.inputs)
    pointwise_launcher(
        spec.formula,
        Matrices(cast(Tensor, inputs), targets, mask, None, spec.compute_dtype),
        tuple(factor for factor in factors if factor is not None),
        count,
        upstream,
        loss,
        Gradients(grads.inputs, grads.targets),
        reduced=spec.reduction != "none",
        written=written,
    )
