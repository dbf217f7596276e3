"""Launches of the single-label family's kernels, as ``launches.py`` has those of the others."""

from functools import partial
from typing import NamedTuple

import torch
from bertloss_fast.kernels import pairs, rows, softmax
from bertloss_fast.kernels.pair_formulas import FORMULAS
from bertloss_fast.kernels.upstream import Upstream

_empty = partial(torch.empty, device="meta")


class Rows(NamedTuple):
    """A launch on rows of logits: of a formula of one of them, or of two."""

    formula: str
    params: tuple[float, ...] = ()
    num_classes: int = 1000
    inputs: torch.dtype = torch.bfloat16
    probabilities: torch.dtype | None = None  # in the place of classes
    labels: bool = True  # beside two logits
    weight: bool = False
    smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0
    # "forward" writes partial sums and the gradient, "loss" the sums alone, "backward" what forward would have, if that
    # was another, and "backward none" the gradient of losses.
    step: str = "forward"
    rows: int = 63

    def launch(self) -> None:
        dtype = torch.float64 if self.inputs == torch.float64 else torch.float32
        empty = partial(_empty, dtype=dtype)
        shape = self.rows, self.num_classes
        two = self.formula in FORMULAS
        other = self.inputs if two else self.probabilities
        has_labels = self.probabilities is None and self.labels
        tensors = rows.Operands(
            _empty(shape, dtype=self.inputs),
            None if other is None else _empty(shape, dtype=other),
            _empty(self.rows, dtype=torch.int64) if has_labels else None,
            empty(self.num_classes) if self.weight else None,
            empty(self.num_classes) if self.formula == "ldam" else None,
            (),
        )
        loss_of = rows.Loss(
            self.formula,
            self.params,
            self.smoothing,
            -100,
            self.softcap,
            self.params[0] if self.formula == "ldam" else 1.0,
            self.z_loss,
            self.formula in ("cross_entropy", "poly"),
        )
        scalars = {"forward": 2, "backward": 3}.get(self.step, 0)
        upstream = Upstream(*[empty(())] * scalars)
        upstreams = empty(self.rows) if self.step == "backward none" else None
        loss = empty(8) if self.step in ("forward", "loss") else None
        grads = tuple(None if self.step == "loss" else _empty(shape, dtype=self.inputs) for _ in range(2))
        options = {
            "compute_dtype": dtype,
            "reduced": self.step != "backward none",
            "written": self.step == "backward",
        }
        if two:
            wanted = grads if self.formula != "distillation" else (grads[0], None)
            pairs.pairs_launcher(loss_of, tensors, empty(()), upstream, upstreams, loss, wanted, **options)
        else:
            softmax.softmax_launcher(
                loss_of, tensors, (empty(2), empty(1)), upstream, upstreams, loss, grads[0], **options
            )
