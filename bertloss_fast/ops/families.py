"""What a family of losses has for the routes through autograd: each of the files named like one makes its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .upstream import Expected


class Wanted(NamedTuple):
    """Which gradients a family is asked for; ``targets`` only where it says that it has them."""

    inputs: bool = False
    targets: bool = False
    linear_weight: bool = False
    linear_bias: bool = False


class Gradients(NamedTuple):
    """Those that were wanted."""

    inputs: Tensor | None = None
    targets: Tensor | None = None
    linear_weight: Tensor | None = None
    linear_bias: Tensor | None = None


class Saved(NamedTuple):
    """What forward leaves for backward, beside the operands."""

    grads: Gradients = Gradients()  # written in forward, for the upstream in the note
    note: Tensor | None = None  # []; None for 1
    denominator: Tensor | None = None  # where data tell it: [], or [k] of several parts of the loss
    row_slopes: Tensor | None = None  # rowwise: [4, N]; listwise: the gradient of each list's loss, [Q, n]
    col_slopes: Tensor | None = None  # two-way: [4, L]

    def is_written_for(self, number: float | None) -> bool:
        """Whether gradients are there, and for this upstream; None is one that nobody looked at."""
        return any(grad is not None for grad in self.grads) and number == (1 if self.note is None else self.note.item())


Shape = tuple[int, ...]
OnePass = Callable[[Any, Any, Tensor, Wanted], tuple[Tensor, Gradients]]
"""Loss and gradients for an upstream, of whole operands: ``(spec, operands, upstream, wanted)``."""


class Family(NamedTuple):
    """A family's code. What a call is, says its ``spec``; its tensors are the ``operands``.

    Both are NamedTuples of the family's own. The first operands are the ``sources``, to which gradients flow."""

    name: str
    spec: type
    operands: type

    plain: Callable[[Any, Any], Tensor]
    """The loss as differentiable operations."""

    forward: Callable[..., tuple[Tensor, Saved]]
    """The loss by a backend, and what backward needs: ``(backend, spec, operands, expected, wanted)``.

    Gradients too, if they are wanted, for the upstream expected. A linear layer's loss hands over one thing more, a
    contiguous tensor for the gradient of the inputs, which may be the inputs themselves.
    """

    backward: Callable[[str, Any, Any, Saved, Tensor, Expected | None, Wanted], Gradients]
    """The gradients wanted; those in ``Saved`` may become them. What came is left in the place of what was expected."""

    loss_shape: Callable[[Any, Any], Shape]

    saved_shapes: Callable[[Any, Any], tuple[Shape | None, Shape | None, Shape | None]]
    """Of ``Saved``'s denominator and slopes; None for what a call does not have."""

    grads_of_targets: bool = False
    """Whether forward and backward have the gradient of the targets; else it comes from ``plain``."""

    sources: tuple[str, ...] = ("inputs", "targets")

    whole: bool = False
    """Whether a compiler keeps its eager code whole too, since plain operations would take memory that it saves."""

    keeps_slopes: bool = False
    """Whether forward leaves slopes for backward to scale, which it is always asked for if there is a backward."""
