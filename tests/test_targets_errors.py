"""What SparseLabels and collate_labels refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from target_cases import COL, CROW, LABELS, PADDED, ROWS, L, soft, with_values

from bertloss_fast import SparseLabels, collate_labels

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

LISTS, PAD, DENSE = SparseLabels.from_lists, SparseLabels.from_padded, SparseLabels.from_dense
CSR, TORCH_CSR, CAT = SparseLabels.from_csr, SparseLabels.from_sparse_csr, SparseLabels.cat


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
