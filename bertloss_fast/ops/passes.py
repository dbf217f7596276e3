"""Passes that some losses need before their own: counts and sums over targets, and the histogram of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..reference import sigmoid as reference
from ..reference.sigmoid import Operands, Spec
from . import dispatch
from .blocks import has_soft_labels, is_one_block
from .operands import as_matrices, parts, with_dense_targets
from .sparse import row_of_label

if dispatch.TRITON_ERROR is None:
    from ..kernels.passes import (
        count_launcher,
        histogram_launcher,
        num_histograms,
        num_partials,
        row_sum_launcher,
        sum_launcher,
    )
    from .launch import matrices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_counted(spec: Spec, operands: Operands) -> bool:
    """Whether the denominator depends on data."""
    if operands.normalizer is not None:
        return False
    may_ignore = operands.mask is not None or spec.ignored is not None
    if spec.reduction == "mean_positive":
        return operands.targets is not None or may_ignore  # of sparse labels, their number is known
    return spec.reduction == "mean" and may_ignore


def denominator(spec: Spec, operands: Operands, backend: str, at_least: int = 1) -> int | Tensor:
    """What the sum of the losses is divided by; a number where it does not depend on data."""
    if spec.reduction == "mean_positive" and operands.targets is None and operands.normalizer is None:
        return _num_labels(spec, cast(Tensor, operands.crow), cast(Tensor, operands.col), operands.mask, at_least)
    if operands.inputs.numel() == 0 or not is_counted(spec, operands):
        return reference.denominator(spec, operands)
    positives = spec.reduction == "mean_positive"
    if backend == "triton":
        operands = as_matrices(operands)
        partials = operands.inputs.new_empty(num_partials(operands.inputs.numel()), dtype=spec.compute_dtype)
        count_launcher(matrices(spec, operands), operands.inputs.shape, partials, positives=positives)
        count = partials.new_empty(())
        sum_launcher(partials, count, at_least=at_least)
        return count
    counts = [_count(spec, part, positives) for part in _blocks(operands)]
    return torch.stack(counts).sum().clamp_min(at_least)


def _num_labels(spec: Spec, crow: Tensor, col: Tensor, mask: Tensor | None, at_least: int) -> int | Tensor:
    if mask is None:
        return max(len(col), at_least)
    kept = mask.reshape(len(crow) - 1, -1)[row_of_label(crow, col), col.long()]
    return kept.sum(dtype=spec.compute_dtype).clamp_min(at_least)


def _count(spec: Spec, operands: Operands, positives: bool) -> Tensor:
    kept = reference.keep(spec, operands)
    targets = operands.targets
    if not positives:
        return cast(Tensor, kept).sum(dtype=spec.compute_dtype)
    values = cast(Tensor, targets) if kept is None else torch.where(kept, cast(Tensor, targets), 0)
    return values.sum(dtype=spec.compute_dtype)


def row_rates(spec: Spec, operands: Operands, weights: Tensor, backend: str) -> Tensor:
    """Of each row, the sum of its targets times their weights ``[L]``, at least fp32's tiny, ``inputs.shape[:-1]``."""
    inputs = operands.inputs
    soft = operands.targets is not None and operands.targets.is_floating_point()
    if not soft:
        weights = (weights.double() * _FIXED).round().long()
    if backend == "triton" and inputs.numel() and not dispatch.needs_plain_operations():
        operands = as_matrices(operands)
        sums = inputs.new_empty(operands.inputs.shape[0], dtype=spec.compute_dtype)
        row_sum_launcher(matrices(spec, operands), weights, sums)
        return sums.reshape(inputs.shape[:-1])
    sums = _row_sums(spec, operands, weights)
    sums = sums if soft else (sums.double() / _FIXED).to(spec.compute_dtype)
    return sums.clamp_min(torch.finfo(torch.float32).tiny)


_FIXED = 2**46  # kernels/passes.py has the reason


def _row_sums(spec: Spec, operands: Operands, weights: Tensor) -> Tensor:
    inputs = operands.inputs
    if operands.targets is None:
        crow, col = cast(Tensor, operands.crow), cast(Tensor, operands.col).long()
        row = row_of_label(crow, col)
        values = weights[col]
        if operands.mask is not None:
            values = torch.where(operands.mask.reshape(len(crow) - 1, -1)[row, col], values, 0)
        return weights.new_zeros(len(crow) - 1).index_add(0, row, values).reshape(inputs.shape[:-1])
    if dispatch.needs_plain_operations() or is_one_block(inputs):
        return _dense_row_sums(spec, operands, weights)
    sums = weights.new_zeros(inputs.shape[:-1].numel())
    for (rows, labels), part in parts(operands):
        sums[rows] += _dense_row_sums(spec, part, weights[labels])
    return sums.reshape(inputs.shape[:-1])


def _dense_row_sums(spec: Spec, operands: Operands, weights: Tensor) -> Tensor:
    kept = reference.keep(spec, operands)
    targets = cast(Tensor, operands.targets).detach()
    if not targets.is_floating_point():
        positive = targets != 0 if kept is None else (targets != 0) & kept
        return torch.where(positive, weights, 0).sum(-1)
    targets = targets.to(spec.compute_dtype)
    return (targets if kept is None else torch.where(kept, targets, 0.0)) @ weights


def ghm_weights(
    spec: Spec,
    operands: Operands,
    bins: int,
    momentum: float,
    running_counts: Tensor | None,
    process_group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    """The weight of each bin: elements over the bin's elements and over the number of bins that are not empty."""
    counts = _histogram(spec, operands, bins, backend).to(spec.compute_dtype)
    if process_group is not None:
        torch.distributed.all_reduce(counts, group=process_group)
    filled = counts > 0
    total = counts.sum()
    if running_counts is not None:
        mean = torch.where(filled, momentum * running_counts + (1 - momentum) * counts, running_counts)
        running_counts.copy_(mean)
        counts = mean.to(spec.compute_dtype)
    return torch.where(filled, total / (counts * filled.sum()), 0.0)


def _histogram(spec: Spec, operands: Operands, bins: int, backend: str) -> Tensor:
    """How many elements have their |sigmoid(x) - y| in each bin, ``[bins]``."""
    operands = operands._replace(inputs=operands.inputs.detach())
    if operands.inputs.numel() == 0:
        return operands.inputs.new_zeros(bins)
    if dispatch.needs_plain_operations():
        operands = with_dense_targets(operands)
        return reference.histogram(spec, operands, bins, soft=cast(Tensor, operands.targets).is_floating_point())
    if backend == "triton":
        operands = as_matrices(operands)
        counts = operands.inputs.new_empty(num_histograms(operands.inputs.numel()), bins, dtype=torch.int32)
        histogram_launcher(matrices(spec, operands), counts, bins=bins, smoothing=spec.smoothing)
        return counts.sum(0)
    histograms = [
        reference.histogram(spec, part, bins, soft=has_soft_labels(cast(Tensor, part.targets)))
        for part in _blocks(operands)
    ]
    return torch.stack(histograms).sum(0)


def _blocks(operands: Operands) -> Iterator[Operands]:
    """The call in parts that stay in the cache, with dense targets."""
    if is_one_block(operands.inputs):
        yield with_dense_targets(operands)
        return
    for _, part in parts(operands):
        yield part
