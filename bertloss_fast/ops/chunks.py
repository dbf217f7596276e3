"""The logits of a linear layer chunk by chunk, with the loss of each and its derivative.

The sigmoid does not couple labels, so there a chunk is some labels of every row; of softmax it is some rows with all
their classes. Either way the family's own code gives loss and derivative, in the logits' place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import sigmoid as of_labels
from ..reference import softmax as of_classes
from . import sigmoid, softmax
from .blocks import block_size
from .families import Family, Saved, Wanted
from .operands import as_matrices, cut_matrices, with_dense_targets
from .passes import denominator
from .sparse import by_chunk


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
_ON_CPU, _ON_GPU = 2, 2**23
_FEWEST_LABELS, _FEWEST_ROWS = 256, 128


def walk(
    name: str,
    backend: str,
    spec: Any,
    operands: Any,
    layer: Layer,
    upstreams: Tensor | None = None,
    *,
    with_slope: bool = True,
    all_rows: bool = False,
) -> Walk:
    """Loss and slope of each chunk; or with ``upstreams``, of the losses' shape, the slope alone, times these.

    ``operands`` have a tensor of their shape in the logits' place. What a chunk holds is overwritten by the next one.
    """
    kind = KINDS[name]
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
    return backend != "triton" and layer.inputs.device.type == "cpu"


def logit_chunks(layer: Layer) -> Iterator[tuple[slice, Tensor]]:
    """The logits [N, labels] of some labels after others, without a graph."""
    inputs = layer.inputs.detach().reshape(-1, layer.inputs.shape[-1]).to(layer.logits_dtype)
    for labels in _slices(len(layer.linear_weight), labels_at_a_time(layer, max(len(inputs), 1)).labels):
        weight = layer.linear_weight.detach()[labels].to(layer.logits_dtype)
        bias = None if layer.linear_bias is None else layer.linear_bias.detach()[labels].to(layer.logits_dtype)
        yield labels, F.linear(inputs, weight, bias)


def num_rows(layer: Layer) -> int:
    return layer.inputs.shape[:-1].numel()


def labels_at_a_time(layer: Layer, num_rows: int) -> Steps:
    """Of labels that stand for themselves: a power of two, so that few kernels are compiled, and products aligned."""
    size, (num_labels, num_features) = _chunk_size(layer), layer.linear_weight.shape
    # What a chunk of the weight's gradient takes counts too.
    most = max(size // max(num_rows, num_features, 1), _FEWEST_LABELS)
    step = min(layer.chunk or 1 << (most.bit_length() - 1), max(num_labels, 1))
    return Steps(min(max(size // step, _FEWEST_ROWS), num_rows), step)


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
    if backend != "triton":  # whose kernels alone find where they begin; a GPU waits
        col = col[int(crow[0]) : int(crow[-1])]
        crow = crow - crow[0]
    operands = operands._replace(crow=crow, col=col)
    return with_dense_targets(operands) if backend == "inductor" else operands


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
    if of_classes.counts_weights(spec, operands) and of_classes.is_counted(spec, operands):
        # A mean over weights: they take on what sets it apart from a mean over rows, which is that of z_loss.
        weight = cast(Tensor, operands.weight).to(spec.compute_dtype) * (divided.of_z / divided.of_losses)
        operands = operands._replace(weight=weight)
    return _of_a_chunk(spec), operands, divided.of_z


KINDS = {
    "sigmoid": _Kind(sigmoid.FAMILY, labels_at_a_time, _cut_labels, _prepare_labels),
    "softmax": _Kind(softmax.FAMILY, _rows_at_a_time, _cut_rows, _prepare_classes),
}
