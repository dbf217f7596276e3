"""How right a provider is: before it is timed, on the inputs that it is timed on; and at the tails.

Both in float64 under autograd: torch's own functions, or the papers' terms, which none of our algebra enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bertloss_fast.targets import SparseLabels

from .cap import capped
from .cases import Case, MeanLoss, Row, describe
from .data import OfLayer, Targets, as_tensor, forget, leaves, step

Oracle = Callable[[str, Tensor, Tensor], Tensor]

# Largest error against float64, of the loss and of the gradient in units of its largest element. A formula computed in
# bfloat16 loses 1 to 2 %; what exceeds that computes another loss.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_BLOCK = 1 << 22
# The first call compiles what compiles; one that takes longer than this would take the other cases' time.
FIRST_CALL_SECONDS = 60.0

_TAILS = (20.0, 40.0, 60.0, 80.0)


class _Block(NamedTuple):
    """What is expected of some rows of a leaf: the sum of their losses, and their gradient."""

    leaf: int
    rows: slice
    loss: Tensor
    grad: Tensor


class Expected:
    """Loss and gradient of a case's inputs, computed once for all providers where memory is not a GPU's."""

    def __init__(self, case: Case, oracle: Oracle, inputs: Tensor, targets: Targets) -> None:
        self._case = case
        self._blocks = lambda: _blocks(case, oracle, inputs, targets)
        self._kept = list(self._blocks()) if inputs.device.type == "cpu" else None

    def errors(self, value: Tensor, grads: Sequence[Tensor]) -> tuple[float, float | None]:
        """Relative error of the loss, and the worst of a gradient in units of its largest element."""
        total = torch.zeros((), dtype=torch.float64, device=value.device)
        worst, largest = ([torch.zeros_like(total) for _ in grads] for _ in range(2))
        for block in self._kept or self._blocks():
            total += block.loss
            if grads:
                i = block.leaf
                error = (grads[i][block.rows].double() - block.grad).abs().max()
                worst[i] = torch.maximum(worst[i], error)  # Python's max drops NaN
                largest[i] = torch.maximum(largest[i], block.grad.abs().max())
        expected = total / self._case.mean_over
        of_loss = ((value - expected) / expected).abs().item()
        return of_loss, (torch.stack(worst) / torch.stack(largest)).max().item() if grads else None


def _blocks(case: Case, oracle: Oracle, inputs: Tensor, targets: Targets) -> Iterator[_Block]:
    scale = case.upstream / case.mean_over
    weight = targets.weight.detach().double().requires_grad_() if isinstance(targets, OfLayer) else None
    y = targets.targets if isinstance(targets, OfLayer) else targets
    num_rows = max(1, _BLOCK // case.shape[1])
    for start in range(0, case.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        x = inputs.detach()[rows].double().requires_grad_()
        part = oracle(case.loss, x if weight is None else F.linear(x, weight), _in_double(case, y[rows])).sum()
        part.backward()
        yield _Block(0, rows, part.detach(), cast(Tensor, x.grad) * scale)
    if weight is not None:
        yield _Block(1, slice(None), torch.zeros_like(part), cast(Tensor, weight.grad) * scale)


def _in_double(case: Case, targets: Tensor | SparseLabels) -> Tensor:
    if isinstance(targets, SparseLabels):
        return targets.to_dense(torch.float64)
    return targets if case.targets == "classes" else targets.double()


def check(row: Row, loss: MeanLoss, expected: Expected, inputs: Tensor, targets: Targets) -> None:
    """Note the errors of loss and gradient, and the status that they amount to."""
    try:
        with capped(FIRST_CALL_SECONDS):
            value = step(row.case, loss, inputs, targets)
    except TimeoutError as error:
        row.status, row.note = "skipped", f"first call: {error}"
        return
    except Exception as error:  # whatever a peer, its compiler or the memory may raise: the others go on
        row.status, row.note = "failed", describe(error)
        return
    grads = [leaf.grad for leaf in leaves(inputs, targets)] if row.case.backward else []
    forget(inputs, targets)
    if any(grad is None for grad in grads):
        row.status, row.note = "wrong", "no gradient"
        return
    row.loss_error, row.grad_error = expected.errors(value, cast(list[Tensor], grads))
    tolerance = _TOLERANCE[row.case.dtype]
    # Not "error > tolerance", which lets NaN pass.
    if not row.loss_error <= tolerance:
        row.status, row.note = "wrong", f"loss is off by {row.loss_error:.1e}"
    elif row.grad_error is not None and not row.grad_error <= tolerance:
        row.status, row.note = "wrong", f"gradient is off by {row.grad_error:.1e}"


class Tails:
    """Rows of logits at ±20 to ±80, all sure and right or all sure and wrong, and what a loss makes of them.

    The four rows repeat to the case's shape: what is compiled for it serves here too.
    """

    def __init__(self, case: Case, oracle: Oracle, device: torch.device) -> None:
        self._case = case
        self._sides = [_Side(case, oracle, device, sign) for sign in (1, -1)]

    def error(self, loss: MeanLoss, sparse: bool) -> float:
        """Worst relative error of a loss and of an element of its gradient, where the true value is a normal number."""
        worst = torch.zeros((), dtype=torch.float64)
        for side in self._sides:
            targets = side.targets if sparse else as_tensor(side.targets)
            value = step(self._case, loss, side.inputs, targets)
            worst = torch.maximum(worst, _relative(value.float(), side.loss))
            if self._case.backward:
                grad = cast(Tensor, side.inputs.grad)
                for k, expected in enumerate(side.grads):
                    if k < len(grad):
                        worst = torch.maximum(worst, _relative(grad[k :: len(_TAILS)], expected))
            forget(side.inputs, targets)
        return worst.item()


def has_tails(case: Case) -> bool:
    """Not behind a layer, whose products make the logits; nor where a teacher's probabilities cancel the student's, or
    documents each other."""
    return case.features is None and case.targets in ("labels", "classes")


class _Side:
    def __init__(self, case: Case, oracle: Oracle, device: torch.device, sign: int) -> None:
        rows, labels = case.shape
        away = sign * torch.tensor(_TAILS, device=device)[:, None]
        which = torch.arange(labels, device=device)
        if case.targets == "classes":
            y = which[torch.linspace(0, labels - 1, len(_TAILS), device=device).long()]
            x = torch.where(which == y[:, None], away, 0)
        else:
            y = (which % 10 == 0).to(case.target_dtype or torch.uint8).expand(len(_TAILS), -1)
            x = torch.where(y != 0, away, -away)
        x64 = x.double().requires_grad_()
        losses = oracle(case.loss, x64, y if case.targets == "classes" else y.double())
        (grads,) = torch.autograd.grad(losses.sum(), x64)
        self.grads = grads * (case.upstream / case.mean_over)
        # A row of the four stands in the case as often as this.
        counts = torch.tensor([len(range(k, rows, len(_TAILS))) for k in range(len(_TAILS))], device=device)
        self.loss = (losses.detach().reshape(len(_TAILS), -1).sum(1) * counts).sum() / case.mean_over
        repeated = torch.arange(rows, device=device) % len(_TAILS)
        self.inputs = x.to(case.dtype)[repeated].requires_grad_()
        self.targets = SparseLabels.from_dense(y[repeated]) if case.target_dtype is None else y[repeated]


def _relative(got: Tensor, expected: Tensor) -> Tensor:
    """The worst element's error where what is expected is a normal number of the dtype that came."""
    error = ((got.double() - expected) / expected).abs()
    return torch.where(expected.abs() >= torch.finfo(got.dtype).tiny, error, 0.0).max().cpu()


def measure_tails(case: Case, oracle: Oracle, device: torch.device, runs: Sequence[tuple[Row, MeanLoss, bool]]) -> None:
    """Note the error at the tails of each row's loss; the flag says whether it takes SparseLabels."""
    if not has_tails(case):
        return
    tails = Tails(case, oracle, device)
    for row, loss, sparse in runs:
        row.tail_error = tails.error(loss, sparse)
