"""A launch of each kind that the losses make, for a compiler to look at.

Their tensors have shapes, dtypes and strides, and no memory. Sizes are odd, so that none is a multiple of 16, of which
Triton would make use.
"""

from functools import partial
from typing import NamedTuple

import torch
from bertloss_fast.kernels.sigmoid import sigmoid_launcher, sum_launcher
from torch import Tensor

_empty = partial(torch.empty, device="meta")


class Sigmoid(NamedTuple):
    """A launch of the sigmoid family; class vectors and weights are given by their shape."""

    formula: str
    params: tuple[float, ...] = ()
    inputs: torch.dtype = torch.bfloat16
    targets: torch.dtype = torch.uint8
    alpha: float | str | None = None  # a number, or "[L]"
    weight: str | None = None  # "[L]" or "[N, L]"
    pos_weight: str | None = None  # "[L]"
    # "forward" writes partial sums and the gradient, "loss" the sums alone, "none" a loss for each element. "backward"
    # and "backward none" are the gradients of the two; "backward again" is the former where no gradient is written yet.
    step: str = "forward"
    rows: int = 63
    num_labels: int = 1001
    row_stride: int | None = None  # of the inputs, where it is not num_labels
    counted: bool = False  # the denominator is a tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.inputs == torch.float64 else torch.float32

    def launch(self) -> None:
        shape = self.rows, self.num_labels
        reduced = not self.step.endswith("none")
        loss: Tensor | None = None
        upstream: Tensor | None = None
        grad: Tensor | None = _empty(shape, dtype=self.inputs)
        if self.step.startswith("backward"):
            upstream = _empty((), dtype=self.compute_dtype) if reduced else _empty(shape, dtype=self.inputs)
        elif self.step == "none":
            loss, grad = grad, None
        else:
            loss = _empty(8, dtype=self.compute_dtype)
            grad = None if self.step == "loss" else grad
        weight = self._operand(self.weight)
        sigmoid_launcher(
            self.formula,
            self.params,
            _empty(self.rows, self.row_stride or self.num_labels, dtype=self.inputs)[:, : self.num_labels],
            _empty(shape, dtype=self.targets),
            self._operand(self.alpha) if isinstance(self.alpha, str) else self.alpha,
            None if weight is None else weight.expand(shape),
            self._operand(self.pos_weight),
            _empty((), dtype=self.compute_dtype) if self.counted else self.rows * self.num_labels,
            upstream,
            loss,
            grad,
            reduced=reduced,
            written=self.step == "backward",
            compute_dtype=self.compute_dtype,
        )

    def _operand(self, shape: str | None) -> Tensor | None:
        if shape is None:
            return None
        sizes = {"[L]": (self.num_labels,), "[N, L]": (self.rows, self.num_labels)}
        return _empty(sizes[shape], dtype=self.compute_dtype)


class Sum(NamedTuple):
    """The second stage of a reduced loss, over as many partial sums as there can be."""

    total: torch.dtype = torch.float32

    def launch(self) -> None:
        sum_launcher(_empty(8192), _empty((), dtype=self.total))


_FOCAL_2 = Sigmoid("focal", (2,))

VARIANTS: dict[str, Sigmoid | Sum] = {
    "bce": Sigmoid("bce"),
    "focal 0": Sigmoid("focal", (0,)),
    "focal 1": Sigmoid("focal", (1,)),
    "focal 2": _FOCAL_2,
    "focal 3.7": Sigmoid("focal", (3.7,)),
    "focal 1 alpha": Sigmoid("focal", (1,), alpha=0.25),
    "focal 2 alpha": _FOCAL_2._replace(alpha=0.25),
    "focal 3.7 alpha": Sigmoid("focal", (3.7,), alpha=0.25),
    # dtypes
    "focal 2 fp16": _FOCAL_2._replace(inputs=torch.float16),
    "bce fp32": Sigmoid("bce", inputs=torch.float32),
    "focal 2 fp32": _FOCAL_2._replace(inputs=torch.float32),
    "focal 3.7 fp32": Sigmoid("focal", (3.7,), inputs=torch.float32),
    "focal 2 fp64": _FOCAL_2._replace(inputs=torch.float64),
    "focal 3.7 fp64": Sigmoid("focal", (3.7,), inputs=torch.float64),
    "focal 2 int64 targets": _FOCAL_2._replace(targets=torch.int64),
    # soft labels
    "bce soft": Sigmoid("bce", targets=torch.float32),
    "focal 2 soft bf16 alpha": _FOCAL_2._replace(targets=torch.bfloat16, alpha=0.25),
    "focal 3.7 soft pos_weight": Sigmoid("focal", (3.7,), targets=torch.float32, pos_weight="[L]", num_labels=1000),
    "focal 2 fp32 soft": _FOCAL_2._replace(inputs=torch.float32, targets=torch.float32),
    # what a launch reads and writes
    "focal 2 loss": _FOCAL_2._replace(step="loss"),
    "focal 2 none": _FOCAL_2._replace(step="none"),
    "focal 2 backward": _FOCAL_2._replace(step="backward"),
    "focal 2 backward again": _FOCAL_2._replace(step="backward again"),
    "focal 2 backward none": _FOCAL_2._replace(step="backward none"),
    "focal 2 counted": _FOCAL_2._replace(counted=True),
    "focal 2 wide": _FOCAL_2._replace(rows=2**31 // 1001 + 2),
    # operands by label: an odd number of labels leaves no two of them aligned
    "focal 2 alpha 1000": _FOCAL_2._replace(alpha="[L]", num_labels=1000),
    "focal 2 alpha 1001": _FOCAL_2._replace(alpha="[L]"),
    "bce pos_weight 1000": Sigmoid("bce", pos_weight="[L]", num_labels=1000),
    "bce pos_weight 1001": Sigmoid("bce", pos_weight="[L]"),
    "bce weight 1000": Sigmoid("bce", weight="[L]", num_labels=1000),
    "bce weight matrix": Sigmoid("bce", weight="[N, L]"),
    "bce padded rows": Sigmoid("bce", num_labels=1000, row_stride=1008),
    "bce odd rows": Sigmoid("bce", num_labels=1000, row_stride=1007),
    "sum": Sum(),
    "sum bf16": Sum(torch.bfloat16),
}
