"""Operands of a kernel that goes through [N, L] matrices in flat tiles."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import load_as


class Matrix(NamedTuple):
    """An [N, L] matrix of any strides; None stands for 0, and in the place of both for those of contiguous rows."""

    pointer: Any
    strides: Any


class Place(NamedTuple):
    """The elements of a tile."""

    start: Any  # where each row begins: added to a pointer alone, it needs no register a thread. None for 0
    offs: Any
    row: Any  # None when no operand needs row and column
    col: Any
    valid: Any  # None when all are within the matrix
    num_labels: Any


def matrix(tensor: Tensor | None) -> Matrix | None:
    """A tensor [N, L] as a kernel takes it; vectors come expanded."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    if tensor.is_contiguous():
        return Matrix(tensor, None)
    return Matrix(tensor, tuple(stride or None for stride in tensor.stride()))


def extent(tensor: Tensor) -> int:
    """The offset of a tensor's last element."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@triton.jit
def pointers_to(pointer, place):
    """Where the elements of a contiguous matrix lie, which load in full vectors."""
    if place.start is None:
        return pointer + place.offs
    else:
        return pointer + place.start + place.offs


@triton.jit
def _pointers(matrix, place):
    if matrix.strides is None:
        return pointers_to(matrix.pointer, place)
    else:
        pointers = matrix.pointer + tl.zeros_like(place.offs)
        if matrix.strides[0] is not None:
            pointers += place.row * matrix.strides[0]
        if matrix.strides[1] is not None:
            pointers += place.col * matrix.strides[1]
        return pointers


@triton.jit
def load(matrix, place, other, dtype):
    """Elements of a tile, widened to the dtype of the computation unless that is None."""
    if dtype is None:
        return tl.load(_pointers(matrix, place), place.valid, other)
    else:
        return load_as(_pointers(matrix, place), place.valid, other, dtype)


@triton.jit
def load_product(factors, place, other, dtype):
    """The product of several matrices' elements; None where there are none."""
    product = None
    for i in tl.static_range(len(factors)):
        factor = load(factors[i], place, other, dtype)
        product = factor if product is None else product * factor
    return product
