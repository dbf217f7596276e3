"""What the chunks of a layer add up to: its gradients, and the loss."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .chunks import KINDS, Chunk, Layer
from .families import Gradients, Wanted


class Products:
    """The layer's gradients, ``scale`` times what the chunks add up to.

    They are kept in the dtype of the computation, in which another factor can still be multiplied in; only that of a
    bfloat16 weight, which has the same range, is rounded at once.
    """

    def __init__(self, layer: Layer, spec: Any, scale: float | Tensor, wanted: Wanted, *, in_one: bool) -> None:
        self._scale, self._dtype, self._layer = scale, spec.compute_dtype, layer
        inputs, weight, bias = layer[:3]
        of_weight = weight.dtype if in_one and weight.dtype == torch.bfloat16 else self._dtype
        rows = inputs.reshape(-1, inputs.shape[-1])
        self._of_inputs = rows.new_empty(rows.shape, dtype=self._dtype) if wanted.inputs else None
        self._of_weight = weight.new_empty(weight.shape, dtype=of_weight) if wanted.linear_weight else None
        self._of_bias = cast(Tensor, bias).new_empty(len(weight), dtype=self._dtype) if wanted.linear_bias else None

    def add(self, chunk: Chunk) -> None:
        slope = chunk.slope
        if slope is None:
            return
        if self._of_inputs is not None:
            self._write(self._of_inputs[chunk.rows], slope, chunk.weight, added=chunk.labels.start > 0)
        if self._of_weight is not None:
            self._write(self._of_weight[chunk.labels], slope.t(), chunk.inputs, added=chunk.rows.start > 0)
        if self._of_bias is not None:
            total = slope.sum(0, dtype=self._dtype) * self._scale
            of_labels = self._of_bias[chunk.labels]
            of_labels.copy_(of_labels + total if chunk.rows.start > 0 else total)

    def _write(self, out: Tensor, a: Tensor, b: Tensor, *, added: bool) -> None:
        if not isinstance(self._scale, Tensor) and out.dtype == a.dtype == self._dtype:
            torch.addmm(out, a, b, beta=float(added), alpha=self._scale, out=out)
            return
        product = matmul(a, b, self._dtype) * self._scale
        out.copy_(out + product if added else product)

    def kept(self) -> Gradients:
        of_inputs = None if self._of_inputs is None else self._of_inputs.view(self._layer.inputs.shape)
        return Gradients(of_inputs, linear_weight=self._of_weight, linear_bias=self._of_bias)


def rounded(kept: Gradients, layer: Layer) -> Gradients:
    """Of the layer's dtypes."""
    owners = (layer.inputs, None, layer.linear_weight, layer.linear_bias)
    pairs = zip(kept, owners, strict=True)
    return Gradients(*(None if grad is None else grad.to(cast(Tensor, owner).dtype) for grad, owner in pairs))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product in a dtype at least as wide as the operands'."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda" and a.element_size() == 2 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def scale_of(denominator: int | Tensor, upstream: Tensor | None, *, on_host: bool) -> float | Tensor:
    """What multiplies the gradients: a number where a look is free."""
    if not on_host:
        return (1.0 if upstream is None else upstream) / denominator
    divisor = number_of(denominator)
    return number_of(upstream) / divisor if divisor else math.inf


def number_of(value: int | Tensor | None) -> float:
    """1 where there is none."""
    if value is None:
        return 1.0
    return float(value.item() if isinstance(value, Tensor) else value)


class Losses:
    """Those of the chunks, together."""

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

    def reduced(self, denominator: int | Tensor) -> Tensor:
        if self._each is not None:
            return self._each
        total: Tensor = torch.stack(self._sums).sum() / denominator
        return total.to(self._dtype)
