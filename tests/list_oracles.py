"""Naive ranking losses: one list, one document, one pair after another, in the terms of their papers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def ranked_pairs(
    scores: Tensor,
    labels: list[float],
    weighting: str | None,
    mu: float = 10.0,
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
) -> tuple[Tensor, int]:
    """LambdaLoss of a list in bits, and how many pairs it has."""
    order = sorted(range(len(labels)), key=lambda i: -scores[i].item())
    y, s = [labels[i] for i in order], [scores[i] for i in order]
    cut = k or len(y)
    ideal = sorted(y, reverse=True)[:cut]
    best = max(sum((2 ** max(label, 0) - 1) / math.log2(rank + 2) for rank, label in enumerate(ideal)), eps)
    gain = [(2 ** max(label, 0) - 1) / best for label in y]
    loss, count = 0 * scores.sum(), 0
    for i in range(len(y)):
        for j in range(len(y)):
            if min(i, j) >= cut or (weighting != "NDCGLoss1" and y[i] <= y[j]):
                continue
            gap = abs(i - j)
            of_gap = 0 if gap == 0 else 1 / math.log2(gap + 1) - 1 / math.log2(gap + 2)
            of_ranks = abs(1 / math.log2(i + 2) - 1 / math.log2(j + 2))
            of_gains = abs(gain[i] - gain[j])
            weight = {
                None: 1.0,
                "NDCGLoss1": gain[i] / math.log2(i + 2),
                "NDCGLoss2": of_gap * of_gains,
                "LambdaRank": of_ranks * of_gains,
                "NDCGLoss2++": (mu * of_gap + of_ranks) * of_gains,
            }[weighting]
            loss = loss - weight * F.logsigmoid(sigma * (s[i] - s[j]).clamp(-1e8, 1e8)) / math.log(2)
            count += 1
    return loss, count


def list_net(scores: Tensor, labels: list[float]) -> Tensor:
    return F.cross_entropy(scores, torch.tensor(labels, dtype=scores.dtype).softmax(0))


def list_mle(scores: Tensor, labels: list[float] | None, weight: list[float] | None = None) -> Tensor:
    """Of the weights, which are of positions, their shares."""
    n = len(scores)
    order = range(n) if labels is None else sorted(range(n), key=lambda i: -labels[i])
    s = torch.stack([scores[i] for i in order])
    terms = torch.stack([s[i:].logsumexp(0) - s[i] for i in range(n)])
    if weight is None:
        return terms.sum()
    return terms @ torch.tensor(weight[:n], dtype=scores.dtype) / (sum(weight[:n]) + 1e-10)


def p_list_mle(scores: Tensor, labels: list[float] | None) -> Tensor:
    n = len(scores)
    return list_mle(scores, labels, [2.0 ** (n - i) - 1 for i in range(1, n + 1)])


def adr_mse(scores: Tensor, labels: list[float], alpha: float = 1.0) -> Tensor:
    loss = 0 * scores.sum()
    for i, label in enumerate(labels):
        rank = sum(other > label for other in labels) + (sum(other == label for other in labels) + 1) / 2
        others = [torch.sigmoid(alpha * (scores[j] - scores[i])) for j in range(len(labels)) if j != i]
        loss = loss + (rank - 1 - sum(others)) ** 2 / math.log2(1 + rank)
    return loss


def multiple_negatives(scores: Tensor, scale: float = 10.0, activation: str | None = "sigmoid") -> Tensor:
    z = scale * (torch.sigmoid(scores) if activation else scores)
    return F.cross_entropy(z, torch.tensor(0))


def of_lists(
    one: Callable[..., Tensor], scores: Tensor, labels: Tensor | None, mask: Tensor | None, **options: object
) -> Tensor:
    """The loss of each list, of the documents that there are; 0 where there is none."""
    losses = []
    for row in range(len(scores)):
        kept = torch.arange(scores.shape[1]) if mask is None else mask[row].nonzero().squeeze(1)
        s = scores[row, kept]
        given = () if labels is None else (labels[row, kept].tolist(),)
        losses.append(one(s, *given, **options) if len(kept) else 0 * scores[row].sum())
    return torch.stack(losses)
