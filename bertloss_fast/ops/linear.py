"""A linear layer and its loss in one: the logits are made, used and forgotten chunk by chunk.

With z = x W^T + b and g = dloss/dz of a chunk, the gradients are g W of the inputs, g^T x of the weight, and sums of g
of the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import functional as F

from . import dispatch
from .autograd import compute_loss
from .chunks import KINDS, Chunk, Layer, is_on_host, labels_at_a_time, num_rows, walk
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.passes import rescale_launcher


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


def linear_step(call: Call, update: Callable[[slice, Tensor, Tensor | None], None]) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in the inputs in the dtype of the computation.

    The gradients of weight and bias go to ``update``, some labels at a time, and are nowhere held as a whole.
    """
    spec, layer = call.spec, call.layer
    layer = layer._replace(inputs=layer.inputs.detach())
    if not call.operands.inputs.numel():
        return layer.inputs.new_zeros((), dtype=spec.loss_dtype), torch.zeros_like(
            layer.inputs, dtype=spec.compute_dtype
        )
    with torch.no_grad(), _without_autocast(layer):
        # All rows in one chunk: a label is updated once.
        layer = layer._replace(chunk=layer.chunk or labels_at_a_time(layer, num_rows(layer)).labels)
        way = walk(call.family, call.backend, spec, call.operands, layer, all_rows=True)
        scale = scale_of(way.denominator, None, on_host=is_on_host(call.backend, layer))
        products = Products(layer, spec, scale, Wanted(inputs=True), in_one=True)
        losses = _Losses(call.family, spec, call.operands)
        for chunk in way.chunks:
            losses.add(chunk)
            products.add(chunk)  # before the weight is another
            slope = cast(Tensor, chunk.slope)
            of_bias = None if layer.linear_bias is None else slope.sum(0, dtype=spec.compute_dtype) * scale
            update(chunk.labels, matmul(slope.t(), chunk.inputs, spec.compute_dtype) * scale, of_bias)
        return losses.reduced(way.denominator), cast(Tensor, products.sums_of_inputs())


def _split(name: str, spec: Any, operands: Any) -> tuple[Any, Any, Layer]:
    """The family's own spec and operands, with a tensor of the logits' shape that takes no memory; and the layer."""
    family, fields = KINDS[name].family, operands._asdict()
    layer = Layer(fields["inputs"], fields.pop("linear_weight"), fields.pop("linear_bias"), *spec[-2:])
    shape = (*layer.inputs.shape[:-1], len(layer.linear_weight))
    fields["inputs"] = layer.inputs.new_empty((), dtype=layer.logits_dtype).expand(shape)
    return family.spec(*spec[:-2]), family.operands(**fields), layer


def logits(layer: Layer) -> Tensor:
    """All of them, as differentiable operations."""
    dtype, bias = layer.logits_dtype, layer.linear_bias
    bias = None if bias is None else bias.to(dtype)
    return F.linear(layer.inputs.to(dtype), layer.linear_weight.to(dtype), bias)


class Products:
    """The layer's gradients, ``scale`` times what the chunks add up to."""

    def __init__(self, layer: Layer, spec: Any, scale: float | Tensor, wanted: Wanted, *, in_one: bool) -> None:
        self._scale, self._compute_dtype, self._layer = scale, spec.compute_dtype, layer
        inputs, weight, bias = layer[:3]
        rows = inputs.reshape(-1, inputs.shape[-1])
        # Sums of several chunks are added up in the dtype of the computation.
        one_chunk = {} if in_one else {"dtype": spec.compute_dtype}
        self._of_inputs = rows.new_empty(rows.shape, dtype=spec.compute_dtype) if wanted.inputs else None
        self._of_weight = weight.new_empty(weight.shape, **one_chunk) if wanted.linear_weight else None
        self._of_bias = cast(Tensor, bias).new_empty(len(weight), **one_chunk) if wanted.linear_bias else None

    def add(self, chunk: Chunk) -> None:
        if self._of_inputs is not None:
            self._write(self._of_inputs[chunk.rows], *chunk.product(False), added=chunk.labels.start > 0)
        if self._of_weight is not None:
            self._write(self._of_weight[chunk.labels], *chunk.product(True), added=chunk.rows.start > 0)
        if self._of_bias is not None:
            total = cast(Tensor, chunk.slope).sum(0, dtype=self._compute_dtype) * self._scale
            of_labels = self._of_bias[chunk.labels]
            of_labels.copy_(of_labels + total if chunk.rows.start > 0 else total)

    def _write(self, out: Tensor, a: Tensor, b: Tensor, *, added: bool) -> None:
        if not isinstance(self._scale, Tensor) and out.dtype == a.dtype == self._compute_dtype:
            torch.addmm(out, a, b, beta=float(added), alpha=self._scale, out=out)
            return
        product = matmul(a, b, self._compute_dtype) * self._scale
        out.copy_(out + product if added else product)

    def sums_of_inputs(self) -> Tensor | None:
        """That of the inputs, in the dtype of the computation."""
        return None if self._of_inputs is None else self._of_inputs.view(self._layer.inputs.shape)

    def gradients(self) -> Gradients:
        inputs, weight, bias = self._layer[:3]
        sums = self.sums_of_inputs()
        of_inputs = None if sums is None else sums.to(inputs.dtype)
        of_weight = None if self._of_weight is None else self._of_weight.to(weight.dtype)
        of_bias = None if self._of_bias is None else self._of_bias.to(cast(Tensor, bias).dtype)
        return Gradients(of_inputs, linear_weight=of_weight, linear_bias=of_bias)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product of the operands' dtype, not rounded to it."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def scale_of(count: int | Tensor, upstream: Tensor | None, *, on_host: bool) -> float | Tensor:
    """What multiplies the gradients: a number where a look is free."""
    if on_host:
        return _number(upstream) / _number(count)
    return (1.0 if upstream is None else upstream) / count


