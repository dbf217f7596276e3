"""The operands of a call as matrices, whole or in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from ..reference.sigmoid import Operands
from .blocks import Block, blocks
from .sparse import dense, dense_blocks


def is_plain(tensor: Tensor) -> bool:
    """A tensor on the CPU itself, whose memory any operation may be pointed at; no subclass that wraps some."""
    return type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu"


def with_dense_targets(operands: Operands) -> Operands:
    if operands.crow is None or operands.col is None:
        return operands
    targets = dense(operands.crow, operands.col, operands.inputs.shape)
    return operands._replace(targets=targets, crow=None, col=None)


def rows_and_labels(inputs: Tensor) -> tuple[int, int]:
    """[..., L] as [N, L]; a single logit is a row of one label."""
    num_labels = inputs.shape[-1] if inputs.dim() else 1
    return inputs.numel() // max(num_labels, 1), num_labels


def as_matrix(tensor: Tensor | None, inputs: Tensor) -> Tensor | None:
    """What broadcasts to the inputs as [N, L], by a view wherever strides allow one."""
    if tensor is None:
        return None
    matrix = tensor.expand(inputs.shape).reshape(rows_and_labels(inputs))
    return matrix.resolve_neg()  # a negation that torch has put off


def as_matrices(operands: Operands) -> Operands:
    """Every operand as [N, L], [N] or [L], by views wherever strides allow them."""
    rows, num_labels = rows_and_labels(operands.inputs)

    def matrix(tensor: Tensor | None) -> Tensor | None:
        return as_matrix(tensor, operands.inputs)

    def by_label(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(num_labels).resolve_neg()

    def by_row(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(rows).resolve_neg()

    return operands._replace(
        inputs=cast(Tensor, matrix(operands.inputs)),
        targets=matrix(operands.targets),
        alpha=by_label(operands.alpha),
        weight=matrix(operands.weight),
        pos_weight=by_label(operands.pos_weight),
        sample_weight=by_row(operands.sample_weight),
        mask=matrix(operands.mask),
        by_row=by_row(operands.by_row),
    )


def parts(operands: Operands) -> Iterator[tuple[Block, Operands]]:
    """The blocks of a call, and the operands' parts that they cut out."""
    operands = as_matrices(operands)
    places = list(blocks(operands.inputs))
    if operands.crow is None or operands.col is None:
        for place in places:
            yield place, cut_matrices(operands, *place)
        return
    targets = dense_blocks(operands.crow, operands.col, operands.inputs.shape[1], places)
    for place, of_place in zip(places, targets, strict=True):
        yield place, cut_matrices(operands, *place)._replace(targets=of_place, crow=None, col=None)


def cut_matrices(operands: Operands, rows: slice, labels: slice) -> Operands:
    """Some rows and labels of operands that are matrices; labels in CSR stay whole."""

    def cut(tensor: Tensor | None, *places: slice) -> Tensor | None:
        return None if tensor is None else tensor[places]

    return operands._replace(
        inputs=operands.inputs[rows, labels],
        targets=cut(operands.targets, rows, labels),
        alpha=cut(operands.alpha, labels),
        weight=cut(operands.weight, rows, labels),
        pos_weight=cut(operands.pos_weight, labels),
        sample_weight=cut(operands.sample_weight, rows),
        mask=cut(operands.mask, rows, labels),
        by_label=cut(operands.by_label, slice(None), labels),
        by_row=cut(operands.by_row, rows),
        places=None,
    )


def single_elements(operands: Operands, rows: Tensor, labels: Tensor) -> Operands:
    """Elements of operands that are matrices, each as a row of one label; labels in CSR are taken for theirs."""

    def of_element(matrix: Tensor | None) -> Tensor | None:
        return None if matrix is None else matrix[rows, labels].unsqueeze(1)

    def of_label(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[..., labels].unsqueeze(-1)

    def of_row(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[rows]

    inputs = operands.inputs[rows, labels].unsqueeze(1)
    return operands._replace(
        inputs=inputs,
        targets=torch.ones_like(inputs) if operands.targets is None else of_element(operands.targets),
        crow=None,
        col=None,
        alpha=of_label(operands.alpha),
        weight=of_element(operands.weight),
        pos_weight=of_label(operands.pos_weight),
        sample_weight=of_row(operands.sample_weight),
        mask=of_element(operands.mask),
        by_label=of_label(operands.by_label),
        by_row=of_row(operands.by_row),
        places=None,
    )
