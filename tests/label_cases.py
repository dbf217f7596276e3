"""Scores and labels for the tests of the metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


def random_case(rows: int, num_labels: int, seed: int, ignored: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits without ties and multi-hot labels; some rows without any, some labels too."""
    generator = np.random.default_rng(seed)
    logits = generator.permutation(rows * num_labels).reshape(rows, num_labels) / (rows * num_labels) * 6 - 3
    labels = generator.random((rows, num_labels)) < generator.random((rows, 1)) * 0.8
    return logits, np.where(generator.random(labels.shape) < ignored, -100, labels.astype(np.int64))


def padded(labels: np.ndarray) -> np.ndarray:
    """Indices padded with -100, a column more than labels, as the collator makes where the widths would be equal."""
    rows = [torch.from_numpy(np.flatnonzero(row == 1)) for row in labels]
    made = pad_sequence(rows, batch_first=True, padding_value=-100)
    return pad(made, (0, labels.shape[1] + 1 - made.shape[1]), value=-100).numpy()


def scikit_learn() -> Any:
    """Its metrics. Without them the test is skipped, or the file that asks while it is imported."""
    return pytest.importorskip("sklearn.metrics", reason='pip install "bertloss-fast[metrics]"')
