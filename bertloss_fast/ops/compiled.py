"""The losses as operators, which torch.compile and torch.export keep whole: two of each family.

Forward writes no gradient: a compiled graph cannot remember which upstream to expect. Backward reads logits
and labels again, which is 3s + 2t in all. What forward leaves for it are a counted denominator and the slopes of lines;
where there is none, an operator gives an empty tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .families import Family, Gradients, Saved, Wanted


class Operators(NamedTuple):
    loss: Any  # (operands, spec) -> loss, saved
    backward: Any  # (upstream, saved, backend, wanted, operands, spec) -> gradients of inputs and of targets


OPERATORS: dict[str, Operators] = {}

_SAVED = ("denominator", "row_slopes", "col_slopes")
_SCHEMA_OF = {
    str: "str",
    int: "int",
    float: "float",
    float | None: "float?",
    bool: "bool",
    bool | None: "bool?",
    tuple[float, ...]: "float[]",
    torch.dtype: "ScalarType",
}


def register(family: Family) -> Family:
    """Make a family's operators."""
    OPERATORS[family.name] = _Maker(family).operators()
    return family


def compiled_loss(family: Family, spec: Any, operands: Any) -> Tensor:
    """The loss by the kernels, as one operator."""
    loss: Tensor = OPERATORS[family.name].loss(*operands, *_with_floats(spec))[0]
    return loss


def compiled_gradients(
    family: Family, backend: str, spec: Any, operands: Any, saved: Saved, upstream: Tensor, wanted: Wanted
) -> Gradients:
    """The gradients as one operator, where compiled autograd traces the backward of an eager forward."""
    tensors = (getattr(saved, name) for name in _SAVED)
    backward = OPERATORS[family.name].backward
    grads = backward(upstream, *tensors, backend, *wanted, *operands, *_with_floats(spec))
    return _only(wanted, grads)


def _with_floats(spec: Any) -> Any:
    """An operator takes floats only where its schema says so."""
    return spec._replace(params=tuple(map(float, spec.params)))


def _only(wanted: Wanted, grads: tuple[Tensor, Tensor]) -> Gradients:
    return grads[0] if wanted.inputs else None, grads[1] if wanted.targets else None


class _Maker:
    """A family's operators, and what torch wants to know about them."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.num_operands = len(family.operands._fields)  # type: ignore[attr-defined]
        self.num_arguments = self.num_operands + len(family.spec._fields)  # type: ignore[attr-defined]

    def operators(self) -> Operators:
        operands, spec = self.family.operands, self.family.spec
        arguments = ["Tensor inputs", *(f"Tensor? {name}" for name in operands._fields[1:])]  # type: ignore[attr-defined]
        arguments += [f"{_SCHEMA_OF[kind]} spec_{name}" for name, kind in get_type_hints(spec).items()]
        saved = [f"Tensor? saved_{name}" for name in _SAVED]
        of_backward = ["Tensor upstream", *saved, "str backend", "bool of_inputs", "bool of_targets", *arguments]
        name = f"bertloss_fast::{self.family.name}"
        self.loss = torch.library.custom_op(
            name, self.run, mutates_args=(), schema=f"({', '.join(arguments)}) -> (Tensor, Tensor, Tensor, Tensor)"
        )
        self.backward = torch.library.custom_op(
            f"{name}_backward",
            self.run_backward,
            mutates_args=(),
            schema=f"({', '.join(of_backward)}) -> (Tensor, Tensor)",
        )
        self.loss.register_fake(self.fake)
        self.backward.register_fake(self.fake_backward)
        self.loss.register_autograd(self.differentiate, setup_context=self.keep)
        return Operators(self.loss, self.backward)

    def unpack(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        spec = self.family.spec(*arguments[self.num_operands :])
        return self.family.operands(*arguments[: self.num_operands]), spec._replace(params=tuple(spec.params))

    def run(self, *arguments: Any) -> tuple[Tensor, ...]:
        operands, spec = self.unpack(arguments)
        shapes = self.family.saved_shapes(spec, operands)
        loss, saved = self.family.forward("triton", spec, operands, None, Wanted())
        empty = loss.new_empty(0, dtype=spec.compute_dtype)
        tensors = (getattr(saved, name) for name in _SAVED)
        return loss, *(empty.clone() if shape is None else t for shape, t in zip(shapes, tensors, strict=True))

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        operands, spec = self.unpack(arguments)
        loss = operands.inputs.new_empty(self.family.loss_shape(spec, operands), dtype=spec.loss_dtype)
        shapes = self.family.saved_shapes(spec, operands)
        return loss, *(loss.new_empty((0,) if shape is None else shape, dtype=spec.compute_dtype) for shape in shapes)

    def run_backward(self, upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        saved, (backend, of_inputs, of_targets), arguments = arguments[:3], arguments[3:6], arguments[6:]
        operands, spec = self.unpack(arguments)
        wanted = Wanted(of_inputs, of_targets)
        of_lines = Saved(denominator=saved[0], row_slopes=saved[1], col_slopes=saved[2])
        grads = self.family.backward(backend, spec, operands, of_lines, upstream.resolve_neg(), None, wanted)
        none = [operands.inputs.new_empty(0) for _ in grads]
        return tuple(n if grad is None else grad for grad, n in zip(grads, none, strict=True))  # type: ignore[return-value]

    def fake_backward(self, upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = arguments[6:8]
        of_inputs = inputs.new_empty(inputs.shape if arguments[4] else (0,))
        return of_inputs, targets.new_empty(targets.shape) if arguments[5] else inputs.new_empty(0)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:], *inputs[: self.num_operands])
        ctx.spec = inputs[self.num_operands :]

    def differentiate(self, ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved = (tensor if tensor.numel() else None for tensor in tensors[: len(_SAVED)])
        wanted = Wanted(ctx.needs_input_grad[0], ctx.needs_input_grad[1] and self.family.grads_of_targets)
        grads = self.backward(upstream, *saved, "triton", *wanted, *tensors[len(_SAVED) :], *ctx.spec)
        return *_only(wanted, grads), *(None,) * (self.num_arguments - 2)
