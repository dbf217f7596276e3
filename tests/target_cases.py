"""Labels of a few rows in every form, and what SparseLabels of them must hold."""

from __future__ import annotations

from itertools import accumulate, chain

import torch

from bertloss_fast import SparseLabels

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


LABELS = SparseLabels.from_lists(ROWS, L)
CROW, COL = csr(ROWS)
PADDED = padded(ROWS, -100, torch.int64)


def soft(value: float) -> torch.Tensor:
    dense = dense_of(ROWS, L).double()
    dense[2, 3] = value
    return dense


def with_values(value: float) -> torch.Tensor:
    values = torch.tensor([1.0, 1.0, value])
    return torch.sparse_csr_tensor(*csr([[1], [0, 3]]), values, (2, L), check_invariants=True)
