"""The ranking family in plain PyTorch: losses of lists as the eager backend has them, and every further derivative.

Losses of pairs make tensors of all pairs here. ops/listwise.py goes through them in blocks of rows, with the weights of
this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sigmoid import as_dtype

FAR = 1e8  # where the difference of two scores stops to count
SCHEMES = ("RankNet", "NDCGLoss1", "NDCGLoss2", "LambdaRank", "NDCGLoss2++")  # losses of pairs in the scores' order


softplus = functools.partial(torch.nn.functional.softplus, threshold=40)  # from there on float64 has no more


class Spec(NamedTuple):
    """What a loss is, apart from its tensors."""

    formula: str
    params: tuple[float, ...]  # of SCHEMES: sigma, mu, the least ideal DCG, and what multiplies the natural logarithm
    k: int  # of SCHEMES: one of a pair is among the k highest scores; 0 for all
    reduction: str
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype


class Operands(NamedTuple):
    """The tensors of a call."""

    inputs: Tensor  # [..., n], scores
    targets: Tensor | None = None  # [..., n], labels
    mask: Tensor | None = None  # [..., n]
    weight: Tensor | None = None  # [..., n], of the positions in list_mle
    normalizer: Tensor | None = None  # []


class Ranked(NamedTuple):
    """Lists [..., n] in the order of their scores, the highest first; what does not count is behind, and 0."""

    scores: Tensor
    gains: Tensor  # of which the weights of pairs are differences, or in NDCGLoss1 sums
    labels: Tensor
    valid: Tensor | None  # what counts; None for all
    order: Tensor  # where each document stood


def loss(spec: Spec, operands: Operands) -> Tensor:
    """The loss as differentiable operations."""
    ranked = None
    if not operands.inputs.numel():
        losses = as_dtype(operands.inputs, spec.compute_dtype).sum(-1)
    elif spec.formula in SCHEMES:
        ranked = rank(spec, operands)
        losses = _of_ranked(spec, ranked)
    else:
        losses = _FORMULAS[spec.formula](spec, operands)
    if spec.reduction != "none":
        losses = losses.sum() / denominator(spec, operands, ranked)
    return as_dtype(losses, spec.loss_dtype)


def is_counted(spec: Spec, operands: Operands) -> bool:
    """Whether the denominator depends on data."""
    of_documents = spec.formula == "adr_mse" and operands.mask is not None
    return spec.reduction == "mean" and operands.normalizer is None and (spec.formula in SCHEMES or of_documents)


def denominator(spec: Spec, operands: Operands, ranked: Ranked | None) -> int | Tensor:
    """What the sum of the losses is divided by: a normalizer, or else at least 1."""
    inputs, mask = operands.inputs, operands.mask
    if operands.normalizer is not None:
        return operands.normalizer.to(spec.compute_dtype)
    if spec.reduction in ("none", "sum"):
        return 1
    if spec.reduction == "mean" and ranked is not None:
        return count_pairs(spec, ranked).clamp_min(1)
    if spec.reduction == "mean" and spec.formula == "adr_mse":
        return max(inputs.numel(), 1) if mask is None else mask.sum(dtype=spec.compute_dtype).clamp_min(1)
    return max(inputs.shape[:-1].numel(), 1)


def scores_of(spec: Spec, operands: Operands) -> Tensor:
    """In the dtype of the computation, finite, and 0 where nothing counts."""
    x = _finite(as_dtype(operands.inputs, spec.compute_dtype))
    return x if operands.mask is None else torch.where(operands.mask, x, 0.0)


def _centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """Less the greatest of each list: beside logarithms of sums, scores keep their digits."""
    top = x.detach() if mask is None else torch.where(mask, x.detach(), -torch.finfo(x.dtype).max / 2)
    return x - top.amax(-1, keepdim=True)


def _finite(x: Tensor) -> Tensor:
    """Of two such numbers the difference is finite, unless one is NaN."""
    largest = torch.finfo(x.dtype).max / 4
    return x.clamp(-largest, largest)


def labels_of(spec: Spec, operands: Operands, other: float = 0.0) -> Tensor:
    """In that dtype, and ``other`` where nothing counts."""
    assert operands.targets is not None
    labels = as_dtype(operands.targets, spec.compute_dtype)
    return labels if operands.mask is None else torch.where(operands.mask, labels, other)


def _descending(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted from the greatest, equal ones as they stand, and what does not count behind."""
    values = values if mask is None else torch.where(mask, values, -math.inf)
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return values, order


def rank(spec: Spec, operands: Operands) -> Ranked:
    """Lists as the pairs of ``SCHEMES`` are made of them."""
    scores, labels, mask = scores_of(spec, operands), labels_of(spec, operands), operands.mask
    _, order = _descending(scores.detach(), mask)
    gains = labels.gather(-1, order)
    ranked = Ranked(scores.gather(-1, order), gains, gains, None if mask is None else mask.gather(-1, order), order)
    if spec.formula == "RankNet":
        return ranked
    ideal, discounts = _descending(labels, mask)[0], inverse_discounts(labels)
    dcg = (_gain(ideal) * discounts)[..., : spec.k or None].sum(-1, keepdim=True)
    gains = _gain(gains) / dcg.clamp_min(spec.params[2])
    return ranked._replace(gains=gains * discounts if spec.formula == "NDCGLoss1" else gains)


