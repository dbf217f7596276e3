"""SparseLabels: what goes in comes out, canonical, against rows of Python sets; and what does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from target_cases import (
    COL,
    CROW,
    LABELS,
    PADDED,
    ROWS,
    L,
    Rows,
    check,
    csr,
    dense_of,
    padded,
    soft,
    sparse_csr,
    with_values,
)
from torch.utils import _pytree as pytree
from torch.utils.data._utils.pin_memory import pin_memory

from bertloss_fast import SparseLabels

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def ones_csr(rows: Rows, num_labels: int) -> torch.Tensor:
    crow, col = csr(rows)
    return torch.sparse_csr_tensor(crow, col, torch.ones(len(col)), (len(rows), num_labels), check_invariants=False)


BUILDERS: dict[str, Callable[[Rows, int], SparseLabels]] = {
    "lists": SparseLabels.from_lists,
    "tuples": lambda rows, n: SparseLabels.from_lists(tuple(map(tuple, rows)), n),
    "sets": lambda rows, n: SparseLabels.from_lists(map(set, rows), n),
    "arrays": lambda rows, n: SparseLabels.from_lists([np.array(row, np.uint8) for row in rows], n),
    "tensors": lambda rows, n: SparseLabels.from_lists([torch.tensor(row, dtype=torch.int16) for row in rows], n),
    "numpy's integers": lambda rows, n: SparseLabels.from_lists([list(np.array(row, np.int32)) for row in rows], n),
    "padded int64": lambda rows, n: SparseLabels.from_padded(padded(rows, -100, torch.int64), n),
    "padded int8 with -1": lambda rows, n: SparseLabels.from_padded(padded(rows, -1, torch.int8), n, padding=-1),
    "padded uint8 with L": lambda rows, n: SparseLabels.from_padded(padded(rows, n, torch.uint8), n, n),
    "padded uint16": lambda rows, n: SparseLabels.from_padded(padded(rows, 65535, torch.uint16), n, padding=65535),
    "dense bool": lambda rows, n: SparseLabels.from_dense(dense_of(rows, n)),
    "dense transposed": lambda rows, n: SparseLabels.from_dense(dense_of(rows, n).T.contiguous().T),
    "dense int64": lambda rows, n: SparseLabels.from_dense(dense_of(rows, n).long()),
    "dense uint16": lambda rows, n: SparseLabels.from_dense(dense_of(rows, n).to(torch.uint16)),
    "dense bfloat16": lambda rows, n: SparseLabels.from_dense(dense_of(rows, n).bfloat16()),
    "CSR int64": lambda rows, n: SparseLabels.from_csr(*csr(rows), n),
    "CSR int32": lambda rows, n: SparseLabels.from_csr(*csr(rows, torch.int32), n),
    "CSR strided": lambda rows, n: SparseLabels.from_csr(csr(rows)[0], csr(rows)[1].repeat_interleave(2)[::2], n),
    "torch's CSR": lambda rows, n: SparseLabels.from_sparse_csr(ones_csr(rows, n)),
    "torch's CSR with zeros": lambda rows, n: SparseLabels.from_sparse_csr(sparse_csr(rows, n, torch.float32)),
    "torch's CSR of bool": lambda rows, n: SparseLabels.from_sparse_csr(sparse_csr(rows, n, torch.bool)),
}


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, int]:
    """Ragged rows in any order, with duplicates; no rows, empty rows and no labels at all among them."""
    num_labels = draw(st.integers(0, 7))
    row = st.lists(st.integers(0, num_labels - 1), max_size=9) if num_labels else st.just([])
    return draw(st.lists(row, max_size=5)), num_labels


@pytest.mark.parametrize("builder", BUILDERS)
@given(batch=batches())
def test_canonical_from_anything(builder: str, batch: tuple[Rows, int]) -> None:
    check(BUILDERS[builder](*batch), *batch)


@given(parts=st.lists(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=4), min_size=1, max_size=4))
def test_cat(parts: list[Rows]) -> None:
    check(SparseLabels.cat([SparseLabels.from_lists(rows, L) for rows in parts]), list(chain(*parts)), L)


# What the caller's tensors already are is taken as it is; what is built gets the smaller dtype that holds any label.
@pytest.mark.parametrize(
    ("num_labels", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64), (2**40, torch.int64)]
)
def test_the_largest_label(num_labels: int, dtype: torch.dtype) -> None:
    last = num_labels - 1
    for labels in (
        SparseLabels.from_lists([[0], [last, 1]], num_labels),
        SparseLabels.from_padded(torch.tensor([[0, -100], [last, 1]]), num_labels),
    ):
        assert (labels.col_indices.tolist(), labels.col_indices.dtype) == ([0, 1, last], dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_canonical_csr_is_not_copied(dtype: torch.dtype) -> None:
    crow, col = csr([sorted(set(row)) for row in ROWS], dtype)
    for labels in (
        SparseLabels.from_csr(crow, col, L),
        SparseLabels.from_sparse_csr(
            torch.sparse_csr_tensor(crow, col, col >= 0, (len(ROWS), L), check_invariants=True)
        ),
    ):
        assert labels.col_indices.data_ptr() == col.data_ptr()
        assert labels.col_indices.dtype == dtype
    assert SparseLabels.from_csr(*csr(ROWS, dtype), L).col_indices.dtype == dtype


ROWS_TAKEN: list[tuple[Any, list[int]]] = [
    *((index, list(range(4)[index])) for index in map(slice, [None, 1, 3, -2, 2, -9, 7], [None, 3, 1, None, 2, 9, 9])),
    *((index, list(range(4)[index])) for index in (slice(None, None, 2), slice(None, 0, -1))),
    (torch.tensor([2, 0, 2, -1]), [2, 0, 2, 3]),
    (torch.tensor([], dtype=torch.int64), []),
    (torch.tensor([True, False, True, False]), [0, 2]),
    (np.array([3, 2]), [3, 2]),
    ([1, 2], [1, 2]),
]


@pytest.mark.parametrize(("index", "rows"), ROWS_TAKEN, ids=str)
def test_rows_by_index(index: Any, rows: list[int]) -> None:
    check(SparseLabels.from_lists(ROWS, L)[index], [ROWS[row] for row in rows], L)


def test_values_are_not_looked_at_where_that_costs_a_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. What is built there is safe to read with all the same; CSR is taken at its word, and not copied."""
    monkeypatch.setattr("bertloss_fast.ops.dispatch.can_check_values", lambda device: False)
    check(SparseLabels.from_padded(torch.tensor([[7, 1, -3, 1], [5, -100, 4, 0]]), L), [[1], [4, 0]], L)
    check(SparseLabels.from_dense(soft(0.25)), [[3, 0], [], [1, 2, 4], [0]], L)
    col = torch.tensor([9, 4, 4])
    assert SparseLabels.from_csr(torch.tensor([0, 3]), col, L).col_indices is col
    assert SparseLabels.from_sparse_csr(with_values(0.5)).nnz == 3
    assert SparseLabels.from_csr(CROW.to("meta"), COL.to("meta"), L).device.type == "meta"


