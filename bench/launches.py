"""Launches of every kernel, on tensors that have shapes, dtypes and strides, and no memory.

Sizes are odd, so that none is a multiple of 16, of which Triton would make use.
"""

from functools import partial
from typing import NamedTuple

import torch
from bertloss_fast.kernels import combine, parts, passes, rowwise
from bertloss_fast.kernels.elements import Matrices
from bertloss_fast.kernels.formulas import Values
from bertloss_fast.kernels.pointwise import Gradients, pointwise_launcher
from bertloss_fast.kernels.sigmoid import sigmoid_launcher
from bertloss_fast.kernels.upstream import Upstream, rescale_launcher
from torch import Tensor

_empty = partial(torch.empty, device="meta")


class Sigmoid(NamedTuple):
    """A launch of the sigmoid family; class vectors and weights are given by their shape."""

    formula: str
    params: tuple[float, ...] = ()
    inputs: torch.dtype = torch.bfloat16
    targets: torch.dtype | str = torch.uint8  # a dtype, or "sparse"
    alpha: float | str | None = None  # a number, or "[L]"
    weight: str | None = None  # "[L]" or "[N, L]"
    pos_weight: str | None = None  # "[L]"
    sample_weight: bool = False
    mask: bool = False
    ignored: float | None = None
    smoothing: float = 0.0
    # "forward" writes partial sums and the gradient, "loss" the sums alone, "none" a loss for each element. "backward"
    # and "backward none" are the gradients of the two; "backward again" is the former where no gradient is written yet.
    step: str = "forward"
    rows: int = 63
    num_labels: int = 1001
    row_stride: int | None = None  # of the inputs, where it is not num_labels
    counted: bool = False  # the denominator is a tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        return _compute_dtype(self.inputs)

    def launch(self) -> None:
        shape = self.rows, self.num_labels
        reduced = not self.step.endswith("none")
        loss = grad = None
        if self.step == "none":
            loss = _empty(shape, dtype=self.inputs)
        elif self.step in ("forward", "loss"):
            loss = _empty(8, dtype=self.compute_dtype)
        if self.step not in ("none", "loss"):
            grad = _empty(shape, dtype=self.inputs)
        # Backward also has what the gradient is written for, and where to leave what came.
        scalars = {"forward": 2, "backward": 3, "backward again": 1}.get(self.step, 0)
        factors = [self._operand(self.weight)]
        if self.sample_weight:
            factors.append(_empty(self.rows, dtype=self.compute_dtype)[:, None].expand(shape))
        if self.step == "backward none":
            factors.append(_empty(shape, dtype=self.inputs))
        sigmoid_launcher(
            self.formula,
            self.params,
            Matrices(
                _empty(self.rows, self.row_stride or self.num_labels, dtype=self.inputs)[:, : self.num_labels],
                _targets(self.targets, *shape),
                _empty(shape, dtype=torch.bool) if self.mask else None,
                self.ignored,
                self.compute_dtype,
            ),
            self._operand(self.alpha) if isinstance(self.alpha, str) else self.alpha,
            self._operand(self.pos_weight),
            tuple(factor for factor in factors if factor is not None),
            self._values(),
            _empty((), dtype=self.compute_dtype) if self.counted else self.rows * self.num_labels,
            Upstream(*[_empty((), dtype=self.compute_dtype)] * scalars),
            loss,
            grad,
            smoothing=self.smoothing,
            reduced=reduced,
            written=self.step == "backward",
        )

    def _values(self) -> Values:
        """What the formula reads beside logits and labels."""
        empty = partial(_empty, dtype=self.compute_dtype)
        if self.formula == "balanced":
            return Values(by_label=empty(2, self.num_labels), by_row=empty(self.rows))
        return Values(table=empty(self.params[0])) if self.formula == "ghm" else Values()

    def _operand(self, shape: str | None) -> Tensor | None:
        if shape is None:
            return None
        sizes = {"[L]": (self.num_labels,), "[N, L]": (self.rows, self.num_labels)}
        return _empty(sizes[shape], dtype=self.compute_dtype).expand(sizes["[N, L]"])


class Pointwise(NamedTuple):
    """A launch of the pointwise family."""

    formula: str
    inputs: torch.dtype = torch.bfloat16
    targets: torch.dtype = torch.bfloat16
    weight: torch.dtype | None = None
    mask: bool = False
    # "forward" writes partial sums and the gradient, "both" the targets' gradient too; "backward" and "backward none"
    # are the gradients of a scalar and of losses.
    step: str = "forward"
    rows: int = 63
    num_labels: int = 1001

    @property
    def compute_dtype(self) -> torch.dtype:
        return _compute_dtype(self.inputs)

    def launch(self) -> None:
        shape = self.rows, self.num_labels
        forward = self.step in ("forward", "both")
        factors = [_empty(shape, dtype=self.weight)] if self.weight is not None else []
        if self.step == "backward none":
            factors.append(_empty(shape, dtype=self.inputs))
        scalars = {"forward": 2, "both": 2, "backward": 3}.get(self.step, 0)
        pointwise_launcher(
            self.formula,
            Matrices(
                _empty(shape, dtype=self.inputs),
                _empty(shape, dtype=self.targets),
                _empty(shape, dtype=torch.bool) if self.mask else None,
                None,
                self.compute_dtype,
            ),
            tuple(factors),
            _empty((), dtype=self.compute_dtype) if factors or self.mask else self.rows * self.num_labels,
            Upstream(*[_empty((), dtype=self.compute_dtype)] * scalars),
            _empty(8, dtype=self.compute_dtype) if forward else None,
            Gradients(
                _empty(shape, dtype=self.inputs),
                _empty(shape, dtype=self.targets) if self.step == "both" else None,
            ),
            reduced=self.step != "backward none",
            written=self.step == "backward",
        )


