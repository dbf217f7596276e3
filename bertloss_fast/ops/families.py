"""What a family of losses has for the routes through autograd: sigmoid.py and rowwise.py each have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..reference.sigmoid import Operands, Spec
from .upstream import Expected


class Saved(NamedTuple):
    """What forward leaves for backward, beside the operands."""

    grad: Tensor | None = None  # written in forward, for the upstream in the note
    note: Tensor | None = None  # []; None for 1
    denominator: Tensor | None = None  # where data tell it: [], or in two-way those of rows and of columns
    row_slopes: Tensor | None = None  # rowwise: [4, N]
    col_slopes: Tensor | None = None  # two-way: [4, L]


Shape = tuple[int, ...]


class Family(NamedTuple):
    """A family's code."""

    name: str

    plain: Callable[[Spec, Operands], Tensor]
    """The loss as differentiable operations, on dense targets."""

    forward: Callable[[str, Spec, Operands, Expected | None, bool], tuple[Tensor, Saved]]
    """The loss by a backend, and what backward needs: the gradient too, if it is wanted, for the upstream expected."""

    backward: Callable[[str, Spec, Operands, Saved, Tensor, Expected | None], Tensor]
    """The gradient of the inputs; ``Saved.grad`` may become it. What came is left in the place of what was expected."""

    loss_shape: Callable[[Spec, Operands], Shape]

    saved_shapes: Callable[[Spec, Operands], tuple[Shape | None, Shape | None, Shape | None]]
    """Of ``Saved``'s denominator and slopes; None for what a call does not have."""


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    FAMILIES[family.name] = family
    return family
