"""The ranking family's losses of pairs: a program has some documents of a list against all others, and stores no pair.

Lists come in the order of their scores x. Of a pair with the ranks i < j, at the distance d = x_i - x_j >= 0, with
the weights ``forward`` of the order that it has and ``reversed`` of the other one:

| loss of the pair | d/dx_i, and with the other sign d/dx_j |
|---|---|
| (forward + reversed) softplus(-σd) + reversed σd | σ (reversed - (forward + reversed) sigmoid(-σd)) |

All schemes but NDCGLoss1 have one of the two, by which gain is the greater, times a weight of the ranks. ADR-MSE has
approximate ranks a_i = 1/2 + Σ_j sigmoid(α (x_j - x_i)), true ranks r_i, and the loss Σ (r_i - a_i)² / log2(1 + r_i).
With c_i its derivative in a_i, d/dx_i is α Σ_j (c_j - c_i) sigmoid'(α (x_j - x_i)).

Every pair is met twice, once for the gradient of each document: it takes no atomics, and sums have one order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import sigmoids
from .elements import triton_dtype
from .launch import launch_scope
from .rows import num_warps

FAR = tl.constexpr(1e8)  # where a distance stops to count


class Documents(NamedTuple):
    """Some of a list, a row or a column of them."""

    rank: Any
    x: Any
    gain: Any
    discount: Any


class Launch(NamedTuple):
    """What is compiled in."""

    formula: str
    params: tuple[float, ...]  # sigma, mu of NDCGLoss2++, what multiplies the natural logarithm; of ADR-MSE, alpha
    fast: bool
    dtype: tl.dtype


@triton.jit
def _weights(one, other, upper, gaps_ptr, valid, LAUNCH: tl.constexpr):
    """Of each pair, in both ways together and in the reversed one; 0 where it is not valid."""
    if LAUNCH.formula == "NDCGLoss1":
        both = tl.where(valid, one.gain + other.gain, 0.0)
        return both, tl.where(valid, tl.where(upper, other.gain, one.gain), 0.0)
    else:
        # Above 0 where the order is right.
        weight = tl.where(upper, one.gain - other.gain, other.gain - one.gain)
        if LAUNCH.formula == "RankNet":
            weight = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0)).to(LAUNCH.dtype)
        elif LAUNCH.formula == "LambdaRank":
            weight *= tl.abs(one.discount - other.discount)
        else:
            of_ranks = tl.load(gaps_ptr + tl.abs(one.rank - other.rank), valid, 0.0)
            if LAUNCH.formula == "NDCGLoss2++":
                MU: tl.constexpr = LAUNCH.params[1]
                of_ranks = MU * of_ranks + tl.abs(one.discount - other.discount)
            weight *= of_ranks
        weight = tl.where(valid, weight, 0.0)
        return tl.abs(weight), tl.maximum(-weight, 0.0)


@triton.jit
def _load_documents(scores_ptr, gains_ptr, discounts_ptr, base, rank, count):
    valid = rank < count
    x = tl.load(scores_ptr + base + rank, valid, 0.0)
    gain = tl.load(gains_ptr + base + rank, valid, 0.0)
    return Documents(rank, x, gain, tl.load(discounts_ptr + rank, valid, 0.0))


@triton.jit
def _ranked_kernel(
    scores_ptr,  # [Q, n], from the highest; those that do not count behind
    gains_ptr,  # [Q, n], of the same documents
    counts_ptr,  # [Q], how many count; or None for all
    order_ptr,  # [Q, n], where each document stood
    discounts_ptr,  # [n], 1 / log2(1 + rank)
    gaps_ptr,  # [n], what the distance of two ranks is worth in NDCGLoss2
    loss_ptr,  # [Q, parts]
    grad_ptr,  # [Q, n], of each list's loss, as documents stood; or None
    length,
    k,  # one of a pair is among so many of the highest scores; or None
    LAUNCH: tl.constexpr,  # Launch
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    SIGMA: tl.constexpr = LAUNCH.params[0]
    LOG_SCALE: tl.constexpr = LAUNCH.params[2]
    query = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_I
    base = query * length
    count = length
    if counts_ptr is not None:
        count = tl.load(counts_ptr + query).to(tl.int32)
    rank = first + tl.arange(0, BLOCK_I)[:, None]
    one = _load_documents(scores_ptr, gains_ptr, discounts_ptr, base, rank, count)
    losses = tl.zeros([BLOCK_I, BLOCK_J], LAUNCH.dtype)
    slopes = tl.zeros([BLOCK_I, BLOCK_J], LAUNCH.dtype)
    end = tl.where(first < count, count, 0)
    if k is not None:  # ranks beyond it have pairs with those within alone
        end = tl.where(first < k, end, tl.minimum(end, k))
    for start in range(0, end, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)[None, :]
        other = _load_documents(scores_ptr, gains_ptr, discounts_ptr, base, others, count)
        upper = rank < others
        valid = (rank < count) & (others < count)
        if k is not None:
            valid &= (rank < k) | (others < k)
        both, reversed_ = _weights(one, other, upper, gaps_ptr, valid, LAUNCH)
        distance = tl.abs(one.x - other.x)
        far = distance > FAR
        distance = SIGMA * tl.where(far, FAR, distance)
        _, q, nll, _ = sigmoids(-distance, LAUNCH.fast)
        # The program of the other document adds as much once more, but to a document's pair with itself in NDCGLoss1.
        losses += both * nll + reversed_ * distance
        slope = tl.where(far, 0.0, reversed_ - both * q)
        slopes += tl.where(upper, slope, -slope)
    loss = tl.sum(losses) * (0.5 * LOG_SCALE)
    tl.store(loss_ptr + query * tl.num_programs(1) + tl.program_id(1), loss)
    if grad_ptr is not None:
        place = tl.load(order_ptr + base + rank, rank < length, 0)
        grad = tl.sum(slopes, 1, keep_dims=True) * (SIGMA * LOG_SCALE)
        tl.store(grad_ptr + base + place, grad, rank < length)


@triton.jit
def _ahead(x_i, x_j, LAUNCH: tl.constexpr):
    """How much of a document is ahead, sigmoid(α (x_j - x_i)), and its derivative by α (x_j - x_i)."""
    ALPHA: tl.constexpr = LAUNCH.params[0]
    p, q, _, _ = sigmoids(ALPHA * (x_j - x_i), LAUNCH.fast)
    return q, p * q


@triton.jit
def _adr_mse_kernel(
    scores_ptr,  # [Q, n]
    ranks_ptr,  # [Q, n], true ones
    mask_ptr,  # [Q, n], or None
    slopes_ptr,  # [Q, n], room for derivatives by the approximate ranks; or None
    loss_ptr,  # [Q]
    grad_ptr,  # [Q, n], of each list's loss; or None
    length,
    LAUNCH: tl.constexpr,  # Launch
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    base = query * length
    loss = tl.zeros([BLOCK_I, 1], LAUNCH.dtype)
    for GRADIENT in tl.static_range(1 if grad_ptr is None else 2):
        if GRADIENT:
            tl.debug_barrier()  # what other threads of the program have stored
        for first in range(0, length, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)[:, None]
            x_i = tl.load(scores_ptr + base + i, i < length, 0.0)
            slope_i = tl.zeros([BLOCK_I, 1], LAUNCH.dtype)
            if GRADIENT:
                slope_i = tl.load(slopes_ptr + base + i, i < length, 0.0)
            sums = tl.zeros([BLOCK_I, BLOCK_J], LAUNCH.dtype)
            for start in range(0, length, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)[None, :]
                x_j = tl.load(scores_ptr + base + j, j < length, 0.0)
                valid = j < length
                if mask_ptr is not None:
                    valid &= tl.load(mask_ptr + base + j, valid, 0) != 0
                ahead, derivative = _ahead(x_i, x_j, LAUNCH)
                if GRADIENT:
                    slope_j = tl.load(slopes_ptr + base + j, j < length, 0.0)
                    sums += tl.where(valid, (slope_j - slope_i) * derivative, 0.0)
                else:
                    sums += tl.where(valid, ahead, 0.0)
            total = tl.sum(sums, 1, keep_dims=True)
            kept = i < length
            if mask_ptr is not None:
                kept &= tl.load(mask_ptr + base + i, kept, 0) != 0
            if GRADIENT:
                tl.store(grad_ptr + base + i, tl.where(kept, LAUNCH.params[0] * total, 0.0), i < length)
            else:
                rank = tl.load(ranks_ptr + base + i, i < length, 1.0)
                error = rank - total - 0.5
                discount = 1.0 / tl.log2(rank + 1.0)
                loss += tl.where(kept, error * error * discount, 0.0)
                if slopes_ptr is not None:
                    tl.store(slopes_ptr + base + i, tl.where(kept, -2.0 * error * discount, 0.0), i < length)
    tl.store(loss_ptr + query, tl.sum(loss))


class Config(NamedTuple):
    """How pairs are cut."""

    block_i: int
    block_j: int
    num_warps: int


def pair_config(length: int) -> Config:
    """Four pairs a thread leave room for many; short lists waste no lanes on pairs that are none."""
    if length <= 16:
        return Config(16, 16, num_warps(64))
    return Config(32, 32, num_warps(256))


def num_parts(length: int) -> int:
    """In how many parts the loss of a list comes."""
    return triton.cdiv(length, pair_config(length).block_i)


def ranked_launcher(
    formula: str,
    params: tuple[float, ...],
    k: int,
    scores: Tensor,
    gains: Tensor,
    counts: Tensor | None,
    order: Tensor,
    discounts: Tensor,
    gaps: Tensor,
    losses: Tensor,
    grads: Tensor | None,
    *,
    fast: bool,
) -> None:
    """Launch the losses [Q, parts] of ranked lists, and their gradients; all contiguous."""
    num_lists, length = scores.shape
    cut = pair_config(length)
    with launch_scope(scores):
        _ranked_kernel[(num_lists, num_parts(length))](
            scores,
            gains,
            counts,
            order,
            discounts,
            gaps,
            losses,
            grads,
            length,
            k or None,
            LAUNCH=Launch(formula, params, fast, triton_dtype(scores.dtype)),
            BLOCK_I=cut.block_i,
            BLOCK_J=cut.block_j,
            num_warps=cut.num_warps,
        )


def adr_mse_launcher(
    params: tuple[float, ...],
    scores: Tensor,
    ranks: Tensor,
    mask: Tensor | None,
    losses: Tensor,
    grads: Tensor | None,
    slopes: Tensor | None,
    *,
    fast: bool,
) -> None:
    """Launch the losses [Q] of lists, and their gradients, for which there is room in ``slopes``; all contiguous."""
    num_lists, length = scores.shape
    cut = pair_config(length)
    with launch_scope(scores):
        _adr_mse_kernel[(num_lists,)](
            scores,
            ranks,
            None if mask is None else mask.view(torch.uint8),
            slopes,
            losses,
            grads,
            length,
            LAUNCH=Launch("adr_mse", params, fast, triton_dtype(scores.dtype)),
            BLOCK_I=cut.block_i,
            BLOCK_J=cut.block_j,
            num_warps=cut.num_warps,
        )