class Pass(NamedTuple):
    """A pass before a loss, or the sum after it."""

    kind: str  # "count", "positives", "row sums", "histogram", "sum" or "rescale"
    inputs: torch.dtype = torch.bfloat16
    targets: torch.dtype | str = torch.uint8
    mask: bool = False
    ignored: float | None = None
    smoothing: float = 0.0
    denominator: int | None = None

    def launch(self) -> None:
        shape = rows, num_labels = 63, 20001
        dtype = _compute_dtype(self.inputs)
        matrices = Matrices(
            _empty(shape, dtype=self.inputs),
            _targets(self.targets, *shape),
            _empty(shape, dtype=torch.bool) if self.mask else None,
            self.ignored,
            dtype,
        )
        if self.kind == "sum":
            passes.sum_launcher(_empty(8192), _empty((), dtype=self.inputs), denominator=self.denominator)
        elif self.kind == "rescale":
            values, scalars = _empty(63063, dtype=self.inputs), [_empty(()) for _ in range(3)]
            rescale_launcher(values, *scalars, smallest=1e-9, largest=1e9)
        elif self.kind == "row sums":
            weights = _empty(num_labels, dtype=dtype if self.targets == torch.float32 else torch.int64)
            passes.row_sum_launcher(matrices, weights, _empty(rows, dtype=dtype))
        elif self.kind == "histogram":
            counts = _empty(8, 30, dtype=torch.int32)
            passes.histogram_launcher(matrices, counts, bins=30, smoothing=self.smoothing)
        else:
            passes.count_launcher(matrices, shape, _empty(8, dtype=dtype), positives=self.kind == "positives")


class Lines(NamedTuple):
    """A launch of ZLPR or two-way."""

    kind: str  # "zlpr" of rows that fit a tile; "partials", "combine" and "gradient" of those in parts; "total"
    inputs: torch.dtype = torch.bfloat16
    targets: torch.dtype | str = torch.uint8
    mask: bool = False
    ignored: float | None = None
    two_way: bool = False
    count: str | None = None  # what is counted for the denominator, where it is
    step: str = "forward"  # of "zlpr": "loss" and "none" write no gradient, "backward" nothing else
    rows: int = 63
    num_labels: int = 1001

    def launch(self) -> None:
        shape = self.rows, self.num_labels
        dtype = _compute_dtype(self.inputs)
        empty = partial(_empty, dtype=dtype)
        matrices = Matrices(
            _empty(shape, dtype=self.inputs),
            _targets(self.targets, *shape),
            _empty(shape, dtype=torch.bool) if self.mask else None,
            self.ignored,
            dtype,
        )
        grad = _empty(shape, dtype=self.inputs)
        cut = parts.cut(shape, columns=self.two_way, compute_dtype=dtype)
        sums = empty(5, cut.strips, self.rows), empty(4, cut.chunks, self.num_labels) if self.two_way else None
        slopes = empty(4, self.rows), empty(4, self.num_labels) if self.two_way else None
        temperatures = (1.0, 4.0) if self.two_way else (1.0, 1.0)
        count = "any" if self.two_way else self.count or "elements"
        counts = empty(8) if self.two_way or self.count else None
        denominator = None if self.two_way or self.count else self.rows
        if self.kind == "zlpr":
            backward, none = self.step == "backward", self.step == "none"
            rowwise.zlpr_launcher(
                matrices,
                (),
                denominator,
                Upstream(empty(()), empty(())) if self.step in ("forward", "backward") else Upstream(),
                None if backward else empty(self.rows),
                counts,
                grad if self.step in ("forward", "backward") else None,
                reduced=not none,
                count=count,
                written=backward,
            )
        elif self.kind == "partials":
            parts.partials_launcher(matrices, *sums, cut, temperatures=temperatures, count=count)
        elif self.kind == "gradient":
            denominators = empty(2) if self.two_way else None
            upstream = Upstream(empty(()))
            parts.gradient_launcher(
                matrices, *slopes, denominators, (), upstream, grad, cut, temperatures=temperatures, written=False
            )
        elif self.kind == "combine":
            formula = "two_way" if self.two_way else "zlpr"
            combine.combine_launcher(
                formula,
                *sums,
                (),
                denominator,
                *slopes,
                empty(8),
                counts,
                temperatures=temperatures,
                count=count,
                reduced=True,
            )
        else:
            combine.total_launcher(empty(8), counts, empty(()), empty(2) if self.two_way else None, 4)


def _compute_dtype(inputs: torch.dtype) -> torch.dtype:
    return torch.float64 if inputs == torch.float64 else torch.float32


def _targets(kind: torch.dtype | str, rows: int, num_labels: int) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(kind, torch.dtype):
        return _empty(rows, num_labels, dtype=kind)
    return _empty(rows + 1, dtype=torch.int64), _empty(5 * rows, dtype=torch.int32)
