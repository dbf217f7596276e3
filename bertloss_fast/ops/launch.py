"""What the kernels' launchers take, made of a call's operands."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..kernels.elements import Matrices
from ..kernels.upstream import Upstream
from ..reference.sigmoid import Operands, Spec
from .families import Saved
from .upstream import Expected


def matrices(spec: Spec, operands: Operands) -> Matrices:
    """Of operands that are matrices already."""
    targets: Tensor | tuple[Tensor, Tensor]
    if operands.targets is None:
        targets = cast(Tensor, operands.crow), cast(Tensor, operands.col)
    else:
        targets = operands.targets
    return Matrices(operands.inputs, targets, operands.mask, spec.ignored, spec.compute_dtype)


def expected_upstream(expected: Expected | None, grad: Tensor | None) -> tuple[Upstream, Tensor | None]:
    """What forward writes a gradient for, and the note of it."""
    if expected is None or grad is None:
        return Upstream(), None
    note = expected.value.new_empty(())
    return Upstream(expected.value, note), note


def upstream_of(upstream: Tensor, saved: Saved, expected: Expected | None) -> Upstream:
    """The one value that came to a scalar loss, or to one that sum() or mean() then reduced."""
    memory = None if expected is None else expected.value
    note = saved.note if any(grad is not None for grad in saved.grads) else None
    return Upstream(upstream.as_strided((), ()), note, memory)
