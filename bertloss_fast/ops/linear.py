"""A linear layer and its loss in one: the logits are made, used and forgotten chunk by chunk.

With z = x W^T + b and g = dloss/dz of a chunk, the gradients are g W of the inputs, g^T x of the weight, and sums of g
of the bias. The sigmoid does not couple labels, so there a chunk is some labels of every row; of softmax it is some
rows with all their classes. Either way the family's own code gives loss and g, in the logits' place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import functional as F

from ..reference import sigmoid as of_labels
from ..reference import softmax as of_classes
from . import dispatch, sigmoid, softmax
from .autograd import compute_loss
from .blocks import block_size
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .operands import as_matrices, cut_matrices
from .passes import denominator
from .sparse import by_chunk, dense_block
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.passes import rescale_launcher


class Layer(NamedTuple):
    """What the logits are made of, and how."""

    inputs: Tensor  # [..., D]
    linear_weight: Tensor  # [L, D]
    linear_bias: Tensor | None  # [L]
    logits_dtype: torch.dtype
    chunk: int  # labels, or rows, at a time; 0 for as many as the cache holds


class Part(NamedTuple):
    """Some rows and labels of a call."""

    rows: slice
    labels: slice
    operands: Any  # of the family, with no logits yet


class Chunk(NamedTuple):
    """What a part of the call gave."""

    rows: slice
    labels: slice
    inputs: Tensor  # [rows, D]
    weight: Tensor  # [labels, D]
    loss: Tensor | None  # the sum of the losses, or each; None where only the slope is asked for
    slope: Tensor | None  # [rows, labels]: the derivative of that sum in the logits

    def product(self, of_weight: bool) -> tuple[Tensor, Tensor]:
        """The factors of the gradient of the weight, or else of the inputs."""
        slope = cast(Tensor, self.slope)
        return (slope.t(), self.inputs) if of_weight else (slope, self.weight)


class Steps(NamedTuple):
    """How many rows and labels a chunk has."""

    rows: int
    labels: int


class Walk(NamedTuple):
    """A way through a call."""

    denominator: int | Tensor  # by which the sum of the losses is divided
    in_one: bool  # whether every chunk has all rows
    chunks: Iterator[Chunk]


class _Kind(NamedTuple):
    """What a family is to the layer."""

    family: Family
    steps: Callable[[Layer, int], Steps]
    cut: Callable[[Any, Layer, int, Steps, str], Iterator[Part]]
    prepare: Callable[[Any, Any, str], tuple[Any, Any, int | Tensor]]
    """What a chunk is, operands that are matrices, and what the sum of the losses is divided by."""


# Logits at a time. On the CPU a chunk, its block of losses and what they are made of stay in a core's cache; on a GPU a
# chunk and its targets stay in the L2 cache. Both sides of a product are to be long enough for its speed.
_ON_CPU, _ON_GPU = 4, 2**23
_FEWEST_LABELS, _FEWEST_ROWS = 256, 128


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
        layer = layer._replace(chunk=layer.chunk or _labels_at_a_time(layer, _num_rows(layer)).labels)
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


def logit_chunks(layer: Layer) -> Iterator[tuple[slice, Tensor]]:
    """The logits [N, labels] of some labels after others, without a graph."""
    inputs = layer.inputs.detach().reshape(-1, layer.inputs.shape[-1]).to(layer.logits_dtype)
    for labels in _slices(len(layer.linear_weight), _labels_at_a_time(layer, max(len(inputs), 1)).labels):
        weight = layer.linear_weight.detach()[labels].to(layer.logits_dtype)
        bias = None if layer.linear_bias is None else layer.linear_bias.detach()[labels].to(layer.logits_dtype)
        yield labels, F.linear(inputs, weight, bias)


def _num_rows(layer: Layer) -> int:
    return layer.inputs.shape[:-1].numel()


def _split(name: str, spec: Any, operands: Any) -> tuple[Any, Any, Layer]:
    """The family's own spec and operands, with a tensor of the logits' shape that takes no memory; and the layer."""
    family, fields = _KINDS[name].family, operands._asdict()
    layer = Layer(fields["inputs"], fields.pop("linear_weight"), fields.pop("linear_bias"), *spec[-2:])
    shape = (*layer.inputs.shape[:-1], len(layer.linear_weight))
    fields["inputs"] = layer.inputs.new_empty((), dtype=layer.logits_dtype).expand(shape)
    return family.spec(*spec[:-2]), family.operands(**fields), layer


def logits(layer: Layer) -> Tensor:
    """All of them, as differentiable operations."""
    dtype, bias = layer.logits_dtype, layer.linear_bias
    bias = None if bias is None else bias.to(dtype)
    return F.linear(layer.inputs.to(dtype), layer.linear_weight.to(dtype), bias)


def walk(
    name: str,
    backend: str,
    spec: Any,
    operands: Any,
    layer: Layer,
    upstreams: Tensor | None = None,
    *,
    with_loss: bool = True,
    with_slope: bool = True,
    all_rows: bool = False,
) -> Walk:
    """Loss and slope of each chunk; ``upstreams``, of the losses' shape, multiply the slope.

    ``operands`` have a tensor of their shape in the logits' place. What a chunk holds is overwritten by the next one.
    """
    kind = _KINDS[name]
    spec, operands, count = kind.prepare(spec, operands, backend)
    inputs = layer.inputs.reshape(-1, layer.inputs.shape[-1])
    # Products of 16 bits are fast on a GPU, and not always on a CPU, where the eager code widens them anyway.
    dtype = spec.compute_dtype if is_on_host(backend, layer) else layer.logits_dtype
    inputs = inputs.to(dtype)
    steps = kind.steps(layer, len(inputs))
    steps = Steps(len(inputs), steps.labels) if all_rows else steps
    room = inputs.new_empty(steps.rows * steps.labels)

    def chunk(rows: slice, labels: slice, part: Any) -> Chunk:
        weight = layer.linear_weight[labels].to(dtype)
        bias = None if layer.linear_bias is None else layer.linear_bias[labels].to(dtype)
        of_rows = inputs[rows]
        made = room[: len(of_rows) * len(weight)].view(len(of_rows), len(weight))
        part = part._replace(inputs=_linear(of_rows, weight, bias, made))
        loss, slope = None, None
        if upstreams is None:
            loss, saved = kind.family.forward(backend, spec, part, None, Wanted(with_slope), made)
            slope = saved.grads.inputs
        else:
            if with_loss:
                loss, _ = kind.family.forward(backend, spec, part, None, Wanted())
            of_part = upstreams[rows, labels] if upstreams.dim() == 2 else upstreams[rows]
            slope = kind.family.backward(backend, spec, part, Saved(), of_part, None, Wanted(inputs=True)).inputs
        return Chunk(rows, labels, of_rows, weight, loss, slope)

    parts = kind.cut(operands, layer, len(inputs), steps, backend)
    return Walk(count, steps.rows == len(inputs), (chunk(*part) for part in parts))


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(inputs, weight.t(), out=out)
    return torch.addmm(bias, inputs, weight.t(), out=out)


def is_on_host(backend: str, layer: Layer) -> bool:
    """Whether a look at a number costs nothing."""
    return backend == "eager" and layer.inputs.device.type == "cpu"


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


def _labels_at_a_time(layer: Layer, num_rows: int) -> Steps:
    """Of labels that stand for themselves."""
    num_labels = layer.chunk or max(_chunk_size(layer) // num_rows, _FEWEST_LABELS)
    num_labels = max(min(num_labels, len(layer.linear_weight)), 1)
    return Steps(min(max(_chunk_size(layer) // num_labels, _FEWEST_ROWS), num_rows), num_labels)


def _rows_at_a_time(layer: Layer, num_rows: int) -> Steps:
    """Of rows with all their classes. Each chunk reads the whole weight: a few rows would read little else."""
    num_classes = len(layer.linear_weight)
    return Steps(min(layer.chunk or max(_chunk_size(layer) // num_classes, _FEWEST_ROWS), num_rows), num_classes)


def _chunk_size(layer: Layer) -> int:
    return _ON_CPU * block_size(layer.inputs) if layer.inputs.device.type == "cpu" else _ON_GPU


def _cut_labels(
    operands: of_labels.Operands, layer: Layer, num_rows: int, steps: Steps, backend: str
) -> Iterator[Part]:
    num_labels = len(layer.linear_weight)
    sparse = None
    if operands.crow is not None and operands.col is not None:
        sparse = by_chunk(operands.crow, operands.col, num_labels, steps.labels)
    for rows in _slices(num_rows, steps.rows):
        for number, labels in enumerate(_slices(num_labels, steps.labels)):
            part = cut_matrices(operands, rows, labels)
            if sparse is not None:
                crow = sparse.crow[number, rows.start : rows.stop + 1]
                part = _with_labels(part, crow, sparse.col, backend)
            yield Part(rows, labels, part)


def _with_labels(operands: of_labels.Operands, crow: Tensor, col: Tensor, backend: str) -> of_labels.Operands:
    """Those between the ends of ``crow``."""
    if backend == "triton":
        return operands._replace(crow=crow, col=col)
    rows, labels = (slice(0, size) for size in operands.inputs.shape)
    return operands._replace(targets=dense_block(crow, col, rows, labels), crow=None, col=None)


def _cut_rows(operands: of_classes.Operands, layer: Layer, num_rows: int, steps: Steps, backend: str) -> Iterator[Part]:
    for rows in _slices(num_rows, steps.rows):
        yield Part(rows, slice(0, steps.labels), softmax.cut_rows(operands, rows))


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _of_a_chunk(spec: Any) -> Any:
    """Losses in the dtype of the computation, and of a reduced one their sum."""
    if spec.reduction == "none":
        return spec
    return spec._replace(reduction="sum", loss_dtype=spec.compute_dtype)


def _prepare_labels(
    spec: of_labels.Spec, operands: of_labels.Operands, backend: str
) -> tuple[of_labels.Spec, of_labels.Operands, int | Tensor]:
    count = denominator(spec, operands, backend)
    return _of_a_chunk(spec), as_matrices(operands._replace(normalizer=None)), count


def _prepare_classes(
    spec: of_classes.Spec, operands: of_classes.Operands, backend: str
) -> tuple[of_classes.Spec, of_classes.Operands, int | Tensor]:
    operands = softmax.as_rows(operands)
    divided = of_classes.denominators(spec, operands)
    operands = operands._replace(normalizer=None)
    if divided.of_z is not divided.of_losses and operands.weight is not None:
        # A mean over weights: they take on what sets it apart from a mean over rows, which is that of z_loss.
        weight = operands.weight.to(spec.compute_dtype) * (divided.of_z / divided.of_losses)
        operands = operands._replace(weight=weight)
    return _of_a_chunk(spec), operands, divided.of_z


_KINDS = {
    "sigmoid": _Kind(sigmoid.FAMILY, _labels_at_a_time, _cut_labels, _prepare_labels),
    "softmax": _Kind(softmax.FAMILY, _rows_at_a_time, _cut_rows, _prepare_classes),
}


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
        self._dtype, self._each = spec.loss_dtype, None
        if spec.reduction == "none":
            shape = _KINDS[name].family.loss_shape(spec, operands)
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
        return (torch.stack(self._sums).sum() / count).to(self._dtype)


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
    inner = _KINDS[name].family
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


LINEAR = {name: _register(name) for name in _KINDS}
