"""The losses as operators, which torch.compile and torch.export keep whole: two of each family.

Forward writes no gradient: a compiled graph cannot remember which upstream to expect. Backward reads logits
and labels again, which is 3s + 2t in all. What forward leaves for it are a counted denominator and the slopes of lines;
where there is none, an operator gives an empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .families import Family, Gradients, Saved, Wanted


class Operators(NamedTuple):
    loss: Any  # (backend, operands, spec) -> loss, saved
    backward: Any  # (upstream, saved, backend, wanted, operands, spec) -> gradients of the sources


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


def compiled_loss(family: Family, spec: Any, operands: Any, backend: str) -> Tensor:
    """The loss as one operator."""
    loss: Tensor = OPERATORS[family.name].loss(backend, *operands, *_with_floats(spec))[0]
    return loss


def compiled_gradients(
    family: Family, backend: str, spec: Any, operands: Any, saved: Saved, upstream: Tensor, wanted: Wanted
) -> Gradients:
    """The gradients as one operator, where compiled autograd traces the backward of an eager forward."""
    tensors = (getattr(saved, name) for name in _SAVED)
    backward = OPERATORS[family.name].backward
    wanted_of = wanted[: len(family.sources)]
    grads = backward(upstream, *tensors, backend, *wanted_of, *operands, *_with_floats(spec))
    return Gradients(*_only(wanted_of, grads))


def _with_floats(spec: Any) -> Any:
    """An operator takes floats only where its schema says so."""
    return spec._replace(params=tuple(map(float, spec.params)))


def _only(wanted: Iterable[bool], grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(grad if is_wanted else None for is_wanted, grad in zip(wanted, grads, strict=True))


class _Maker:
    """A family's operators, and what torch wants to know about them."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.num_sources = len(family.sources)
        self.num_operands = len(family.operands._fields)  # type: ignore[attr-defined]
        self.num_arguments = self.num_operands + len(family.spec._fields)  # type: ignore[attr-defined]

    def operators(self) -> Operators:
        operands, spec = self.family.operands, self.family.spec
        arguments = ["Tensor inputs", *(f"Tensor? {name}" for name in operands._fields[1:])]  # type: ignore[attr-defined]
        arguments += [f"{_SCHEMA_OF[kind]} spec_{name}" for name, kind in get_type_hints(spec).items()]
        saved = [f"Tensor? saved_{name}" for name in _SAVED]
        of_sources = [f"bool of_{name}" for name in self.family.sources]
        of_backward = ["Tensor upstream", *saved, "str backend", *of_sources, *arguments]
        name = f"bertloss_fast::{self.family.name}"
        self.loss = torch.library.custom_op(
            name,
            self.run,
            mutates_args=(),
            schema=f"(str backend, {', '.join(arguments)}) -> (Tensor, Tensor, Tensor, Tensor)",
        )
        self.backward = torch.library.custom_op(
            f"{name}_backward",
            self.run_backward,
            mutates_args=(),
            schema=f"({', '.join(of_backward)}) -> ({', '.join(['Tensor'] * self.num_sources)})",
        )
        self.loss.register_fake(self.fake)
        self.backward.register_fake(self.fake_backward)
        self.loss.register_autograd(self.differentiate, setup_context=self.keep)
        return Operators(self.loss, self.backward)

    def unpack(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        spec = self.family.spec(*arguments[self.num_operands :])
        return self.family.operands(*arguments[: self.num_operands]), spec._replace(params=tuple(spec.params))

    def run(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        operands, spec = self.unpack(arguments)
        shapes = self.family.saved_shapes(spec, operands)
        loss, saved = self.family.forward(backend, spec, operands, None, Wanted(inputs=self.family.keeps_slopes))
        empty = loss.new_empty(0, dtype=spec.compute_dtype)
        tensors = (getattr(saved, name) for name in _SAVED)
        return loss, *(empty.clone() if shape is None else t for shape, t in zip(shapes, tensors, strict=True))

    def fake(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        operands, spec = self.unpack(arguments)
        loss = operands.inputs.new_empty(self.family.loss_shape(spec, operands), dtype=spec.loss_dtype)
        shapes = self.family.saved_shapes(spec, operands)
        return loss, *(loss.new_empty((0,) if shape is None else shape, dtype=spec.compute_dtype) for shape in shapes)

    def run_backward(self, upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        of_lines, backend, wanted, arguments = self.split(arguments)
        operands, spec = self.unpack(arguments)
        saved = Saved(denominator=of_lines[0], row_slopes=of_lines[1], col_slopes=of_lines[2])
        grads = self.family.backward(backend, spec, operands, saved, upstream.resolve_neg(), None, Wanted(*wanted))
        return tuple(operands.inputs.new_empty(0) if grad is None else grad for grad in grads[: self.num_sources])

    def fake_backward(self, upstream: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        _, _, wanted, arguments = self.split(arguments)
        sources = arguments[: self.num_sources]
        return tuple(
            source.new_empty(source.shape) if is_wanted else sources[0].new_empty(0)
            for source, is_wanted in zip(sources, wanted, strict=True)
        )

    def split(self, arguments: tuple[Any, ...]) -> tuple[Any, str, tuple[bool, ...], tuple[Any, ...]]:
        """Backward's arguments: what was saved, the backend, what is wanted, operands and spec."""
        num_saved = len(_SAVED)
        first = num_saved + 1 + self.num_sources
        return arguments[:num_saved], arguments[num_saved], arguments[num_saved + 1 : first], arguments[first:]

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        backend, *arguments = inputs
        ctx.save_for_backward(*output[1:], *arguments[: self.num_operands])
        ctx.backend, ctx.spec = backend, arguments[self.num_operands :]

    def differentiate(self, ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved = (tensor if tensor.numel() else None for tensor in tensors[: len(_SAVED)])
        wanted = list(ctx.needs_input_grad[1 : 1 + self.num_sources])
        wanted[1] = wanted[1] and self.family.grads_of_targets
        grads = self.backward(upstream, *saved, ctx.backend, *wanted, *tensors[len(_SAVED) :], *ctx.spec)
        return None, *_only(wanted, grads), *(None,) * (self.num_arguments - self.num_sources)