def test_immutable() -> None:
    labels = SparseLabels.from_lists(ROWS, L)
    for name in ("crow_indices", "col_indices", "shape", "nnz", "other"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(labels, name, None)


def test_repr() -> None:
    assert repr(LABELS) == "SparseLabels(shape=(4, 5), nnz=6, device='cpu')"
    assert repr(pytree.tree_map(lambda tensor: None, LABELS)) == "SparseLabels(None, None, shape=(4, 5))"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int64, torch.bfloat16, torch.float64])
def test_to_dense_in_a_dtype(dtype: torch.dtype) -> None:
    dense = LABELS.to_dense(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, dense_of(ROWS, L).to(dtype))


def test_to_takes_what_accelerate_gives() -> None:
    for moved in (
        LABELS.to("meta"),
        LABELS.to(torch.device("meta"), non_blocking=True),
        LABELS.to(device="meta", non_blocking=False),
    ):
        assert {moved.device.type, moved.crow_indices.device.type} == {"meta"}
        assert (moved.shape, moved.nnz) == (LABELS.shape, LABELS.nnz)
    for same in (LABELS.cpu(), LABELS.to("cpu"), LABELS.to()):
        assert same.col_indices is LABELS.col_indices
    copied = LABELS.to("cpu", copy=True)
    check(copied, ROWS, L)
    assert copied.col_indices.data_ptr() != LABELS.col_indices.data_ptr()


