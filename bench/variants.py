"""A launch of each kind that the losses make, for a compiler to look at.

Their tensors have shapes, dtypes and strides, and no memory. Sizes are odd, so that none is a multiple of 16, of which
Triton would make use.
"""

from functools import partial
from typing import NamedTuple

import torch
from bertloss_fast.kernels import combine, parts, passes, rowwise
from bertloss_fast.kernels.elements import Matrices
from bertloss_fast.kernels.formulas import Values
from bertloss_fast.kernels.sigmoid import sigmoid_launcher
from bertloss_fast.kernels.upstream import Upstream
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


class Pass(NamedTuple):
    """A pass before a loss, or the sum after it."""

    kind: str  # "count", "positives", "row sums", "histogram" or "sum"
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


_FOCAL_2 = Sigmoid("focal", (2,))
_ASL = Sigmoid("asymmetric", (4.0, 1.0, 0.05, False))
_DB = Sigmoid("balanced", (2.0, 2.0, 2.0, 0.1, 10.0, 0.2))
_GHM = Sigmoid("ghm", (30,))

SIGMOID: dict[str, Sigmoid] = {
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
    "focal 2 alpha backward": _FOCAL_2._replace(alpha=0.25, step="backward"),
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
    # the other formulas
    "poly": Sigmoid("poly", (0.0, 2.0)),
    "poly focal 2": Sigmoid("poly", (2.0, 2.0)),
    "asymmetric": _ASL,
    "asymmetric unclipped": _ASL._replace(params=(4.0, 1.0, 0.0, False)),
    "asymmetric fp32": _ASL._replace(inputs=torch.float32),
    "asymmetric soft": _ASL._replace(targets=torch.float32),
    "balanced": _DB,
    "balanced soft": _DB._replace(targets=torch.float32),
    "ghm": _GHM,
    "ghm soft": _GHM._replace(targets=torch.float32),
    # options
    "focal 2 alpha smoothing": _FOCAL_2._replace(alpha=0.25, smoothing=0.1),
    "focal 2 alpha ignored": _FOCAL_2._replace(alpha=0.25, targets=torch.int8, ignored=-100),
    "focal 2 alpha mask": _FOCAL_2._replace(alpha=0.25, mask=True),
    "focal 2 alpha sample_weight": _FOCAL_2._replace(alpha=0.25, sample_weight=True),
    # sparse labels
    "bce sparse": Sigmoid("bce", targets="sparse"),
    "focal 2 sparse": _FOCAL_2._replace(targets="sparse"),
    "focal 2 alpha sparse": _FOCAL_2._replace(targets="sparse", alpha=0.25),
    "focal 2 alpha sparse backward": _FOCAL_2._replace(targets="sparse", alpha=0.25, step="backward"),
    "focal 2 sparse wide": _FOCAL_2._replace(targets="sparse", rows=2**31 // 1001 + 2),
    "focal 2 fp32 sparse": _FOCAL_2._replace(targets="sparse", inputs=torch.float32),
    "asymmetric sparse": _ASL._replace(targets="sparse"),
    "balanced sparse": _DB._replace(targets="sparse"),
    "ghm sparse": _GHM._replace(targets="sparse"),
}

_ZLPR, _TWO_WAY = Lines("zlpr"), Lines("partials", two_way=True, num_labels=2001)

LINES: dict[str, Lines] = {
    "zlpr": _ZLPR,
    "zlpr fp32": _ZLPR._replace(inputs=torch.float32),
    "zlpr fp64": _ZLPR._replace(inputs=torch.float64),
    "zlpr float targets": _ZLPR._replace(targets=torch.float32),
    "zlpr mask": _ZLPR._replace(mask=True),
    "zlpr loss": _ZLPR._replace(step="loss"),
    "zlpr none": _ZLPR._replace(step="none"),
    "zlpr backward": _ZLPR._replace(step="backward"),
    "zlpr ignored": _ZLPR._replace(targets=torch.int8, ignored=-100),
    "zlpr counted": _ZLPR._replace(count="elements", mask=True, step="loss"),
    "zlpr counted positives": _ZLPR._replace(count="positives", step="loss"),
    "zlpr wide": _ZLPR._replace(rows=2**31 // 1001 + 2),
    "zlpr sparse": _ZLPR._replace(targets="sparse"),
    "zlpr 1024": _ZLPR._replace(num_labels=1024),
    "zlpr 100": _ZLPR._replace(num_labels=100),
    "zlpr 100 sparse": _ZLPR._replace(num_labels=100, targets="sparse"),
    "zlpr 16001": _ZLPR._replace(num_labels=16001),
    "zlpr 16001 fp32": _ZLPR._replace(num_labels=16001, inputs=torch.float32),
    "zlpr partials": Lines("partials", num_labels=20001),
    "zlpr partials positives": Lines("partials", num_labels=20001, count="positives"),
    "zlpr partials sparse": Lines("partials", num_labels=20001, targets="sparse"),
    "zlpr partials 20480": Lines("partials", num_labels=20480),
    "zlpr gradient": Lines("gradient", num_labels=20001),
    "zlpr gradient sparse": Lines("gradient", num_labels=20001, targets="sparse"),
    "zlpr gradient 20480": Lines("gradient", num_labels=20480),
    "zlpr combine": Lines("combine", num_labels=20001),
    "zlpr total": Lines("total"),
    "two-way partials": _TWO_WAY,
    "two-way partials fp32": _TWO_WAY._replace(inputs=torch.float32),
    "two-way partials fp64": _TWO_WAY._replace(inputs=torch.float64),
    "two-way partials mask": _TWO_WAY._replace(mask=True),
    "two-way partials sparse": _TWO_WAY._replace(targets="sparse"),
    "two-way partials wide": _TWO_WAY._replace(rows=2**31 // 2001 + 2),
    "two-way partials 2048": _TWO_WAY._replace(num_labels=2048),
    "two-way gradient": _TWO_WAY._replace(kind="gradient"),
    "two-way gradient fp32": _TWO_WAY._replace(kind="gradient", inputs=torch.float32),
    "two-way gradient fp64": _TWO_WAY._replace(kind="gradient", inputs=torch.float64),
    "two-way gradient mask": _TWO_WAY._replace(kind="gradient", mask=True),
    "two-way gradient sparse": _TWO_WAY._replace(kind="gradient", targets="sparse"),
    "two-way gradient wide": _TWO_WAY._replace(kind="gradient", rows=2**31 // 2001 + 2),
    "two-way gradient 2048": _TWO_WAY._replace(kind="gradient", num_labels=2048),
    "two-way combine": _TWO_WAY._replace(kind="combine"),
    "two-way total": _TWO_WAY._replace(kind="total"),
}

PASSES: dict[str, Pass] = {
    "count": Pass("count", targets=torch.int8, ignored=-100),
    "count mask": Pass("count", targets="sparse", mask=True),
    "positives": Pass("positives"),
    "positives float": Pass("positives", targets=torch.float32),
    "positives mask": Pass("positives", mask=True),
    "row sums": Pass("row sums"),
    "row sums float": Pass("row sums", targets=torch.float32),
    "row sums sparse": Pass("row sums", targets="sparse"),
    "histogram": Pass("histogram"),
    "histogram fp32": Pass("histogram", inputs=torch.float32),
    "histogram soft": Pass("histogram", targets=torch.float32),
    "histogram smoothing": Pass("histogram", smoothing=0.1),
    "histogram sparse": Pass("histogram", targets="sparse"),
    "sum": Pass("sum", inputs=torch.float32),
    "sum bf16": Pass("sum", denominator=63),
}

VARIANTS: dict[str, Sigmoid | Lines | Pass] = {**SIGMOID, **LINES, **PASSES}
