"""The commonest losses of hard labels once more, in as few passes as we know, for the blocks of a large batch on a CPU.

There a cheap operation costs what it moves, and twice that where its result goes to memory that was allocated for it,
which is cold: so everything is written over what is done with. The mathematics is that of ``formulas``.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .sigmoid import Operands, Spec

_LOG2_E = math.log2(math.e)
# Of alpha and 1 - alpha one is made from the other, which loses digits of a small one.
_LEAST_ALPHA = 0.1
# Whose powers of a probability are one product. p as 1 - q costs the slope 0.9e-6 times gamma.
_GAMMAS = (1.0, 2.0)


class Losses(NamedTuple):
    """Of a block."""

    values: Tensor  # in the room
    times: float  # what the losses are to be multiplied by to be the values
    total: Tensor  # [], of the losses


class Room:
    """Memory that the blocks of one call share: what is computed of one is there until the next one's."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size], Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        """A place in float32, in the shape of a tensor."""
        key = name, like.shape
        if key not in self._views:
            memory = self._memory.get(name)
            if memory is None or memory.numel() < like.numel():
                memory = self._memory[name] = torch.empty(like.numel(), device=like.device)
            self._views[key] = memory[: like.numel()].view(like.shape)
        return self._views[key]

    def in_float(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float32 else self.of(name, tensor).copy_(tensor)


def is_served(spec: Spec, operands: Operands, scale: float | Tensor) -> bool:
    """Whether :func:`elementwise` has a loss, with such options."""
    options = (operands.alpha, operands.weight, operands.pos_weight, operands.sample_weight, operands.mask)
    return (
        (spec.formula == "bce" or (spec.formula == "focal" and spec.params[0] in _GAMMAS))
        and (spec.alpha is None or _LEAST_ALPHA <= spec.alpha <= 1 - _LEAST_ALPHA)
        and not spec.smoothing
        and spec.ignored is None
        and all(option is None for option in options)
        and isinstance(scale, float)
        and math.isfinite(scale)
        and spec.compute_dtype == torch.float32
        and operands.inputs.device.type == "cpu"
        and all(type(tensor) in (Tensor, Parameter, NoneType) for tensor in (operands.inputs, operands.targets))
    )


def elementwise(
    spec: Spec,
    operands: Operands,
    room: Room,
    *,
    scale: float,
    upstream: float | None,
    others: Tensor | None,
    out: Tensor | None,
) -> Losses | None:
    """As ``sigmoid.elementwise``, of targets that are 0 and 1, or not there if all are 0; ``out`` takes the slopes.

    Losses of the ``others``, counted row after row, are 0. None where these formulas do not hold: of a label between 0
    and 1, a loss that is not finite, or a logit so large that e to it is not.
    """
    x = room.in_float("x", operands.inputs)
    y = None if operands.targets is None else room.in_float("y", operands.targets)
    if y is not None and not _are_hard(spec, operands, y, room):
        return None
    v = x if y is None else _flip(x, y, room.of("v", x))
    values, q = _softplus_and_sigmoid(v, room, precise=operands.inputs.dtype == torch.float32)
    number = scale if spec.alpha is None else (1 - spec.alpha) * scale
    factor: Tensor | float = number
    times = 1.0
    if spec.formula == "focal":
        (gamma,) = spec.params
        factor = _times_power(q, gamma, number, room.of("factor", x))
        if y is not None and spec.alpha is not None:
            torch.addcmul(factor, factor, y, value=spec.alpha / (1 - spec.alpha) - 1, out=factor)
        times = gamma if out is not None else 1.0
        _multiply(values, factor, times)
    else:
        values.mul_(factor)
    if others is not None:
        values.put_(others, values.new_zeros(others.shape))
    total = values.sum()
    if not math.isfinite(total.item()):
        return None
    if out is not None:
        has_place = out.dtype == x.dtype
        last = out if has_place and y is None else room.of("v", x)
        slope = torch.mul(q, factor, out=last) if isinstance(factor, float) else torch.lerp(values, factor, q, out=last)
        if y is not None:
            slope = _flip(slope, y, out if has_place else slope)
        if upstream is not None and upstream != 1:
            slope.mul_(upstream)
        if slope is not out:
            out.copy_(slope)
    return Losses(values, times, total / times)


def _are_hard(spec: Spec, operands: Operands, y: Tensor, room: Room) -> bool:
    if spec.soft is not None or not cast(Tensor, operands.targets).is_floating_point():
        return not spec.soft
    low, high = torch.addcmul(y, y, y, value=-1, out=room.of("factor", y)).aminmax()
    return bool(low.item() == high.item() == 0)


def _softplus_and_sigmoid(v: Tensor, room: Room, *, precise: bool) -> tuple[Tensor, Tensor]:
    """log(1 + e^v), infinite where e^v is, and e^v / (1 + e^v).

    A power of 2 and a logarithm take two thirds of softplus's time. They have half a unit in the last place of the
    exponent as an error, 4e-6 of e^v at most; a power of sigmoid(v) would have a multiple of it, so that where it is to
    be ``precise`` it is torch's.
    """
    exponential = torch.mul(v, _LOG2_E, out=room.of("loss", v)).exp2_()
    q = room.of("q", v)
    if precise:
        torch.sigmoid(v, out=q)
    else:
        torch.div(exponential, torch.add(exponential, 1, out=q), out=q)
    return exponential.log1p_(), q


def _flip(values: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """values where y is 0 and -values where it is 1, which is exact of finite values."""
    return torch.addcmul(values, values, y, value=-2, out=out)


def _times_power(q: Tensor, gamma: float, number: float, out: Tensor) -> Tensor:
    """number * q ** gamma."""
    return torch.addcmul(q.new_zeros(()), q, q, value=number, out=out) if gamma == 2 else torch.mul(q, number, out=out)


def _multiply(values: Tensor, factor: Tensor, number: float) -> None:
    """In one pass."""
    if number == 1:
        values.mul_(factor)
    else:
        torch.addcmul(values.new_zeros(()), values, factor, value=number, out=values)
