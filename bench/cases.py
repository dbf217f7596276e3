"""What is measured: a case is a row of a family's table, a provider is one who computes it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUITES = ("sigmoid", "softmax", "listwise", "head", "small", "memory")
TWIN = torch.uint8  # of SparseLabels, for who takes only tensors
MeanLoss = Callable[[Tensor, Any], Tensor]  # of logits and Targets; a peer's takes tensors only

# Who computes a loss: ours and PyTorch's operations, what compiles at its first call, which takes ten seconds on a
# CPU, and other libraries, which are slow to import and to run.
PLAIN, COMPILED, LIBRARY = "plain", "compiled", "library"
EVERYONE = (PLAIN, COMPILED, LIBRARY)
NO_LIBRARY, UNCOMPILED, ALONE = (PLAIN, COMPILED), (PLAIN, LIBRARY), (PLAIN,)


@dataclass(frozen=True)
class Case:
    """A mean loss, forward and backward. The suite says what is asked: time, time with the host's part, or memory.

    ``pages`` matters on a CPU only: whether the allocator keeps freed memory, or hands it back and has the system clear
    fresh pages for every large tensor. Left alone, which is the default, glibc does either at this size, by luck, and
    PyTorch's dozen temporaries take four times as long with the one as with the other.

    Targets are labels, a class a row, the logits of a teacher, or of documents how relevant they are. Without a
    ``target_dtype`` labels are SparseLabels, which a peer gets as a dense tensor of bytes. Every tenth label is
    positive, or ``labels_per_row`` of them.
    """

    suite: str
    loss: str
    shape: tuple[int, int]
    dtype: torch.dtype
    target_dtype: torch.dtype | None
    upstream: float = 1.0
    pages: str = "default"  # or "kept", "fresh"
    labels_per_row: int | None = None
    targets: str = "labels"  # or "classes", "teacher"; of lists "relevant", "graded"
    features: int | None = None  # of a linear layer before the loss
    backward: bool = True
    kinds: tuple[str, ...] = EVERYONE

    @property
    def mean_over(self) -> int:
        return self.numel if self.targets == "labels" else self.shape[0]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def floor_bytes(self) -> int:
        """Logits and targets read once, the gradient written once; SparseLabels and classes are a few bytes."""
        of_targets = self.target_dtype.itemsize if self.target_dtype and self.targets != "classes" else 0
        passes = 2 if self.backward else 1
        if self.features is not None:
            return passes * self.shape[1] * self.features * self.dtype.itemsize  # the layer's weight and its gradient
        return self.numel * (passes * self.dtype.itemsize + of_targets)

    @property
    def logits_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def title(self) -> str:
        rows, labels = self.shape
        targets = f"{name(self.target_dtype)} targets" if self.target_dtype else "SparseLabels"
        if self.targets != "labels":
            targets = {"teacher": "a teacher's logits", "relevant": "binary labels", "graded": "graded labels"}.get(
                self.targets, self.targets
            )
        per_row = "" if self.labels_per_row is None else f", {self.labels_per_row} labels a row"
        scaled = "" if self.upstream == 1 else f", upstream {self.upstream:.2g}"
        passes = "" if self.backward else ", forward alone"
        pages = "" if self.pages == "default" else f", {self.pages} pages"
        shape = f"{rows} x {labels}" if self.features is None else f"{rows} x {self.features} x {labels}"
        return f"{self.loss}, {shape} {name(self.dtype)}, {targets}{per_row}{scaled}{passes}{pages}"

    def to_json(self) -> dict[str, Any]:
        target_dtype = name(self.target_dtype) if self.target_dtype else "sparse"
        return asdict(self) | {"dtype": name(self.dtype), "target_dtype": target_dtype}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        # In torch "sparse" is the name of a module.
        dtypes = {
            key: None if fields[key] == "sparse" else getattr(torch, fields[key]) for key in ("dtype", "target_dtype")
        }
        tuples = {key: tuple(fields[key]) for key in ("shape", "kinds") if key in fields}
        return cls(**(fields | dtypes | tuples))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Provider(NamedTuple):
    """One who computes a family's losses: of each, its label in a table and the function of the mean loss."""

    name: str
    losses: dict[str, tuple[str, MeanLoss]]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    ours: bool = False
    kind: str = PLAIN
    sparse: bool = False  # takes SparseLabels as they are; the others only tensors
    twin: bool = False  # of ours, given the dense tensor where the case has SparseLabels
    imports: str = ""  # what is slow to import, at its first call


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


@dataclass
class Row:
    """What was found about one provider in one case.

    The status is "ok"; "missing" where the provider cannot run here at all; or "skipped", "wrong" or "failed" in this
    case. The note says why.
    """

    case: Case
    provider: str
    label: str
    ours: bool = False
    status: str = "ok"
    note: str = ""
    loss_error: float | None = None
    grad_error: float | None = None
    tail_error: float | None = None
    seconds: Quartiles | None = None
    samples: int = 0
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON has neither NaN nor infinity: they go as strings."""
        fields = asdict(self) | {"case": self.case.to_json()}
        for key in _ERRORS:
            if fields[key] is not None and not math.isfinite(fields[key]):
                fields[key] = str(fields[key])
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        seconds = fields["seconds"] and Quartiles(*fields["seconds"])
        if seconds and not all(0 < quartile < math.inf for quartile in seconds):
            raise ValueError(f"seconds of {fields['provider']}: expected finite numbers above 0, got {tuple(seconds)}")
        errors = {key: float(fields[key]) for key in _ERRORS if fields.get(key) is not None}
        return cls(**(fields | errors | {"case": Case.from_json(fields["case"]), "seconds": seconds}))


_ERRORS = ("loss_error", "grad_error", "tail_error")


def taking_part(case: Case, providers: Iterable[Provider]) -> list[Provider]:
    """Those that have the case's loss, and are asked."""
    return [
        provider
        for provider in providers
        if case.loss in provider.losses
        and provider.kind in case.kinds
        and not (provider.twin and case.target_dtype is not None)
    ]


def start_rows(case: Case, providers: Iterable[Provider], device: torch.device) -> list[Row]:
    """A row for each provider that takes part; those that cannot run say so."""
    rows = []
    for provider in taking_part(case, providers):
        label = provider.losses[case.loss][0]
        if case.target_dtype is None and not provider.sparse:
            label += f", dense {name(TWIN)} targets"
        row = Row(case, provider.name, label, provider.ours)
        if reason := provider.why_not(device):
            row.status, row.note = "missing", reason
        elif not provider.ours and device.type == "cpu" and _UNFUSED_TENSORS * case.logits_bytes > _memory():
            row.status = "skipped"
            row.note = f"not run: {_UNFUSED_TENSORS} logits tensors are more than this machine's memory"
        rows.append(row)
    return rows


# What the largest of the unfused formulas holds at its peak, kornia's focal loss.
_UNFUSED_TENSORS = 14


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(error: Exception) -> str:
    """An exception in one line without the paths that it may name."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'/[^ ]+/', '', lines[0])}"[:100]
