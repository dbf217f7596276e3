"""A linear layer and its loss in one: the logits are made, used and forgotten chunk by chunk.

With z = x W^T + b and g = dloss/dz of a chunk, the gradients are g W of the inputs, g^T x of the weight, and sums of g
of the bias. They are linear in the upstream gradient: what forward wrote for one becomes another's by a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import functional as F

from . import dispatch
from .autograd import compute_loss
from .chunks import KINDS, Layer, is_on_host, walk
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .products import Losses, Products, matmul, rounded, scale_of
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.upstream import rescale_launcher

# Gradients are written for upstreams in this range only: beyond it one of them could leave that of float32.
_SMALLEST, _LARGEST = 2.0**-32, 2.0**32


class Call(NamedTuple):
    """A loss of a layer's logits, its arguments checked."""

    family: str
    spec: Any
    operands: Any  # of the family, with a tensor in the logits' place that has their shape, and takes no memory
    layer: Layer
    backend: str
    memory: UpstreamMemory | None = None


def linear_loss(call: Call) -> Tensor:
    """The loss, under autograd."""
    family, layer = LINEAR[call.family], call.layer
    of_layer = {field: getattr(layer, field) for field in ("inputs", "linear_weight", "linear_bias")}
    operands = family.operands(**{**call.operands._asdict(), **of_layer})
    spec = family.spec(*call.spec, logits_dtype=layer.logits_dtype, chunk=layer.chunk)
    if not call.operands.inputs.numel():
        return family.plain(spec, operands)
    return compute_loss(family, spec, operands, call.backend, call.memory)


class Step:
    """One pass over a call that holds no gradient of the weight.

    Iterating gives labels, and the gradients of their weights and biases in the dtype of the computation, which may be
    written to. Afterwards there are the loss, and its gradient in the inputs in that dtype.
    """

    loss: Tensor
    of_inputs: Tensor

    def __init__(self, call: Call) -> None:
        self._call = call._replace(layer=call.layer._replace(inputs=call.layer.inputs.detach()))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        call, spec, layer = self._call, self._call.spec, self._call.layer
        if not call.operands.inputs.numel():
            self.loss = layer.inputs.new_zeros((), dtype=spec.loss_dtype)
            self.of_inputs = torch.zeros_like(layer.inputs, dtype=spec.compute_dtype)
            return
        # All rows in one chunk: a label is updated once.
        way = walk(call.family, call.backend, spec, call.operands, layer, all_rows=True)
        scale = scale_of(way.denominator, None, on_host=is_on_host(call.backend, layer))
        products = Products(layer, spec, scale, Wanted(inputs=True), in_one=True)
        losses = Losses(call.family, spec, call.operands)
        for chunk in way.chunks:
            losses.add(chunk)
            products.add(chunk)  # before the weight is another
            slope = cast(Tensor, chunk.slope)
            of_bias = None if layer.linear_bias is None else slope.sum(0, dtype=spec.compute_dtype) * scale
            yield chunk.labels, matmul(slope.t(), chunk.inputs, spec.compute_dtype) * scale, of_bias
        self.loss, self.of_inputs = losses.reduced(way.denominator), cast(Tensor, products.kept().inputs)


def _split(name: str, spec: Any, operands: Any) -> tuple[Any, Any, Layer]:
    """The family's own spec and operands, with a tensor of the logits' shape that takes no memory; and the layer."""
    family, fields = KINDS[name].family, operands._asdict()
    of_layer = fields["inputs"], fields.pop("linear_weight"), fields.pop("linear_bias")
    layer = Layer(*of_layer, spec.logits_dtype, spec.chunk)
    shape = (*layer.inputs.shape[:-1], len(layer.linear_weight))
    fields["inputs"] = layer.inputs.new_empty((), dtype=layer.logits_dtype).expand(shape)
    own = family.spec(*spec[: len(family.spec._fields)])  # type: ignore[attr-defined]
    return own, family.operands(**fields), layer


def logits(layer: Layer) -> Tensor:
    """All of them, as differentiable operations."""
    dtype, bias = layer.logits_dtype, layer.linear_bias
    bias = None if bias is None else bias.to(dtype)
    return F.linear(layer.inputs.to(dtype), layer.linear_weight.to(dtype), bias)


def without_autocast(layer: Layer) -> Any:
    """What autocast asks for is in the logits' dtype."""
    return torch.autocast(layer.inputs.device.type, enabled=False)


