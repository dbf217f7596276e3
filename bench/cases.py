"""What is measured: a case is a row of a family's table, a provider is one who computes it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertloss_fast.targets import SparseLabels

SUITES = ("sigmoid", "softmax", "head", "small", "memory")
TWIN = torch.uint8  # of SparseLabels, for peers
MeanLoss = Callable[[Tensor, Any], Tensor]  # of logits and Targets; a peer's takes tensors only


class OfLayer(NamedTuple):
    """What comes after the hidden states that a linear layer is given."""

    weight: Tensor  # [L, D]
    targets: Tensor | SparseLabels


Targets = Tensor | SparseLabels | OfLayer


@dataclass(frozen=True)
class Case:
    """Forward and backward of a mean loss. The suite says what is asked: time, time with the host's part, or memory.

    ``pages`` matters on a CPU only: whether the allocator keeps freed memory, or hands it back and has the system clear
    fresh pages for every large tensor. Left alone, glibc does either at this size, by luck, and PyTorch's dozen
    temporaries take four times as long with the one as with the other. "default" leaves glibc alone.

    Targets are labels, a class a row, or the logits of a teacher. Without a ``target_dtype`` labels are SparseLabels,
    which a peer gets as a dense tensor of bytes. Every tenth label is positive, or ``labels_per_row`` of them.
    """

    suite: str
    loss: str
    shape: tuple[int, int]
    dtype: torch.dtype
    target_dtype: torch.dtype | None
    upstream: float = 1.0
    pages: str = "kept"
    labels_per_row: int | None = None
    targets: str = "labels"  # or "classes", "teacher"
    features: int | None = None  # of a linear layer before the loss

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
        if self.features is not None:
            return 2 * self.shape[1] * self.features * self.dtype.itemsize  # the layer's weight and its gradient
        return self.numel * (2 * self.dtype.itemsize + of_targets)

    @property
    def logits_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def title(self) -> str:
        rows, labels = self.shape
        targets = f"{name(self.target_dtype)} targets" if self.target_dtype else "SparseLabels"
        if self.targets != "labels":
            targets = "classes" if self.targets == "classes" else "a teacher's logits"
        per_row = "" if self.labels_per_row is None else f", {self.labels_per_row} labels a row"
        scaled = "" if self.upstream == 1 else f", upstream {self.upstream:.2g}"
        pages = {"kept": "", "default": ", malloc as it is"}.get(self.pages, f", {self.pages} pages")
        shape = f"{rows} x {labels}" if self.features is None else f"{rows} x {self.features} x {labels}"
        return f"{self.loss}, {shape} {name(self.dtype)}, {targets}{per_row}{scaled}{pages}"

    def to_json(self) -> dict[str, Any]:
        target_dtype = name(self.target_dtype) if self.target_dtype else "sparse"
        return asdict(self) | {"dtype": name(self.dtype), "target_dtype": target_dtype}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        # In torch "sparse" is the name of a module.
        dtypes = {
            key: None if fields[key] == "sparse" else getattr(torch, fields[key]) for key in ("dtype", "target_dtype")
        }
        return cls(**(fields | dtypes | {"shape": tuple(fields["shape"])}))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Provider(NamedTuple):
    """One who computes a family's losses: of each, its label in a table and the function of the mean loss.

    Ours take SparseLabels, the others only tensors.
    """

    name: str
    losses: dict[str, tuple[str, MeanLoss]]
    why_not: Callable[[torch.device], str | None] = lambda device: None
    ours: bool = False


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


@dataclass
class Row:
    """What was found about one provider in one case: "ok", or "skipped", "wrong" or "failed" and a note why."""

    case: Case
    provider: str
    label: str
    ours: bool = False
    status: str = "ok"
    note: str = ""
    loss_error: float | None = None
    grad_error: float | None = None
    seconds: Quartiles | None = None
    samples: int = 0
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"case": self.case.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        seconds = fields["seconds"] and Quartiles(*fields["seconds"])
        return cls(**(fields | {"case": Case.from_json(fields["case"]), "seconds": seconds}))


def start_rows(case: Case, providers: Iterable[Provider], device: torch.device) -> list[Row]:
    """A row for each provider that has the case's loss; those that cannot run say so."""
    rows = []
    for provider in providers:
        if case.loss in provider.losses:
            reason = provider.why_not(device)
            if not provider.ours and device.type == "cpu" and _UNFUSED_TENSORS * case.logits_bytes > _memory():
                reason = f"not run: {_UNFUSED_TENSORS} logits tensors are more than this machine's memory"
            label = provider.losses[case.loss][0]
            if case.target_dtype is None and not provider.ours:
                label += f", dense {name(TWIN)} targets"
            rows.append(Row(case, provider.name, label, provider.ours, "skipped" if reason else "ok", reason or ""))
    return rows


