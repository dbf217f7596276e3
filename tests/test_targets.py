"""SparseLabels: what goes in comes out, canonical, against rows of Python sets; and what does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from bertloss_fast import SparseLabels, collate_labels

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

Rows = list[list[int]]
ROWS: Rows = [[3, 0], [], [4, 1, 4, 2], [0]]
L = 5


def dense_of(rows: Rows, num_labels: int) -> torch.Tensor:
    dense = torch.zeros(len(rows), num_labels, dtype=torch.bool)
    for row, labels in enumerate(rows):
        for label in labels:
            dense[row, label] = True
    return dense


def check(labels: SparseLabels, rows: Rows, num_labels: int) -> None:
    distinct = [sorted(set(row)) for row in rows]
    assert labels.crow_indices.tolist() == list(accumulate(map(len, distinct), initial=0))
    assert labels.col_indices.tolist() == list(chain(*distinct))
    assert labels.crow_indices.dtype == torch.int64
    assert labels.crow_indices.is_contiguous()
    assert labels.col_indices.is_contiguous()
    assert (labels.shape, len(labels), labels.num_labels) == ((len(rows), num_labels), len(rows), num_labels)
    assert type(labels.shape) is tuple
    assert labels.nnz == sum(map(len, distinct))
    assert torch.equal(labels.to_dense(), dense_of(rows, num_labels))


def padded(rows: Rows, padding: int, dtype: torch.dtype) -> torch.Tensor:
    """Padding on the left of odd rows, on the right of even ones, and one column of nothing else."""
    width = max(map(len, rows), default=0) + 1
    fill = [[padding] * (width - len(row)) for row in rows]
    table = [fill[i] + row if i % 2 else row + fill[i] for i, row in enumerate(rows)]
    return torch.tensor(table, dtype=dtype).reshape(len(rows), width)


def csr(rows: Rows, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    crow = torch.tensor(list(accumulate(map(len, rows), initial=0)), dtype=dtype)
    return crow, torch.tensor(list(chain(*rows)), dtype=dtype)


def sparse_csr(rows: Rows, num_labels: int, dtype: torch.dtype) -> torch.Tensor:
    """Each row's labels, then an explicit zero at each label that it has not."""
    full = [row + [label for label in range(num_labels) if label not in row] for row in rows]
    values = torch.tensor(
        [float(i < len(row)) for row, all_of in zip(rows, full, strict=True) for i in range(len(all_of))]
    )
    crow, col = csr(full, torch.int32)
    return torch.sparse_csr_tensor(crow, col, values.to(dtype), (len(rows), num_labels), check_invariants=False)


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


def soft(value: float) -> torch.Tensor:
    dense = dense_of(ROWS, L).double()
    dense[2, 3] = value
    return dense


LABELS = SparseLabels.from_lists(ROWS, L)
CROW, COL = csr(ROWS)
PADDED = padded(ROWS, -100, torch.int64)
LISTS, PAD, DENSE = SparseLabels.from_lists, SparseLabels.from_padded, SparseLabels.from_dense
CSR, TORCH_CSR, CAT = SparseLabels.from_csr, SparseLabels.from_sparse_csr, SparseLabels.cat


def with_values(value: float) -> torch.Tensor:
    values = torch.tensor([1.0, 1.0, value])
    return torch.sparse_csr_tensor(*csr([[1], [0, 3]]), values, (2, L), check_invariants=True)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)


