"""The losses as operators, which torch.compile and torch.export keep whole.

Forward writes no gradient: a compiled graph cannot remember which upstream to expect. Backward reads logits
and labels again, which is 3s + 2t in all. What forward leaves for it are a counted denominator and the slopes of lines;
where there is none, an operator gives an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.sigmoid import Operands, Spec
from .families import FAMILIES, Saved

_OPERANDS = "Tensor inputs, " + ", ".join(f"Tensor? {name}" for name in Operands._fields[1:])
_SPEC = (
    "str formula, float[] params, float? alpha_of_all, float smoothing, float? ignored, str reduction, "
    "ScalarType compute_dtype, ScalarType loss_dtype, bool? soft"
)
_NUM_OPERANDS = len(Operands._fields)
_SAVED = ("denominator", "row_slopes", "col_slopes")


def compiled_loss(family: str, spec: Spec, operands: Operands) -> Tensor:
    """The loss by the kernels, as one operator."""
    params = tuple(map(float, spec.params))
    loss: Tensor = _loss(family, *operands, *spec._replace(params=params))[0]
    return loss


@torch.library.custom_op(
    "bertloss_fast::loss",
    mutates_args=(),
    schema=f"(str family, {_OPERANDS}, {_SPEC}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _loss(family: str, *arguments: Any) -> tuple[Tensor, ...]:
    operands, spec = _unpack(arguments)
    shapes = FAMILIES[family].saved_shapes(spec, operands)
    loss, saved = FAMILIES[family].forward("triton", spec, operands, None, False)
    empty = loss.new_empty(0, dtype=spec.compute_dtype)
    tensors = (getattr(saved, name) for name in _SAVED)
    return loss, *(empty.clone() if shape is None else t for shape, t in zip(shapes, tensors, strict=True))


@_loss.register_fake  # type: ignore[untyped-decorator]
def _(family: str, *arguments: Any) -> tuple[Tensor, ...]:
    operands, spec = _unpack(arguments)
    inputs = operands.inputs
    shape = FAMILIES[family].loss_shape(spec, operands)
    shapes = FAMILIES[family].saved_shapes(spec, operands)
    return inputs.new_empty(shape, dtype=spec.loss_dtype), *(
        inputs.new_empty((0,) if shape is None else shape, dtype=spec.compute_dtype) for shape in shapes
    )


@torch.library.custom_op(
    "bertloss_fast::loss_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor? denominator, Tensor? row_slopes, Tensor? col_slopes, str backend, str family, "
    f"{_OPERANDS}, {_SPEC}) -> Tensor",
)
def _loss_backward(
    upstream: Tensor,
    denominator: Tensor | None,
    row_slopes: Tensor | None,
    col_slopes: Tensor | None,
    backend: str,
    family: str,
    *arguments: Any,
) -> Tensor:
    operands, spec = _unpack(arguments)
    saved = Saved(None, None, denominator, row_slopes, col_slopes)
    return FAMILIES[family].backward(backend, spec, operands, saved, upstream.resolve_neg(), None)


@_loss_backward.register_fake  # type: ignore[untyped-decorator]
def _(upstream: Tensor, *arguments: Any) -> Tensor:
    inputs: Tensor = arguments[len(_SAVED) + 2]
    return inputs.new_empty(inputs.shape)


def compiled_gradient(
    backend: str, family: str, spec: Spec, operands: Operands, saved: Saved, upstream: Tensor
) -> Tensor:
    """The gradient as one operator, where compiled autograd traces the backward of an eager forward."""
    params = tuple(map(float, spec.params))
    tensors = (getattr(saved, name) for name in _SAVED)
    gradient: Tensor = _loss_backward(upstream, *tensors, backend, family, *operands, *spec._replace(params=params))
    return gradient


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    family, *arguments = inputs
    ctx.save_for_backward(*output[1:], *arguments[:_NUM_OPERANDS])
    ctx.family, ctx.spec = family, arguments[_NUM_OPERANDS:]


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    saved = (tensor if tensor.numel() else None for tensor in tensors[: len(_SAVED)])
    grad = _loss_backward(upstream, *saved, "triton", ctx.family, *tensors[len(_SAVED) :], *ctx.spec)
    return None, grad, *(None,) * (_NUM_OPERANDS - 1 + len(ctx.spec))


_loss.register_autograd(_backward, setup_context=_setup)


def _unpack(arguments: tuple[Any, ...]) -> tuple[Operands, Spec]:
    spec = Spec(*arguments[_NUM_OPERANDS:])
    return Operands(*arguments[:_NUM_OPERANDS]), spec._replace(params=tuple(spec.params))
