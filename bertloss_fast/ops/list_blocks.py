"""The eager backend's ranking losses: pairs in blocks that fit a core's cache, of some documents against all others.

ListMLE is here too, by scans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..reference import listwise as reference
from ..reference.listwise import FAR, Operands, Ranked, Spec
from .blocks import block_size

Found = tuple[Tensor, Tensor | None]  # the loss of each list, [Q], and its gradient, [Q, n]


def _pairs_at_a_time(like: Tensor) -> int:
    """On a GPU, which has no cache of a core's own, enough to fill it."""
    return block_size(like) if like.device.type == "cpu" else 1 << 24


def _parts(like: Tensor) -> Iterator[slice]:
    """Lists of which one row each, at most, fills a block."""
    step = max(_pairs_at_a_time(like) // like.shape[1], 1)
    for start in range(0, len(like), step):
        yield slice(start, start + step)


def ranked_in_blocks(spec: Spec, ranked: Ranked, with_grad: bool) -> Found:
    """Each pair once, by the document of the higher rank."""
    losses = ranked.scores.new_zeros(len(ranked.scores))
    slopes = torch.zeros_like(ranked.scores)
    for lists in _parts(ranked.scores):
        valid = None if ranked.valid is None else ranked.valid[lists]
        part = Ranked(ranked.scores[lists], ranked.gains[lists], ranked.labels[lists], valid, ranked.order[lists])
        _ranked_part(spec, part, losses[lists], slopes[lists])
    sigma, _, _, log_scale = spec.params
    losses = log_scale * (losses + reference.own_pairs(spec, ranked))
    if not with_grad:
        return losses, None
    return losses, _unsorted(slopes.mul_(log_scale * sigma), ranked.order)


def _unsorted(values: Tensor, order: Tensor | None) -> Tensor:
    """Where the documents stood."""
    return values if order is None else values.new_empty(values.shape).scatter_(1, order, values)


def _ranked_part(spec: Spec, ranked: Ranked, losses: Tensor, slopes: Tensor) -> None:
    """Adds to losses, and to the gradient in the order of ranks, without sigma."""
    x, gains, valid = ranked.scores, ranked.gains, ranked.valid
    (num_lists, length), sigma = x.shape, spec.params[0]
    # No distance is greater than that of the ends; but where a look would wait for a GPU, none is taken.
    may_be_far = x.device.type != "cpu" or not bool((x.amax(1) - x.amin(1) <= FAR).all())
    start, last = 0, min(spec.k or length, length - 1)
    while start < last:
        step = max(_pairs_at_a_time(x) // (num_lists * (length - start)), 1)
        rows, cols = slice(start, min(start + step, last)), slice(start, length)
        of_ranks = reference.rank_weights(spec, x, rows, cols)
        both, reversed_ = reference.pair_weights(spec, of_ranks, gains[:, rows, None], gains[:, None, cols])
        if valid is not None:
            counts = (valid[:, rows, None] & valid[:, None, cols]).to(x.dtype)
            both, reversed_ = both.mul_(counts), reversed_.mul_(counts)
        distance = x[:, rows, None] - x[:, None, cols]
        far = distance > FAR if may_be_far else None
        distance = distance.clamp_(0, FAR).mul_(sigma)
        e = torch.exp(-distance)
        losses += (both * torch.log1p(e)).add_(reversed_ * distance).sum((1, 2))
        slope = reversed_.sub_(both.mul_(e).div_(1 + e))
        if far is not None:
            slope.masked_fill_(far, 0.0)
        slopes[:, rows] += slope.sum(2)
        slopes[:, cols] -= slope.sum(1)
        start += step


def adr_mse_in_blocks(spec: Spec, operands: Operands, with_grad: bool) -> Found:
    """The rank of each document, and then what the ranks of all have to do with its score."""
    x, mask = reference.scores_of(spec, operands), operands.mask
    ranks, errors = reference.true_ranks(spec, operands), torch.empty_like(x)
    for lists in _parts(x):
        counts = None if mask is None else mask[lists].to(x.dtype)
        for rows in _rows(x[lists]):
            ahead = _ahead(spec, x[lists], rows)
            errors[lists, rows] = (ahead if counts is None else ahead.mul_(counts[:, None])).sum(2)
    errors = ranks - 0.5 - errors
    if mask is not None:
        errors = torch.where(mask, errors, 0.0)
    discounted = errors / (ranks + 1).log2()
    losses = (errors * discounted).sum(1)
    if not with_grad:
        return losses, None
    slopes, grad = -2 * discounted, torch.empty_like(x)
    for lists in _parts(x):
        counts = None if mask is None else mask[lists].to(x.dtype)
        for rows in _rows(x[lists]):
            less = _ahead(spec, x[lists], rows, less=True)  # of the two: 1 - ahead would lose it near 1
            values = less.mul_(1 - less).mul_(slopes[lists, None] - slopes[lists, rows, None])
            grad[lists, rows] = (values if counts is None else values.mul_(counts[:, None])).sum(2)
    return losses, (grad if mask is None else torch.where(mask, grad, 0.0)).mul_(spec.params[0])


def _rows(x: Tensor) -> Iterator[slice]:
    step = max(_pairs_at_a_time(x) // max(x.numel(), 1), 1)
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)


def _ahead(spec: Spec, x: Tensor, rows: slice, *, less: bool = False) -> Tensor:
    """How much of all documents is ahead of some; or the lesser part of each, ahead or behind."""
    distance = (x[:, None] - x[:, rows, None]).mul_(spec.params[0])
    return torch.sigmoid_(distance.abs_().neg_() if less else distance)


def list_mle_and_slopes(spec: Spec, operands: Operands, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """ListMLE of lists [Q, n], and its gradient, as kernels/listwise.py has them."""
    x, weight, valid, order = reference.by_position(spec, operands)
    log_sums = x.flip(-1).logcumsumexp(-1).flip(-1)
    distance = pad(log_sums[:, 1:], (0, 1), value=-math.inf) - x  # of the rest to the document
    losses = reference.softplus(distance)
    losses = losses if weight is None else losses * weight
    losses = (losses if valid is None else torch.where(valid, losses, 0.0)).sum(-1)
    if not with_grad:
        return losses, None
    log_weight = 0.0 if weight is None else weight.log()
    before = pad((log_weight - log_sums).logcumsumexp(-1)[:, :-1], (1, 0), value=-math.inf)
    rest = torch.sigmoid(distance)
    slopes = torch.exp(x + before) - (rest if weight is None else rest * weight)
    slopes = slopes if valid is None else torch.where(valid, slopes, 0.0)
    return losses, _unsorted(slopes, order)