def _gain(labels: Tensor) -> Tensor:
    return torch.exp2(labels.clamp_min(0)) - 1


def inverse_discounts(like: Tensor) -> Tensor:
    """1 / log2(1 + rank) of the ranks from 1 to n."""
    return torch.arange(2, like.shape[-1] + 2, dtype=like.dtype, device=like.device).log2().reciprocal()


def count_pairs(spec: Spec, ranked: Ranked) -> Tensor:
    """How many pairs of all lists have a loss, be it 0."""
    count = _ordered_pairs(spec, ranked.labels, ranked.valid)
    if not 0 < spec.k < ranked.labels.shape[-1]:
        return count
    # But those with both ranks beyond k.
    valid = None if ranked.valid is None else ranked.valid[..., spec.k :]
    return count - _ordered_pairs(spec, ranked.labels[..., spec.k :], valid)


def _ordered_pairs(spec: Spec, labels: Tensor, valid: Tensor | None) -> Tensor:
    """Of documents one of which has the higher label; in NDCGLoss1 of any two, and of each with itself."""
    valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    if spec.formula == "NDCGLoss1":
        return valid.sum(-1, dtype=spec.compute_dtype).square().sum()
    ascending = torch.where(valid, labels, math.inf).sort(-1).values
    lower = torch.searchsorted(ascending, ascending)
    return torch.where(ascending < math.inf, lower, 0).sum(dtype=spec.compute_dtype)


