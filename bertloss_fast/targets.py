"""Multi-label targets without their zeros."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from .ops import dispatch


@dataclass(frozen=True, eq=False, repr=False)
class SparseLabels:
    """The labels of a multi-label batch without the zeros: for each row, the labels that it has.

    Row ``i`` has the labels ``col_indices[crow_indices[i] : crow_indices[i + 1]]``, sorted and distinct: ``nnz`` is the
    number of positives. The ``from_`` methods take labels in any order, count one that comes twice once, and raise
    TypeError or ValueError at what does not fit. The constructor looks at nothing.

    Build them on the CPU, in a collate function (:func:`collate_labels`), where every label is checked. On a GPU
    ``from_padded`` and ``from_dense`` wait for the device once, and leave out what is no label from 0 to L - 1 or no 1.
    ``from_csr`` and ``from_sparse_csr`` do not wait: they trust the labels to be in range, sorted and distinct, and the
    values to be 1. With ``BERTLOSS_FAST_DEBUG=1`` all four look, and raise.

    Args:
        crow_indices: where each row begins and ends, int64 ``[N + 1]``.
        col_indices: the labels, int32 or int64 ``[nnz]``.
        shape: ``(N, L)``, that of the dense targets.

    Example::

        >>> from bertloss_fast import SparseLabels
        >>> labels = SparseLabels.from_lists([[3], [], [4, 0, 4]], num_labels=5)
        >>> labels
        SparseLabels(shape=(3, 5), nnz=3, device='cpu')
        >>> labels[1:].to_dense().long()
        tensor([[0, 0, 0, 0, 0],
                [1, 0, 0, 0, 1]])
    """

    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_lists(cls, labels: Iterable[Any], num_labels: int) -> SparseLabels:
        """From the labels of each row: a list, tuple, set, 1-D array or 1-D tensor of integers."""
        num_labels = _check_integer("num_labels", num_labels, 0)
        if not isinstance(labels, Iterable):
            raise TypeError(f"labels: expected lists of integers, one a row, got {type(labels).__name__}")
        rows = [row.tolist() if isinstance(row, np.ndarray | Tensor) else row for row in labels]
        flat = torch.from_numpy(np.array(_flatten_lists(rows, num_labels), np.int64))
        counts = torch.from_numpy(np.fromiter(map(len, rows), np.int64, len(rows)))
        return cls(_offsets(counts), _narrow(flat, num_labels), (len(rows), num_labels))._canonical()

    @classmethod
    def from_padded(cls, labels: Tensor, num_labels: int, padding: int = -100) -> SparseLabels:
        """From labels ``[N, K]`` of any integer dtype; an entry equal to ``padding`` is no label."""
        num_labels = _check_integer("num_labels", num_labels, 0)
        _check_tensor("labels", labels, 2)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels: expected an integer dtype, got {_short(labels.dtype)}")
        padding = _check_integer("padding", padding)
        if 0 <= padding < num_labels:
            raise ValueError(f"padding: expected none of the labels 0 to {num_labels - 1}, got {padding}")
        values = labels.long()
        inside = (values >= 0) & (values < num_labels)
        if dispatch.can_check_values(labels.device):
            wrong = (~inside & (values != padding)).nonzero()
            if len(wrong):
                row, at = wrong[0].tolist()
                raise _outside("labels", num_labels, labels[row, at].item(), row)
        values = torch.where(inside, values, num_labels).sort(dim=1).values  # what is no label comes last
        keep = values < num_labels
        keep[:, 1:] &= values[:, 1:] != values[:, :-1]
        return cls(_offsets(keep.sum(1)), _narrow(values[keep], num_labels), (len(labels), num_labels))

    @classmethod
    def from_dense(cls, targets: Tensor) -> SparseLabels:
        """From targets ``[N, L]`` of 0 and 1, in any real dtype; soft labels stay dense."""
        _check_tensor("targets", targets, 2)
        if targets.is_complex():
            raise TypeError(f"targets: expected bool, an integer or a floating dtype, got {_short(targets.dtype)}")
        positive = targets
        if targets.dtype != torch.bool:
            _check_values("targets", targets, zeros=True)
            positive = targets == 1
        num_rows, num_labels = targets.shape
        rows, col_indices = positive.nonzero().T.contiguous()
        crow_indices = torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))
        return cls(crow_indices, _narrow(col_indices, num_labels), (num_rows, num_labels))

    @classmethod
    def from_csr(cls, crow_indices: Tensor, col_indices: Tensor, num_labels: int) -> SparseLabels:
        """From compressed rows in int32 or int64. Columns that are sorted and distinct already are not copied."""
        num_labels = _check_integer("num_labels", num_labels, 0)
        for name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            _check_tensor(name, indices, 1)
            if indices.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: expected int32 or int64, got {_short(indices.dtype)}")
        if col_indices.device != crow_indices.device:
            wanted, got = crow_indices.device, col_indices.device
            raise ValueError(f"col_indices: expected device '{wanted}' like crow_indices, got '{got}'")
        if not len(crow_indices):
            raise ValueError("crow_indices: expected one entry more than rows, got none")
        shape = (len(crow_indices) - 1, num_labels)
        labels = cls(crow_indices.long().contiguous(), col_indices.contiguous(), shape)
        if not dispatch.can_check_values(labels.device):
            return labels
        _check_offsets(crow_indices, labels.nnz)
        return labels._canonical()

    @classmethod
    def from_sparse_csr(cls, targets: Tensor) -> SparseLabels:
        """From a ``torch.sparse_csr`` tensor ``[N, L]`` of ones; on the CPU explicit zeros are dropped."""
        _check_tensor("targets", targets, 2, torch.sparse_csr)
        crow_indices, col_indices, values = targets.crow_indices(), targets.col_indices(), targets.values()
        _check_values("targets.values()", values, zeros=targets.device.type == "cpu")
        if dispatch.can_check_values(targets.device) and not values.all():
            _check_offsets(crow_indices, len(col_indices))
            crow_indices, col_indices = _select(crow_indices, col_indices, values != 0)
        return cls.from_csr(crow_indices, col_indices, targets.shape[1])

    @classmethod
    def cat(cls, parts: Iterable[SparseLabels]) -> SparseLabels:
        """The rows of all parts, which have one number of labels and one device. Nothing waits."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one SparseLabels, got none")
        for part in parts:
            if not isinstance(part, SparseLabels):
                raise TypeError(f"parts: expected SparseLabels, got {type(part).__name__}")
        offsets, total = [parts[0].crow_indices[:1]], 0
        for part in parts:
            for name in ("num_labels", "device"):
                wanted, got = getattr(parts[0], name), getattr(part, name)
                if got != wanted:
                    raise ValueError(f"parts: expected {name} {wanted} like the first one's, got {got}")
            offsets.append(part.crow_indices[1:] + total)
            total += part.nnz
        shape = (sum(map(len, parts)), parts[0].num_labels)
        return cls(torch.cat(offsets), torch.cat([part.col_indices for part in parts]), shape)

    @property
    def num_labels(self) -> int:
        """How many labels there are: L."""
        return self.shape[1]

    @property
    def nnz(self) -> int:
        """How many positives there are; nothing waits for it."""
        return self.col_indices.numel()

    @property
    def device(self) -> torch.device:
        """Where the indices lie."""
        return self.col_indices.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> SparseLabels:
        """The rows of a slice, of a mask ``[N]`` or of a vector of row numbers. On a GPU this waits for the device."""
        if isinstance(rows, slice):
            wanted = range(len(self))[rows]
            picked = wanted.start + wanted.step * torch.arange(len(wanted), device=self.device)
        else:
            picked = torch.arange(len(self), device=self.device)[rows]
        if picked.dim() != 1:
            raise TypeError(f"rows: expected a slice, a mask or a vector (i : i + 1 takes row i), got {rows!r}")
        counts = self.crow_indices.diff()[picked]
        offsets = _offsets(counts)
        shift = (self.crow_indices[picked] - offsets[:-1]).repeat_interleave(counts)
        col_indices = self.col_indices[shift + torch.arange(len(shift), device=self.device)]
        return SparseLabels(offsets, col_indices, (len(picked), self.num_labels))

    def to_dense(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """Targets ``[N, L]``: 1 where a row has the label."""
        dense = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        dense[self._rows(), self.col_indices.long()] = True
        return dense.to(dtype)

    def to(
        self, device: torch.device | str | int | None = None, *, non_blocking: bool = False, copy: bool = False
    ) -> SparseLabels:
        """The same labels on another device, as a tensor's ``to``; their dtypes stay."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: expected a device, since labels keep their dtypes; got {_short(device)}")
        return self._map(lambda indices: indices.to(device=device, non_blocking=non_blocking, copy=copy))

    def cpu(self) -> SparseLabels:
        """The same labels on the CPU."""
        return self.to("cpu")

    def pin_memory(self, device: torch.device | str | None = None) -> SparseLabels:
        """The same labels in page-locked memory, from which ``to(device, non_blocking=True)`` does not wait."""
        return self._map(lambda indices: indices.pin_memory(device))

    def is_pinned(self) -> bool:
        """Whether the labels are in page-locked memory."""
        return self.crow_indices.is_pinned()  # col_indices may be empty, and no bytes are never pinned

    def __repr__(self) -> str:
        if not isinstance(self.col_indices, Tensor):  # a tree_map made something else of it
            return f"SparseLabels({self.crow_indices!r}, {self.col_indices!r}, shape={self.shape})"
        return f"SparseLabels(shape={self.shape}, nnz={self.nnz}, device='{self.device}')"

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseLabels, (self.crow_indices, self.col_indices, self.shape)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseLabels:
        return SparseLabels(function(self.crow_indices), function(self.col_indices), self.shape)

    def _rows(self) -> Tensor:
        """The row of each label."""
        rows = torch.arange(len(self), device=self.device)
        return rows.repeat_interleave(self.crow_indices.diff(), output_size=self.nnz)

    def _canonical(self) -> SparseLabels:
        """Checks the labels and makes each row's sorted and distinct; the same object where they are so already."""
        if not self.nnz:
            return self
        rows, labels = self._rows(), self.col_indices
        low, high = (label.item() for label in labels.aminmax())
        if low < 0 or high >= self.num_labels:
            wrong = low if low < 0 else high
            raise _outside("col_indices", self.num_labels, wrong, int(rows[labels == wrong][0]))
        rising = _rising(rows, labels)
        if rising.all():
            return self
        if self.device.type != "cpu":  # without DEBUG the result would be wrong: to mend it here would hide that
            at = int((~rising).nonzero()[0])
            got = f"{labels[at]} after {labels[at - 1]} in row {rows[at]}"
            raise ValueError(f"col_indices: expected sorted and distinct labels in each row, got {got}")
        labels = labels[torch.from_numpy(np.lexsort((labels.numpy(), rows.numpy())))]
        return SparseLabels(*_select(self.crow_indices, labels, _rising(rows, labels)), self.shape)


pytree.register_pytree_node(
    SparseLabels,
    lambda labels: ([labels.crow_indices, labels.col_indices], labels.shape),
    lambda indices, shape: SparseLabels(*indices, shape),  # type: ignore[call-arg]
    serialized_type_name="bertloss_fast.SparseLabels",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda labels: (
        [(pytree.GetAttrKey(name), getattr(labels, name)) for name in ("crow_indices", "col_indices")],
        labels.shape,
    ),
)
torch.serialization.add_safe_globals([SparseLabels])  # torch.load takes them with weights_only, its default


def _offsets(counts: Tensor) -> Tensor:
    return pad(counts.cumsum(0), (1, 0))


def _narrow(labels: Tensor, num_labels: int) -> Tensor:
    return labels.to(torch.int32 if num_labels < 2**31 else torch.int64)


def _rising(rows: Tensor, labels: Tensor) -> Tensor:
    """Where a label follows a smaller one of its row, or is the first."""
    return pad((rows.diff() > 0) | (labels.diff() > 0), (1, 0), value=True)


def _select(crow_indices: Tensor, col_indices: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    return _offsets(keep)[crow_indices], col_indices[keep]


def _flatten_lists(rows: list[Any], num_labels: int) -> list[Any]:
    """All labels in one list, checked: types as a set, so that no Python code runs for each label."""
    wrong = [kind for kind in set(map(type, rows)) if not issubclass(kind, Collection) or issubclass(kind, str | bytes)]
    if wrong:
        row = next(row for row, labels in enumerate(rows) if type(labels) in wrong)
        raise TypeError(f"labels: expected a list of integers in row {row}, got {type(rows[row]).__name__}")
    flat = list(chain.from_iterable(rows))
    wrong = [kind for kind in set(map(type, flat)) if kind is bool or not issubclass(kind, int | np.integer)]
    if wrong:
        row, label = next((row, label) for row, labels in enumerate(rows) for label in labels if type(label) in wrong)
        raise TypeError(f"labels: expected integers, got {type(label).__name__} in row {row}")
    if flat and not 0 <= min(flat) <= max(flat) < num_labels:
        pairs = ((row, label) for row, labels in enumerate(rows) for label in labels)
        row, label = next((row, label) for row, label in pairs if not 0 <= label < num_labels)
        raise _outside("labels", num_labels, label, row)
    return flat


def _outside(name: str, num_labels: int, label: float, row: int) -> ValueError:
    return ValueError(f"{name}: expected 0 <= label < {num_labels}, got {label} in row {row}")


def _check_integer(name: str, value: int, low: int = -(2**63)) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if not low <= value < 2**63:
        raise ValueError(f"{name}: expected {low} <= {name} < {2**63}, got {value}")
    return int(value)


def _check_tensor(name: str, value: object, dims: int, layout: torch.layout = torch.strided) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != layout or value.is_nested:
        got = "nested" if value.is_nested else _short(value.layout)
        raise TypeError(f"{name}: expected layout {_short(layout)}, got {got}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")


def _check_values(name: str, values: Tensor, *, zeros: bool) -> None:
    """Values 1, or also 0, where a look at them is free."""
    if dispatch.can_check_values(values.device):
        wrong = values != 1
        if zeros:
            wrong &= values != 0
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{name}: expected {'0 or 1' if zeros else '1'}, got {values[at].item()} at {at}")


def _check_offsets(crow_indices: Tensor, nnz: int) -> None:
    falls = (crow_indices.diff() < 0).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        before, got = crow_indices[at - 1 : at + 1].tolist()
        raise ValueError(f"crow_indices: expected no decrease, got {got} after {before} at {at}")
    first, last = crow_indices[[0, -1]].tolist()
    if (first, last) != (0, nnz):
        raise ValueError(
            f"crow_indices: expected to begin with 0 and to end with {nnz}, the number of col_indices, "
            f"got {first} and {last}"
        )


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")
