"""Binary cross-entropy and the focal loss of hard labels once more, in as few passes as we know: eager on the CPU.

The mathematics is that of ``reference/formulas.py``, which takes one and a half times as long (docs/measured.md). A
cheap operation's time is its memory traffic, and freshly allocated memory doubles it: so the blocks of a call share a
few places, and results overwrite what is no longer needed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..reference.formulas import LARGEST_GAMMA_BY_LERP
from ..reference.sigmoid import LEAST_ALPHA_OF_A_LINE, Operands, Spec
from .operands import is_plain

Slot = Literal["y", "q", "losses", "factor"]

_LOG2_E = math.log2(math.e)
# Where q ** gamma is one product.
_GAMMAS = (1.0, LARGEST_GAMMA_BY_LERP)


def has_few_passes(formula: str, params: tuple[float, ...], alpha: float | None) -> bool:
    """Binary cross-entropy without alpha, or a focal loss of products, whose alpha keeps its digits as a line in y."""
    if formula == "bce":
        return alpha is None
    is_line = alpha is None or LEAST_ALPHA_OF_A_LINE <= alpha <= 1 - LEAST_ALPHA_OF_A_LINE
    return formula == "focal" and params[0] in _GAMMAS and is_line


class Scratch:
    """Memory that the blocks of a call share: what is computed of one is there until the next one's."""

    def __init__(self) -> None:
        self._memory: dict[tuple[Slot, torch.dtype], Tensor] = {}
        # Of shapes that come again: two views for each slot of each block cost as much as two operations.
        self._views: dict[tuple[Slot, torch.dtype, torch.Size], Tensor] = {}

    def of(self, slot: Slot, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A place in the shape of a tensor."""
        key = slot, dtype, like.shape
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._new_view(slot, like, dtype)
        return view

    def _new_view(self, slot: Slot, like: Tensor, dtype: torch.dtype) -> Tensor:
        memory = self._memory.get((slot, dtype))
        if memory is not None and memory.numel() >= like.numel():
            return memory.view(-1)[: like.numel()].view(like.shape)
        self._memory[slot, dtype] = memory = torch.empty(like.shape, dtype=dtype, device=like.device)
        return memory


class FewPasses:
    """A loss, with the options of a call, that these formulas have; for its blocks."""

    def __init__(self, spec: Spec, scale: float, upstream: float | None, scratch: Scratch) -> None:
        self._of = scratch.of
        self._gamma = spec.params[0] if spec.formula == "focal" else None
        self._of_negative = scale if spec.alpha is None else (1 - spec.alpha) * scale
        # Of a positive's weight, which is negative, to a negative's.
        self._ratio_less_1 = -2.0 if spec.alpha is None else -spec.alpha / (1 - spec.alpha) - 1
        self._upstream = 1.0 if upstream is None else upstream
        self._zero = torch.zeros((), dtype=torch.float32, device="cpu")

    @classmethod
    def serving(
        cls, spec: Spec, operands: Operands, scale: float | Tensor, upstream: float | None, scratch: Scratch
    ) -> FewPasses | None:
        """None of other losses, and with options that these have no formulas for."""
        options = (operands.alpha, operands.weight, operands.pos_weight, operands.sample_weight, operands.mask)
        if (
            not has_few_passes(spec.formula, spec.params, spec.alpha)
            or isinstance(scale, Tensor)
            or not scale > 0  # a normalizer may be anything, and magnitudes are added up
            or spec.smoothing
            or spec.ignored is not None
            or any(option is not None for option in options)
            or spec.compute_dtype != torch.float32
            or not is_plain(operands.inputs)
            or not (operands.targets is None or is_plain(operands.targets))
        ):
            return None
        return cls(spec, scale, upstream, scratch)

    def block(self, part: Operands, left_out: Tensor | None, loss: Tensor | None, grad: Tensor | None) -> Tensor | None:
        """The sum of a block's losses. Losses are written to ``loss`` and slopes to ``grad``, if there is one.

        Targets are 0 and 1, or absent if all count as 0; losses that are ``left_out``, counted row after row, are 0.
        None where a loss is not finite or e to a logit is not: these formulas do not hold there. ``grad`` may hold
        anything then.
        """
        x = part.inputs
        y = None if part.targets is None else self._in_float("y", part.targets)
        losses, q = self._softplus_and_sigmoid(x, y, precise=self._gamma is not None and x.dtype == torch.float32)
        times = 1.0
        if self._gamma is None:
            self._cross_entropy(losses, q, y, grad)
        else:
            times = self._focal(self._gamma, losses, q, y, grad)
        if left_out is not None:
            clear(losses, left_out)
        total = losses.sum()
        if not math.isfinite(total.item()):
            return None
        if loss is not None:
            loss.copy_(losses if times == 1 else losses / times)
        return total if times == 1 else total / times

    def _cross_entropy(self, losses: Tensor, q: Tensor, y: Tensor | None, grad: Tensor | None) -> None:
        """In the place of softplus the losses; and their slopes."""
        losses.mul_(self._of_negative)
        if grad is not None:
            self._finish(torch.mul(_flip(q, y, q), self._of_negative, out=_place(grad, q)), grad)

    def _focal(self, gamma: float, losses: Tensor, q: Tensor, y: Tensor | None, grad: Tensor | None) -> float:
        """Likewise; and what the losses are multiplied by, since the slope needs gamma times the loss."""
        times = 1.0 if grad is None else gamma
        factor = self._weight(q, y, gamma)
        self._product(losses, factor, times, losses)
        if grad is not None:  # factor * (gamma * p * ce + q)
            self._finish(torch.lerp(losses, factor, q, out=_place(grad, q)), grad)
        if y is not None:
            losses.abs_()  # those of positives have the sign of their slopes
        return times

    def _finish(self, slope: Tensor, grad: Tensor) -> None:
        """Slopes, which may be in their place already, times the upstream gradient."""
        if self._upstream != 1:
            slope.mul_(self._upstream)
        if slope is not grad:
            grad.copy_(slope)

    def _in_float(self, slot: Slot, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float32 else self._of(slot, tensor).copy_(tensor)

    def _softplus_and_sigmoid(self, x: Tensor, y: Tensor | None, *, precise: bool) -> tuple[Tensor, Tensor]:
        """Of v = (1 - 2y) x: log(1 + e^v), infinite where e^v is, and e^v / (1 + e^v).

        A power of 2 and a logarithm take two thirds of softplus's time. They are off by half a unit in the last place
        of the exponent, which is 1e-6 of e^v at 20 and 4e-6 at 80. A power of the quotient would be off by a multiple
        of that: where it is to be ``precise`` it is torch's sigmoid.
        """
        losses, q = self._of("losses", x), self._of("q", x)
        # Where v is needed once more, the exponential does not overwrite it.
        v = _flip(self._in_float("losses", x), y, q if precise else losses)
        exponential = torch.mul(v, _LOG2_E, out=losses).exp2_()
        if precise:
            torch.sigmoid(v, out=q)
        else:
            torch.div(exponential, torch.add(exponential, 1, out=q), out=q)
        return exponential.log1p_(), q

    def _weight(self, q: Tensor, y: Tensor | None, gamma: float) -> Tensor:
        """The class weight times q ** gamma; negative where y is 1, since there v = -x."""
        out = self._of("factor", q)
        factor = torch.mul(q, self._of_negative, out=out) if gamma == 1 else self._product(q, q, self._of_negative, out)
        return factor if y is None else torch.addcmul(factor, factor, y, value=self._ratio_less_1, out=factor)

    def _product(self, a: Tensor, b: Tensor, number: float, out: Tensor) -> Tensor:
        """number * a * b in one pass."""
        return torch.mul(a, b, out=out) if number == 1 else torch.addcmul(self._zero, a, b, value=number, out=out)


def clear(values: Tensor, offsets: Tensor) -> None:
    """0 where ``offsets`` are, counted row after row."""
    width = values.shape[1]
    values.index_put_((offsets // width, offsets % width), values.new_zeros(()))  # put_ is called not deterministic


def _place(grad: Tensor, like: Tensor) -> Tensor:
    """Where slopes are computed: at once in the gradient, if it has their dtype."""
    return grad if grad.dtype == like.dtype else like


def _flip(values: Tensor, y: Tensor | None, out: Tensor) -> Tensor:
    """(1 - 2y) values in ``out``, exactly, or infinite beyond half of the largest number; ``values`` without a y."""
    return values if y is None else torch.addcmul(values, values, y, value=-2, out=out)