def _forward_of(name: str) -> Callable[..., tuple[Tensor, Saved]]:
    def forward(
        backend: str, spec: Any, operands: Any, expected: Expected | None, wanted: Wanted
    ) -> tuple[Tensor, Saved]:
        own, made, layer = _split(name, spec, operands)
        note = _note(expected, own, layer, backend) if any(wanted) else None
        with without_autocast(layer):
            way = walk(name, backend, own, made, layer, with_slope=any(wanted))
            scale = scale_of(way.denominator, note, on_host=is_on_host(backend, layer))
            products = Products(layer, own, scale, wanted, in_one=way.in_one)
            losses = Losses(name, own, made)
            for chunk in way.chunks:
                losses.add(chunk)
                products.add(chunk)
            return losses.reduced(way.denominator), Saved(products.kept(), note=note)

    return forward


def _note(expected: Expected | None, spec: Any, layer: Layer, backend: str) -> Tensor:
    """The upstream that gradients are written for, in []."""
    if expected is not None and backend == "triton":
        return expected.value.clone()  # into which a kernel writes, but nothing out of the range
    if expected is not None and _SMALLEST <= abs(expected.value.item()) <= _LARGEST:
        return expected.value
    return layer.inputs.new_ones((), dtype=spec.compute_dtype)


def _backward_of(name: str) -> Callable[..., Gradients]:
    def backward(
        backend: str,
        spec: Any,
        operands: Any,
        saved: Saved,
        upstream: Tensor,
        expected: Expected | None,
        wanted: Wanted,
    ) -> Gradients:
        own, made, layer = _split(name, spec, operands)

        def kept(value: Tensor | None, each: Tensor | None = None) -> Gradients:
            """For an upstream, or one of ``each`` loss."""
            with without_autocast(layer):
                way = walk(name, backend, own, made, layer, each)
                scale = scale_of(way.denominator, value, on_host=is_on_host(backend, layer))
                products = Products(layer, own, scale, wanted, in_one=way.in_one)
                for chunk in way.chunks:
                    products.add(chunk)
                return products.kept()

        if any(upstream.stride()):
            each = upstream.reshape(-1, upstream.shape[-1]) if name == "sigmoid" else upstream.reshape(-1)
            return rounded(kept(None, each), layer)
        came = upstream.as_strided((), ())
        if own.reduction == "none":  # one value for all
            own = own._replace(reduction="sum")
        number = number_that_came(came, expected) if backend != "triton" else None
        direct = saved.note is None or (number is not None and _loses_digits(number, saved.note, layer))
        if direct:
            return rounded(kept(came.to(own.compute_dtype)), layer)
        # What is computed once more takes the way that forward's took, and ends with the same bits.
        written = any(grad is not None for grad in saved.grads)
        found = saved.grads if written else kept(saved.note)
        _rescale(found, cast(Tensor, saved.note), came, number, expected)
        return rounded(found, layer)

    return backward


def _loses_digits(number: float, note: Tensor, layer: Layer) -> bool:
    """Whether another factor would round a second time what is kept of a bfloat16 weight."""
    return number != note.item() and layer.linear_weight.dtype == torch.bfloat16


def _rescale(kept: Gradients, note: Tensor, came: Tensor, number: float | None, expected: Expected | None) -> None:
    """Gradients for the upstream in the note as those of the one that came."""
    memory = None if expected is None else expected.value
    for grad in kept:
        if grad is not None and number is None:
            rescale_launcher(grad, came, note, memory, smallest=_SMALLEST, largest=_LARGEST)
        elif grad is not None and number is not None and number != note.item():
            # What is written is not what autograd saved for a second use: its version stays.
            with _unsafe_preserve_version_counter(grad):
                grad.mul_(number / note.item())


def _register(name: str) -> Family:
    inner = KINDS[name].family
    sources = ("inputs", "targets", "linear_weight", "linear_bias")
    others = [(field, Any) for field in inner.operands._fields if field not in sources]  # type: ignore[attr-defined]
    operands = NamedTuple("Operands", [*((source, Any) for source in sources), *others])  # type: ignore[misc]
    fields = {**get_type_hints(inner.spec), "logits_dtype": torch.dtype, "chunk": int}
    spec = NamedTuple("Spec", list(fields.items()))  # type: ignore[misc]

    def plain(spec: Any, operands: Any) -> Tensor:
        own, made, layer = _split(name, spec, operands)
        loss: Tensor = inner.plain(own, made._replace(inputs=logits(layer)))
        return loss

    def loss_shape(spec: Any, operands: Any) -> Shape:
        return inner.loss_shape(*_split(name, spec, operands)[:2])

    def saved_shapes(spec: Any, operands: Any) -> tuple[Shape | None, Shape | None, Shape | None]:
        return None, None, None  # a compiled backward counts once more

    return register(
        Family(
            f"linear_{name}",
            spec,
            operands,
            plain,
            _forward_of(name),
            _backward_of(name),
            loss_shape,
            saved_shapes,
            sources=sources,
            whole=True,
        )
    )


LINEAR = {name: _register(name) for name in KINDS}