def rank_weights(spec: Spec, like: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of the pairs' weights that ranks make, for some ranks of both; 0 unless the first is the higher."""
    ranks = torch.arange(like.shape[-1], device=like.device)
    row, col = ranks[rows].unsqueeze(1), ranks[cols]
    if spec.formula in ("RankNet", "NDCGLoss1"):
        return (row < col).to(like.dtype)
    inverse = inverse_discounts(like)
    weights = inverse[rows].unsqueeze(1) - inverse[cols]
    if spec.formula != "LambdaRank":
        of_gaps = gap_weights(inverse)[(col - row).clamp_min(0)]
        weights = of_gaps if spec.formula == "NDCGLoss2" else spec.params[1] * of_gaps + weights
    return torch.where(row < col, weights, 0.0)


def gap_weights(inverse_discounts: Tensor) -> Tensor:
    """What the distance of two ranks is worth in NDCGLoss2, [n]."""
    return pad(inverse_discounts[:-1] - inverse_discounts[1:], (1, 0))


def pair_weights(spec: Spec, of_ranks: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a pair, both ways together and the reversed way alone, by the gains of the higher rank and the
    lower: ``forward + reversed`` and ``reversed``, where a pair in the right order has the loss
    forward · softplus(-σd), and one in the wrong order reversed · softplus(σd) = reversed · (softplus(-σd) + σd).
    """
    if spec.formula == "NDCGLoss1":
        return (upper + lower) * of_ranks, lower * of_ranks
    difference = upper - lower
    weight = (difference.sign() if spec.formula == "RankNet" else difference) * of_ranks
    return weight.abs(), (-weight).clamp_min(0)


def _of_ranked(spec: Spec, ranked: Ranked) -> Tensor:
    sigma, _, _, log_scale = spec.params
    rows = slice(0, spec.k or None)
    of_ranks = rank_weights(spec, ranked.scores, rows, slice(None))
    upper, lower = ranked.gains[..., rows].unsqueeze(-1), ranked.gains.unsqueeze(-2)
    total, reversed_ = pair_weights(spec, of_ranks, upper, lower)
    if ranked.valid is not None:
        both = ranked.valid[..., rows].unsqueeze(-1) & ranked.valid.unsqueeze(-2)
        total, reversed_ = torch.where(both, total, 0.0), torch.where(both, reversed_, 0.0)
    distance = sigma * (ranked.scores[..., rows].unsqueeze(-1) - ranked.scores.unsqueeze(-2)).clamp(-FAR, FAR)
    losses = (total * softplus(-distance) + reversed_ * distance).sum((-2, -1))
    return log_scale * (losses + own_pairs(spec, ranked))


def own_pairs(spec: Spec, ranked: Ranked) -> Tensor | float:
    """What NDCGLoss1 has of documents against themselves."""
    return ranked.gains[..., : spec.k or None].sum(-1) * math.log(2) if spec.formula == "NDCGLoss1" else 0.0


def _adr_mse(spec: Spec, operands: Operands) -> Tensor:
    x, mask = scores_of(spec, operands), operands.mask
    ahead = torch.sigmoid(spec.params[0] * (x.unsqueeze(-2) - x.unsqueeze(-1)))
    if mask is not None:
        ahead = torch.where(mask.unsqueeze(-2), ahead, 0.0)
    ranks = true_ranks(spec, operands)
    errors = (ranks - ahead.sum(-1) - 0.5).square() / (ranks + 1).log2()
    return (errors if mask is None else torch.where(mask, errors, 0.0)).sum(-1)


def true_ranks(spec: Spec, operands: Operands) -> Tensor:
    """The ranks from 1 that labels give, of equal ones the mean; 1 where nothing counts."""
    labels = labels_of(spec, operands, -math.inf).contiguous()  # as searchsorted wants it
    descending = -labels.sort(-1, descending=True).values
    higher = torch.searchsorted(descending, -labels)
    not_lower = torch.searchsorted(descending, -labels, right=True)
    ranks = (higher + not_lower + 1).to(spec.compute_dtype) / 2
    return ranks if operands.mask is None else torch.where(operands.mask, ranks, 1.0)


def _list_net(spec: Spec, operands: Operands) -> Tensor:
    lowest = -torch.finfo(spec.compute_dtype).max / 2  # below every score, and no source of NaN where nothing counts
    x, mask = scores_of(spec, operands), operands.mask
    x = x if mask is None else torch.where(mask, x, lowest)
    losses = labels_of(spec, operands, lowest).softmax(-1) * -x.log_softmax(-1)
    return (losses if mask is None else torch.where(mask, losses, 0.0)).sum(-1)


def _multiple_negatives(spec: Spec, operands: Operands) -> Tensor:
    scale, through_sigmoid = spec.params
    x, mask = scores_of(spec, operands), operands.mask
    x = _finite(scale * (torch.sigmoid(x) if through_sigmoid else _centred(x, mask)))
    negatives = x[..., 1:]
    if mask is None:
        return softplus(negatives.logsumexp(-1) - x[..., 0])
    negatives = torch.where(mask[..., 1:], negatives, -torch.finfo(spec.compute_dtype).max / 2)
    return torch.where(mask[..., 0], softplus(negatives.logsumexp(-1) - x[..., 0]), 0.0)


def _list_mle(spec: Spec, operands: Operands) -> Tensor:
    x, weight, valid, _ = by_position(spec, operands)
    losses = softplus(_log_sums_from(x)[..., 1:] - x[..., :-1])  # the last document is alone
    losses = losses if weight is None else losses * weight[..., :-1]
    return (losses if valid is None else torch.where(valid[..., :-1], losses, 0.0)).sum(-1)


def by_position(spec: Spec, operands: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Scores in the order of ListMLE, lowest where nothing counts; weights, what counts, and the order."""
    x, valid, order = _centred(scores_of(spec, operands), operands.mask), operands.mask, ranking(spec, operands)
    if order is not None:
        x, valid = x.gather(-1, order), None if valid is None else valid.gather(-1, order)
    if valid is not None:
        x = torch.where(valid, x, -torch.finfo(spec.compute_dtype).max / 2)
    return x, position_weights(spec, operands), valid, order


def _log_sums_from(x: Tensor) -> Tensor:
    """log Σ e^x from each position on, in log2(n) steps: torch's logcumsumexp has derivatives of one order alone."""
    step = 1
    while step < x.shape[-1]:
        one, other = x[..., :-step], x[..., step:]
        first = one >= other
        greater, less = torch.where(first, one, other), torch.where(first, other, one)
        x = torch.cat([greater + softplus(less - greater), x[..., -step:]], -1)
        step *= 2
    return x


def ranking(spec: Spec, operands: Operands) -> Tensor | None:
    """Where the documents of each rank are, by their labels or as they come; None for just so."""
    if operands.targets is not None:
        return _descending(labels_of(spec, operands), operands.mask)[1]
    return None if operands.mask is None else _descending(operands.mask.to(spec.compute_dtype), None)[1]


def position_weights(spec: Spec, operands: Operands) -> Tensor | None:
    """The weight of each rank, which sum to 1; None for 1 each."""
    if spec.formula != "p_list_mle":
        return None
    inputs, mask = operands.inputs, operands.mask
    ranks = torch.arange(1, inputs.shape[-1] + 1, dtype=spec.compute_dtype, device=inputs.device)
    count = inputs.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
    if operands.weight is not None:
        weight = as_dtype(operands.weight, spec.compute_dtype)
    else:
        # 2^(count - rank) - 1, divided by a power of two that keeps the sum finite.
        excess = torch.as_tensor(count - 127, dtype=spec.compute_dtype, device=inputs.device).clamp_min(0)
        weight = torch.exp2(count - ranks - excess) - torch.exp2(-excess)
    weight = torch.where(ranks <= count, weight, 0.0).expand(inputs.shape)
    return weight / (weight.sum(-1, keepdim=True) + 1e-10)


_FORMULAS: dict[str, Callable[[Spec, Operands], Tensor]] = {
    "adr_mse": _adr_mse,
    "list_net": _list_net,
    "list_mle": _list_mle,
    "p_list_mle": _list_mle,
    "multiple_negatives": _multiple_negatives,
}