def test_data_loaders_pin_both_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: any(tensor is other for other in pinned))
    labels = pin_memory({"labels": [LABELS]})["labels"][0]
    check(labels, ROWS, L)
    assert labels.is_pinned()
    assert not LABELS.is_pinned()
    assert len(pinned) == 2


def saved(labels: SparseLabels, **options: bool) -> SparseLabels:
    file = io.BytesIO()
    torch.save({"labels": labels}, file)
    file.seek(0)
    return torch.load(file, **options)["labels"]


@pytest.mark.parametrize(
    "copied",
    [
        lambda labels: pickle.loads(pickle.dumps(labels)),
        copy.deepcopy,
        saved,
        lambda labels: saved(labels, weights_only=False),
    ],
    ids=["pickle", "deepcopy", "torch.save", "torch.save, not weights only"],
)
def test_copies(copied: Callable[[SparseLabels], SparseLabels]) -> None:
    labels = copied(LABELS)
    check(labels, ROWS, L)
    assert labels.col_indices.data_ptr() != LABELS.col_indices.data_ptr()
    assert copy.copy(LABELS).col_indices is LABELS.col_indices


def test_pytree() -> None:
    leaves, spec = pytree.tree_flatten({"x": 1, "y": LABELS})
    assert leaves[0] == 1
    assert leaves[1] is LABELS.crow_indices
    assert leaves[2] is LABELS.col_indices
    check(pytree.tree_unflatten(leaves, spec)["y"], ROWS, L)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    names = pytree.tree_map_with_path(lambda path, leaf: pytree.keystr(path), {"y": LABELS})
    assert (names["y"].crow_indices, names["y"].col_indices) == ("['y'].crow_indices", "['y'].col_indices")
    for child in (None, object(), torch.tensor([-5])):  # unflattening looks at no value: fakes and placeholders pass
        labels = pytree.tree_unflatten([child, child], pytree.tree_structure(LABELS))
        assert labels.crow_indices is labels.col_indices is child
        assert labels.shape == LABELS.shape


def test_in_a_compiled_graph() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def double(labels: SparseLabels) -> tuple[SparseLabels, int]:
        return SparseLabels.cat([labels, SparseLabels.from_csr(labels.crow_indices, labels.col_indices, L)]), labels.nnz

    for rows in (ROWS, ROWS[:3]):
        labels, nnz = double(SparseLabels.from_lists(rows, L))
        check(labels, rows + rows, L)
        assert nnz == sum(len(set(row)) for row in rows)


def test_a_default_device_does_not_move_lists() -> None:
    with torch.device("meta"):
        labels = SparseLabels.from_lists(ROWS, L)
        others = (labels[1:], SparseLabels.cat([labels, labels]), SparseLabels.from_dense(LABELS.to_dense()))
    for made, rows in zip((labels, *others), (ROWS, ROWS[1:], ROWS + ROWS, ROWS), strict=True):
        check(made, rows, L)


@pytest.mark.gpu
def test_nothing_waits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = LABELS.pin_memory()
    tensor = dense_of(ROWS, L).float().cuda().to_sparse_csr()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to("cuda", non_blocking=True)
        built = SparseLabels.from_csr(moved.crow_indices, moved.col_indices, L)
        both = SparseLabels.cat([built, SparseLabels.from_sparse_csr(tensor)])
        dense = both.to_dense()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pinned.is_pinned()
    check(both.cpu(), ROWS + ROWS, L)
    assert torch.equal(dense.cpu(), dense_of(ROWS + ROWS, L))
    check(both[::3].cpu(), (ROWS + ROWS)[::3], L)
    check(SparseLabels.from_padded(PADDED.cuda(), L).cpu(), ROWS, L)
    check(SparseLabels.from_dense(dense).cpu(), ROWS + ROWS, L)

    monkeypatch.setenv("BERTLOSS_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match=r"col_indices: expected sorted and distinct .*, got 0 after 3 in row 0"):
        SparseLabels.from_csr(CROW.cuda(), COL.cuda(), L)
    with pytest.raises(ValueError, match=r"targets.values\(\): expected 1, got 0.0"):
        SparseLabels.from_sparse_csr(sparse_csr(ROWS, L, torch.float32).cuda())
    with pytest.raises(ValueError, match=r"labels: .* got 4 in row 2"):
        SparseLabels.from_padded(PADDED.cuda(), 4)