# function, arguments, error, what its sentence says
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = {
    "lists: too large": (LISTS, ([[0], [], [4, 7]], L), ValueError, "labels: expected 0 <= label < 5, got 7 in row 2"),
    "lists: L itself": (LISTS, ([[5]], L), ValueError, "labels: .* got 5 in row 0"),
    "lists: negative": (LISTS, ([[0], [-1]], L), ValueError, "labels: .* got -1 in row 1"),
    "lists: beyond 64 bits": (LISTS, ([[0], [2**70]], L), ValueError, f"labels: .* got {2**70} in row 1"),
    "lists: an unsigned one": (LISTS, ([np.array([2**64 - 1], np.uint64)], L), ValueError, f"got {2**64 - 1} in row 0"),
    "lists: no labels at all": (LISTS, ([[], [0]], 0), ValueError, "0 <= label < 0, got 0 in row 1"),
    "lists: a float": (LISTS, ([[0], [1, 2.0]], L), TypeError, "labels: expected integers, got float in row 1"),
    "lists: a bool among integers": (LISTS, ([[0, True]], L), TypeError, "labels: .* got bool in row 0"),
    "lists: numpy's bool": (LISTS, ([[np.True_]], L), TypeError, "labels: .* got bool.* in row 0"),
    "lists: a string": (LISTS, ([[0], ["3"]], L), TypeError, "labels: .* got str in row 1"),
    "lists: a row that is a string": (
        LISTS,
        ([[0], "3"], L),
        TypeError,
        "expected a list of integers in row 1, got str",
    ),
    "lists: a flat list": (LISTS, ([3, 4], L), TypeError, "labels: expected a list of integers in row 0, got int"),
    "lists: None for no labels": (LISTS, ([[1], None], L), TypeError, "labels: .*in row 1, got NoneType"),
    "lists: a float array": (LISTS, ([np.array([1.0])], L), TypeError, "labels: .* got float in row 0"),
    "lists: a bool tensor": (LISTS, ([torch.tensor([True])], L), TypeError, "labels: .* got bool in row 0"),
    "lists: a matrix": (LISTS, ([torch.zeros(1, 2).int()], L), TypeError, "labels: .* got list in row 0"),
    "lists: a scalar tensor": (LISTS, ([torch.tensor(3)], L), TypeError, "labels: .*in row 0, got int"),
    "num_labels: a float": (LISTS, (ROWS, 5.0), TypeError, "num_labels: expected an integer, got float"),
    "num_labels: a bool": (PAD, (PADDED, True), TypeError, "num_labels: expected an integer, got bool"),
    "num_labels: negative": (CSR, (CROW, COL, -1), ValueError, "num_labels: expected 0 <= num_labels .*, got -1"),
    "num_labels: huge": (LISTS, (ROWS, 2**63), ValueError, f"num_labels: .*got {2**63}"),
    "padded: too large": (PAD, (PADDED, 4), ValueError, "labels: expected 0 <= label < 4, got 4 in row 2"),
    "padded: other padding": (PAD, (PADDED, L, -1), ValueError, "labels: .* got -100 in row 0"),
    "padded: padding is a label": (PAD, (PADDED, L, 4), ValueError, "padding: .* labels 0 to 4, got 4"),
    "padded: padding of a float": (PAD, (PADDED, L, -1.0), TypeError, "padding: expected an integer, got float"),
    "padded: padding beyond 64 bits": (PAD, (PADDED, L, 2**64), ValueError, f"padding: .* got {2**64}"),
    "padded: lists": (PAD, (ROWS, L), TypeError, "labels: expected a tensor, got list"),
    "padded: floats": (PAD, (PADDED.float(), L), TypeError, "labels: expected an integer dtype, got float32"),
    "padded: bools": (PAD, (PADDED > 0, L), TypeError, "labels: expected an integer dtype, got bool"),
    "padded: a vector": (PAD, (PADDED[0], L), ValueError, r"labels: expected 2 dimensions, got shape \(5,\)"),
    "padded: a large unsigned": (
        PAD,
        (torch.tensor([[2**64 - 1]], dtype=torch.uint64), L),
        ValueError,
        f"got {2**64 - 1} in row 0",
    ),
    "dense: soft": (DENSE, (soft(0.25),), ValueError, r"targets: expected 0 or 1, got 0.25 at \(2, 3\)"),
    "dense: NaN": (DENSE, (soft(float("nan")),), ValueError, r"targets: .* got nan at \(2, 3\)"),
    "dense: ignored": (DENSE, (soft(-100).int(),), ValueError, r"targets: .* got -100 at \(2, 3\)"),
    "dense: complex": (DENSE, (soft(1).cfloat(),), TypeError, "targets: .* got complex64"),
    "dense: 3-D": (DENSE, (soft(1)[None],), ValueError, r"targets: expected 2 dimensions, got shape \(1, 4, 5\)"),
    "dense: sparse": (DENSE, (soft(1).to_sparse(),), TypeError, "targets: expected layout strided, got sparse_coo"),
    "dense: nested": (lambda: DENSE(nested()), (), TypeError, "targets: .* got nested"),
    "CSR: too large": (CSR, (CROW, COL, 4), ValueError, "col_indices: expected 0 <= label < 4, got 4 in row 2"),
    "CSR: negative": (CSR, (CROW, COL - 1, L), ValueError, "col_indices: .* got -1 in row 0"),
    "CSR: decreasing": (CSR, (CROW.new_tensor([0, 4, 3, 7]), COL, L), ValueError, "no decrease, got 3 after 4 at 2"),
    "CSR: begins late": (CSR, (CROW + 1, COL, L), ValueError, "crow_indices: .*begin with 0 .* with 7.*, got 1 and 8"),
    "CSR: ends early": (CSR, (CROW[:-1], COL, L), ValueError, "crow_indices: .*to end with 7.*, got 0 and 6"),
    "CSR: no offsets": (CSR, (CROW[:0], COL, L), ValueError, "crow_indices: expected one entry more .*, got none"),
    "CSR: float offsets": (
        CSR,
        (CROW.float(), COL, L),
        TypeError,
        "crow_indices: expected int32 or int64, got float32",
    ),
    "CSR: short columns": (CSR, (CROW, COL.short(), L), TypeError, "col_indices: expected int32 or int64, got int16"),
    "CSR: a matrix": (CSR, (CROW, COL[None], L), ValueError, r"col_indices: expected 1 dimensions, got shape \(1, 7\)"),
    "CSR: a list": (CSR, ([0], COL, L), TypeError, "crow_indices: expected a tensor, got list"),
    "CSR: two devices": (CSR, (CROW, COL.to("meta"), L), ValueError, "col_indices: .*'cpu' like crow.*, got 'meta'"),
    "torch's CSR: dense": (TORCH_CSR, (soft(1),), TypeError, "targets: expected layout sparse_csr, got strided"),
    "torch's CSR: soft": (
        lambda: TORCH_CSR(with_values(0.5)),
        (),
        ValueError,
        r"targets.values\(\): expected 0 or 1, got 0.5 at \(2,\)",
    ),
    "torch's CSR: batched": (
        lambda: TORCH_CSR(torch.ones(2, 2, 2).to_sparse_csr()),
        (),
        ValueError,
        "targets: expected 2 dimensions",
    ),
    "cat: nothing": (CAT, ([],), ValueError, "parts: expected at least one SparseLabels, got none"),
    "cat: a tensor": (CAT, ([LABELS, PADDED],), TypeError, "parts: expected SparseLabels, got Tensor"),
    "cat: other labels": (CAT, ([LABELS, LISTS(ROWS, 6)],), ValueError, "parts: expected num_labels 5 .*, got 6"),
    "cat: elsewhere": (CAT, ([LABELS, LABELS.to("meta")],), ValueError, "parts: expected device cpu .*, got meta"),
    "row: an integer": (LABELS.__getitem__, (1,), TypeError, r"rows: expected a slice.*\(i : i \+ 1 .*, got 1"),
    "row: a matrix": (LABELS.__getitem__, (torch.zeros(1, 1).long(),), TypeError, "rows: expected .*vector"),
    "row: too large": (LABELS.__getitem__, (torch.tensor([4]),), IndexError, "out of bounds"),
    "to: a dtype": (LABELS.to, (torch.float16,), TypeError, "device: expected a device.*; got float16"),
    "collate: num_labels": (collate_labels, (None,), TypeError, "num_labels: expected an integer, got NoneType"),
    "collate: no dicts": (collate_labels(L), (["text"],), TypeError, "batch: expected dicts, tuples or lists, got str"),
    "collate: no such key": (
        collate_labels(L),
        ([{"labels": [1]}, {"label": [1]}],),
        ValueError,
        "key: expected a key .* every item has, got 'labels'",
    ),
    "collate: no such place": (collate_labels(L, key=2), ([(1, [1])],), ValueError, "key: .* got 2"),
    "collate: a key of tuples": (collate_labels(L, key="labels"), ([(1, [1])],), ValueError, "key: .* got 'labels'"),
    "collate: ragged items": (collate_labels(L), ([(1, [1]), (1, 2, [1])],), ValueError, r"one length, got \[2, 3\]"),
    "collate: a label": (collate_labels(L), ([(1, [1]), (1, [9])],), ValueError, "labels: .* got 9 in row 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case: str) -> None:
    function, args, error, sentence = CASES[case]
    with pytest.raises(error, match=sentence):
        function(*args)


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


class Item(NamedTuple):
    labels: list[int]
    x: float


def join(texts: list[str]) -> str:
    return "".join(texts)


def keys_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"seen": [sorted(item) for item in items]}


# collate, an item of its number and its labels, the batch, in which Y stands for the labels
Y, IDS = "labels", [0, 1, 2, 3]
BATCHES: dict[str, tuple[Callable[[list[Any]], Any], Callable[[int, list[int]], Any], Any]] = {
    "tuples": (collate_labels(L), lambda i, row: (i, row), [IDS, Y]),
    "lists": (collate_labels(L), lambda i, row: [i, i, row], [IDS, IDS, Y]),
    "the first": (collate_labels(L, key=0), lambda i, row: (set(row), i), [Y, IDS]),
    "named tuples": (collate_labels(L, key=0), lambda i, row: Item(row, i), Item(Y, IDS)),
    "dicts": (
        collate_labels(L),
        lambda i, row: {"labels": torch.tensor(row), "x": torch.tensor([i])},
        {"x": [[0], [1], [2], [3]], "labels": Y},
    ),
    "another key": (collate_labels(L, key="y"), lambda i, row: {"y": row, "labels": i}, {"labels": IDS, "y": Y}),
    "labels alone": (collate_labels(L), lambda i, row: {"labels": row}, {"labels": Y}),
    "another collate": (collate_labels(L, collate=join), lambda i, row: (str(i), row), ["0123", Y]),
    "another collate of dicts": (
        collate_labels(L, collate=keys_of),
        lambda i, row: {"labels": row, "text": str(i), "id": i},
        {"seen": [["id", "text"]] * 4, "labels": Y},
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_collate(case: str) -> None:
    collate, item, expected = BATCHES[case]
    items = [item(i, row) for i, row in enumerate(ROWS)]
    before = repr(items)

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, SparseLabels):
            check(leaf, ROWS, L)
            return Y
        return leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf

    for function in (collate, pickle.loads(pickle.dumps(collate))):  # as spawned workers get it
        batch = function(items)
        got = pytree.tree_map(plain, batch, is_leaf=lambda leaf: isinstance(leaf, SparseLabels))
        assert (type(batch), got) == (type(expected), expected)
    assert repr(items) == before


def test_data_loader_with_workers() -> None:
    dataset: Any = [(torch.tensor([float(i)]), ROWS[i % 4]) for i in range(12)]
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=collate_labels(L))
    batches = list(loader)
    assert torch.cat([x for x, _ in batches]).flatten().tolist() == list(range(12))
    check(SparseLabels.cat([labels for _, labels in batches]), ROWS * 3, L)


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
