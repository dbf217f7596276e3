"""The inductor backend: loss and gradients in one pass, which torch.compile makes of plain operations.

A pass is compiled at the first call with its options, dtypes and numbers of dimensions, and serves every shape; but a
dimension of 1, other strides and another number of threads are compiled once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from .families import Family, Gradients, OnePass, Saved, Wanted
from .inner import inner_autograd
from .upstream import Expected, number_that_came


def with_inductor(family: Family, one_pass: OnePass | None = None) -> Family:
    """The family with this backend beside its own; ``one_pass`` is its closed form, where it has one."""
    if one_pass is None:
        one_pass = _by_vjp(family)

    def forward(
        backend: str,
        spec: Any,
        operands: Any,
        expected: Expected | None,
        wanted: Wanted,
        room: Tensor | None = None,
    ) -> tuple[Tensor, Saved]:
        if backend != "inductor":
            room_if_any = () if room is None else (room,)
            return family.forward(backend, spec, operands, expected, wanted, *room_if_any)
        note = None if expected is None else expected.value
        if spec.reduction == "none":
            wanted = Wanted()  # each loss has an upstream of its own
        loss, grads = _run(one_pass, spec, operands, note, wanted)
        if room is not None and grads.inputs is not None:
            grads = Gradients(room.copy_(grads.inputs))
        return cast(Tensor, loss).to(spec.loss_dtype), Saved(grads, note=note)

    def backward(
        backend: str,
        spec: Any,
        operands: Any,
        saved: Saved,
        upstream: Tensor,
        expected: Expected | None,
        wanted: Wanted,
    ) -> Gradients:
        if backend != "inductor":
            return family.backward(backend, spec, operands, saved, upstream, expected, wanted)
        number = number_that_came(upstream, expected)
        if saved.is_written_for(number):
            return saved.grads
        # Where forward's pass was made to write gradients, it serves here too, and nothing is compiled.
        return _run(one_pass, spec, operands, upstream, wanted, with_loss=spec.reduction != "none")[1]

    return family._replace(forward=forward, backward=backward)


def _by_vjp(family: Family) -> OnePass:
    """Of the plain operations, whose derivatives the compiler takes and puts into the same loops."""

    def one_pass(spec: Any, operands: Any, upstream: Tensor, wanted: Wanted) -> tuple[Tensor, Gradients]:
        names = [name for name in family.sources if getattr(wanted, name)]

        def plain(*sources: Tensor) -> Tensor:
            return family.plain(spec, operands._replace(**dict(zip(names, sources, strict=True))))

        if not names:
            return plain(), Gradients()
        loss, pull = cast(Any, torch.func.vjp(plain, *(getattr(operands, name) for name in names)))
        return loss, Gradients(**dict(zip(names, pull(upstream), strict=True)))

    return one_pass


def _run(
    one_pass: OnePass, spec: Any, operands: Any, upstream: Tensor | None, wanted: Wanted, *, with_loss: bool = True
) -> tuple[Tensor | None, Gradients]:
    # The loss in the dtype of the computation, so that no gradient passes through a narrower one.
    spec = spec._replace(loss_dtype=spec.compute_dtype)
    if upstream is None:
        upstream = operands.inputs.new_ones((), dtype=spec.compute_dtype)
    given = [None if tensor is None else tensor.detach() for tensor in operands]
    tensors = [tensor for tensor in (upstream.detach().to(spec.compute_dtype), *given) if tensor is not None]
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.dim())))
    layout = tuple(map(_layout, tensors))
    names = tuple(name for name, tensor in zip(operands._fields, given, strict=True) if tensor is not None)
    compiled = _compiled(one_pass, spec, operands.__class__, names, layout, wanted, with_loss)
    # At any call it may compile, and take derivatives of its own; and under autocast it would once more.
    with inner_autograd(), torch.no_grad(), torch.autocast(operands.inputs.device.type, enabled=False):
        loss, grads = compiled(*tensors)
    return loss, Gradients(*grads)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a pass is compiled for."""
    strides = tuple(
        (size == 1, stride in (0, 1) and stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.dtype, tensor.device, tensor.is_contiguous(), strides


@cache
def _compiled(
    one_pass: OnePass,
    spec: Any,
    operands: Callable[..., Any],
    names: tuple[str, ...],
    layout: tuple[Any, ...],
    wanted: Wanted,
    with_loss: bool,
) -> Callable[..., Any]:
    def run(upstream: Tensor, *tensors: Tensor) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        loss, grads = one_pass(spec, operands(**dict(zip(names, tensors, strict=True))), upstream, wanted)
        return loss if with_loss else None, tuple(grads)

    # torch.compile keeps what it compiled by code object, a few for each; so every pass has one of its own.
    name = f"bertloss_fast_{_compiled.cache_info().misses}"
    own = FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
    return torch.compile(own, fullgraph=True)
