"""Precision, nDCG and propensity-scored precision at k: of each row's likeliest labels, which are right.

    P@k      1/k Σ_(r<=k) y_r                          y_r is 1 where the label in place r is right
    nDCG@k   Σ_(r<=k) y_r/log2(r+1)  over the same sum of a row that has its own labels first
    PSP@k    Σ_rows Σ_(r<=k) y_r/p_r  over the same sum of rows that have their least probable labels first

p is the propensity of a label: how probable it is that an annotator who should give it does (Jain, Prabhu, Varma 2016,
https://doi.org/10.1145/2939672.2939756).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..functional.checks import check_positive
from .checks import as_array, check_count
from .inputs import Bools, Floats, Integers, Scored


def propensities(
    label_counts: Tensor | Sequence[int] | NDArray[Any], num_samples: int, a: float = 0.55, b: float = 1.5
) -> NDArray[np.float64]:
    """The propensity of each label from how often it occurs in training, as Jain et al. 2016 have it.

    ``1 / (1 + C (count + b)^-a)`` with ``C = (log(num_samples) - 1) (b + 1)^a``: of a label that never occurs it is
    smallest, so that to find a rare label counts most.

    Args:
        label_counts: ``[L]``, what ``bertloss_fast.label_counts`` gives for the training set.
        num_samples: how many rows the training set has, at least 3.
        a, b: the paper has 0.5 and 0.4 for Wikipedia, 0.6 and 2.6 for Amazon, and these defaults for the rest.

    Returns:
        float64 ``[L]``, for ``multilabel_metrics(propensities=...)``.

    Example::

        >>> from bertloss_fast.metrics import propensities
        >>> propensities([900, 10, 0], num_samples=1000).round(3)
        array([0.812, 0.282, 0.113])
    """
    counts = as_array("label_counts", label_counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iuf":
        raise ValueError(f"label_counts: expected numbers [L], got {counts.dtype} of shape {counts.shape}")
    num_samples = check_count("num_samples", num_samples, 3)  # the logarithm of fewer is not above 1
    a, b = check_positive("a", a), check_positive("b", b)
    if len(counts) and not (counts.min() >= 0 and counts.max() <= num_samples):
        raise ValueError(
            f"label_counts: expected 0 to num_samples = {num_samples}, got {counts.min():g} to {counts.max():g}"
        )
    c = (np.log(num_samples) - 1) * (b + 1) ** a
    return np.asarray(1 / (1 + c * (counts + b) ** -a), dtype=np.float64)


def precision_at(k: int, right: Bools) -> float:
    """Of ``right [N, K]``, in the order of the places."""
    return float(right[:, :k].mean())


def ndcg_at(k: int, right: Bools, counts: Integers) -> float:
    """A row without labels has 0, as scikit-learn's has."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = np.append(0, discount.cumsum())[np.minimum(counts, k)]
    gained = right[:, :k] @ discount
    return float(np.divide(gained, best, out=np.zeros_like(gained), where=best > 0).mean())


def psp_at(k: int, right: Bools, likeliest: Integers, scored: Scored, propensity: Floats) -> tuple[float, float]:
    """The mean over rows, and that over the most that any ranking reaches, 0 where no row has a label."""
    gained = (right[:, :k] / propensity[likeliest[:, :k]]).sum()
    best = _most(k, scored, propensity)
    return float(gained / (k * len(right))), float(gained / best) if best else 0.0


def _most(k: int, scored: Scored, propensity: Floats) -> float:
    """The sum over rows of their k largest inverse propensities."""
    inverse = 1 / propensity[scored.truth.col_indices.numpy()]
    rows = np.repeat(np.arange(len(scored.truth)), scored.counts)
    falling = inverse[np.lexsort((-inverse, rows))]  # the rows' limits stay where they are
    place = np.arange(len(rows)) - scored.truth.crow_indices.numpy()[rows]
    return float(falling[place < k].sum())
