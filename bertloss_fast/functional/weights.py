"""Weights and biases from how often each label occurs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import dispatch
from ..targets import SparseLabels
from .checks import check_fraction, check_number


def label_counts(targets: Tensor | SparseLabels) -> Tensor:
    """How many rows have each label, int64 ``[L]``, from targets ``[..., L]``.

    Example::

        >>> import torch
        >>> from bertloss_fast import label_counts
        >>> label_counts(torch.tensor([[True, False], [True, True]]))
        tensor([2, 1])
    """
    if isinstance(targets, Tensor) and targets.layout == torch.sparse_csr:
        targets = SparseLabels.from_sparse_csr(targets)
    if isinstance(targets, SparseLabels):
        return torch.bincount(targets.col_indices, minlength=targets.num_labels)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor or SparseLabels, got {type(targets).__name__}")
    if not targets.dim():
        raise ValueError("targets: expected shape [..., L], got a scalar")
    if targets.layout != torch.strided:
        raise TypeError(f"targets: expected a dense or a sparse_csr tensor, got {targets.layout}")
    return (targets == 1).reshape(targets.shape[:-1].numel(), targets.shape[-1]).sum(0)


def class_balanced_weight(counts: Tensor | Sequence[float], beta: float = 0.999) -> Tensor:
    r"""Weights by the effective number of samples, :math:`(1 - \beta) / (1 - \beta^n)`, scaled to a mean of 1.

    Args:
        counts: how often each label occurs, ``[L]``; none counts as one.
        beta: from 0 (all weights are equal) to less than 1 (towards one over the count).

    Returns:
        ``weight`` for a loss, ``[L]`` in float32.

    Example::

        >>> from bertloss_fast import class_balanced_weight
        >>> class_balanced_weight([1000, 10, 0]).argmax().item()
        2

    Follows Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019 (arXiv:1901.05555).
    """
    beta = check_fraction("beta", beta)
    counts = as_counts("counts", counts).clamp_min(1)
    # 1 - beta^n, without the cancellation
    weight = 1 / -torch.expm1(counts * torch.log(torch.tensor(beta, dtype=torch.float64)))
    return (weight / weight.mean()).float()


def pos_weight_from_counts(counts: Tensor | Sequence[float], num_samples: int) -> Tensor:
    """Negatives over positives of each label: ``pos_weight`` for a loss, ``[L]`` in float32.

    Args:
        counts: how many of the samples have each label, ``[L]``; none counts as one. A label that all have gets 0: its
            positives weigh nothing.
        num_samples: how many samples there are.

    Example::

        >>> from bertloss_fast import pos_weight_from_counts
        >>> pos_weight_from_counts([50, 10, 0], num_samples=100)
        tensor([ 1.,  9., 99.])
    """
    counts = as_counts("counts", counts, num_samples).clamp_min(1)
    return ((num_samples - counts) / counts).float()


def prior_bias(counts: Tensor | Sequence[float], num_samples: int) -> Tensor:
    """The logit of each label's frequency: the bias with which a head starts at the prior, ``[L]`` in float32.

    Args:
        counts: how many of the samples have each label, ``[L]``; none counts as one, and all as all but one.
        num_samples: how many samples there are, at least 2.

    Example::

        >>> import torch
        >>> from bertloss_fast import prior_bias
        >>> head = torch.nn.Linear(8, 3)
        >>> _ = head.bias.data.copy_(prior_bias([50, 10, 0], num_samples=100))

    Follows Lin et al., "Focal Loss for Dense Object Detection", 2017 (arXiv:1708.02002), section 3.3.
    """
    check_number("num_samples", num_samples, 2)
    counts = as_counts("counts", counts, num_samples).clamp(1, num_samples - 1)
    return (torch.log(counts) - torch.log(num_samples - counts)).float()


def as_counts(name: str, counts: Tensor | Sequence[float], num_samples: float | None = None) -> Tensor:
    """Counts [L] in float64, none negative, none above the number of samples."""
    if isinstance(counts, Tensor) and (counts.is_complex() or counts.dtype == torch.bool):
        raise TypeError(f"{name}: expected real numbers, got {str(counts.dtype).removeprefix('torch.')}")
    try:
        counts = torch.as_tensor(counts).detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or a list of numbers, got {type(counts).__name__}") from error
    if counts.dim() != 1 or not len(counts):
        raise ValueError(f"{name}: expected shape (L,), one count a label, got {tuple(counts.shape)}")
    if num_samples is not None:
        check_number("num_samples", num_samples, 1)
    if dispatch.can_check_values(counts.device):
        low, high = counts.min().item(), counts.max().item()
        if not low >= 0:
            raise ValueError(f"{name}: expected counts >= 0, got {low:g}")
        if num_samples is not None and high > num_samples:
            raise ValueError(f"{name}: expected counts <= num_samples = {num_samples}, got {high:g}")
    return counts