def _number(value: int | Tensor | None) -> float:
    if value is None:
        return 1.0
    return float(value.item() if isinstance(value, Tensor) else value)


def _forward_of(name: str) -> Callable[..., tuple[Tensor, Saved]]:
    def forward(
        backend: str, spec: Any, operands: Any, expected: Expected | None, wanted: Wanted
    ) -> tuple[Tensor, Saved]:
        own, made, layer = _split(name, spec, operands)
        note = None if expected is None else expected.value
        if note is not None and backend == "triton":
            note = note.clone()  # a kernel writes into the memory
        with _without_autocast(layer):
            way = walk(name, backend, own, made, layer, with_slope=any(wanted))
            scale = scale_of(way.denominator, note, on_host=is_on_host(backend, layer))
            products = Products(layer, own, scale, wanted, in_one=way.in_one)
            losses = _Losses(name, own, made)
            for chunk in way.chunks:
                losses.add(chunk)
                products.add(chunk)
            return losses.reduced(way.denominator), Saved(products.gradients(), note=note)

    return forward


def _without_autocast(layer: Layer) -> Any:
    """What autocast asks for is in the logits' dtype."""
    return torch.autocast(layer.inputs.device.type, enabled=False)


class _Losses:
    """Of the chunks, together."""

    def __init__(self, name: str, spec: Any, operands: Any) -> None:
        self._sums: list[Tensor] = []
        self._dtype: torch.dtype = spec.loss_dtype
        self._each: Tensor | None = None
        if spec.reduction == "none":
            shape = KINDS[name].family.loss_shape(spec, operands)
            self._each = operands.inputs.new_empty(shape, dtype=spec.loss_dtype)
            self._by_row = self._each.view(-1, shape[-1]) if name == "sigmoid" else self._each.view(-1, 1)

    def add(self, chunk: Chunk) -> None:
        loss = cast(Tensor, chunk.loss)
        if self._each is None:
            self._sums.append(loss)
        elif loss.dim() == 2:
            self._by_row[chunk.rows, chunk.labels] = loss
        else:
            self._by_row[chunk.rows, 0] = loss

    def reduced(self, count: int | Tensor) -> Tensor:
        if self._each is not None:
            return self._each
        total: Tensor = torch.stack(self._sums).sum() / count
        return total.to(self._dtype)


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
        on_host = is_on_host(backend, layer)
        written = any(grad is not None for grad in saved.grads)
        each: Tensor | None = None
        if any(upstream.stride()):
            each = upstream.reshape(-1, upstream.shape[-1]) if name == "sigmoid" else upstream.reshape(-1)
        came = upstream.as_strided((), ())
        number = number_that_came(came, expected) if on_host and each is None else None
        # What is computed once more takes the way that forward's took, and ends with the same bits.
        from_note = own.reduction != "none" and (not on_host or _can_rescale(saved.note, cast(float, number), layer))
        grads = saved.grads
        if not (written and from_note):
            scale = None if each is not None else saved.note if from_note else came.to(own.compute_dtype)
            if each is None and own.reduction == "none":  # one value for all
                own = own._replace(reduction="sum")
            grads = _gradients(name, backend, own, made, layer, each, scale, wanted)
        if from_note:
            _rescale(grads, saved.note, came, number, expected)
        return grads

    return backward


def _gradients(
    name: str,
    backend: str,
    spec: Any,
    operands: Any,
    layer: Layer,
    each: Tensor | None,
    upstream: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """For an upstream, or one of ``each`` loss."""
    with _without_autocast(layer):
        way = walk(name, backend, spec, operands, layer, each, with_loss=False)
        scale = scale_of(way.denominator, upstream, on_host=is_on_host(backend, layer))
        products = Products(layer, spec, scale, wanted, in_one=way.in_one)
        for chunk in way.chunks:
            products.add(chunk)
        return products.gradients()


def _can_rescale(note: Tensor | None, number: float, layer: Layer) -> bool:
    """Whether gradients for the upstream in the note can be made those of another and lose nothing."""
    written = _number(note)
    if number == written:
        return True
    if not math.isfinite(written) or written == 0:
        return False
    in_16_bits = any(tensor is not None and tensor.element_size() == 2 for tensor in layer[:3])
    return not in_16_bits or abs(math.frexp(number / written)[0]) == 0.5


def _rescale(
    grads: Gradients, note: Tensor | None, came: Tensor, number: float | None, expected: Expected | None
) -> None:
    """Gradients for the upstream in the note as those of the one that came."""
    memory = None if expected is None else expected.value
    for grad in grads:
        if grad is not None and number is None:
            rescale_launcher(grad, came, note, memory)
        elif grad is not None and number != _number(note):
            # What is written is not what autograd saved for a second use: its version stays.
            with _unsafe_preserve_version_counter(grad):
                grad.mul_(cast(float, number) / _number(note))


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