# What an unfused formula holds at its peak, about.
_UNFUSED_TENSORS = 12


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(error: Exception) -> str:
    """An exception in one line without the paths that it may name."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'/[^ ]+/', '', lines[0])}"[:100]


def make_data(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Targets]:
    """Logits up to about ±20, so that saturation is met, and the targets."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.features is not None:
        return _behind_layer(case, generator)
    inputs = torch.empty(case.shape, dtype=case.dtype, device=device).normal_(0, 4, generator=generator)
    if case.targets == "teacher":
        targets: Tensor | SparseLabels = torch.empty_like(inputs).normal_(0, 4, generator=generator)
    else:
        targets = _make_targets(case, generator)
    return inputs.requires_grad_(), targets


def _behind_layer(case: Case, generator: torch.Generator) -> tuple[Tensor, Targets]:
    """Hidden states and a weight that make such logits."""
    (rows, labels), device = case.shape, generator.device
    assert case.features is not None
    hidden = torch.empty(rows, case.features, dtype=case.dtype, device=device).normal_(generator=generator)
    weight = torch.empty(labels, case.features, dtype=case.dtype, device=device)
    weight.normal_(0, 4 / case.features**0.5, generator=generator)
    return hidden.requires_grad_(), OfLayer(weight.requires_grad_(), _make_targets(case, generator))


def _make_targets(case: Case, generator: torch.Generator) -> Tensor | SparseLabels:
    device = generator.device
    if case.targets == "classes":
        return torch.randint(case.shape[1], case.shape[:1], device=device, generator=generator)
    if case.labels_per_row is None:
        dense = torch.empty(case.shape, dtype=case.target_dtype or TWIN, device=device)
        dense.bernoulli_(0.1, generator=generator)
        return dense if case.target_dtype else SparseLabels.from_dense(dense)
    (rows, num_labels), count = case.shape, case.labels_per_row
    drawn = torch.randint(num_labels - count + 1, (rows, count), device=device, generator=generator)
    distinct = drawn.sort(dim=1).values + torch.arange(count, device=device)
    labels = SparseLabels.from_padded(distinct, num_labels)
    return labels.to_dense(case.target_dtype) if case.target_dtype else labels


def as_tensor(targets: Targets) -> Tensor | OfLayer:
    """What a peer is given."""
    if isinstance(targets, OfLayer):
        dense = as_tensor(targets.targets)
        assert isinstance(dense, Tensor)
        return targets._replace(targets=dense)
    return targets.to_dense(TWIN) if isinstance(targets, SparseLabels) else targets


def leaves(inputs: Tensor, targets: Targets) -> list[Tensor]:
    """What gradients are computed of."""
    return [inputs, targets.weight] if isinstance(targets, OfLayer) else [inputs]


def step(case: Case, loss: MeanLoss, inputs: Tensor, targets: Targets) -> Tensor:
    """One forward and backward pass."""
    for leaf in leaves(inputs, targets):
        leaf.grad = None
    value = loss(inputs, targets)
    value.backward(None if case.upstream == 1 else torch.full_like(value, case.upstream))
    return value.detach()
