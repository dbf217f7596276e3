"""The ranking family's losses of whole lists: each list is read once, and its gradient is written with its loss.

With x the scores of a list:

| loss | value | d/dx |
|---|---|---|
| ListNet, p and t the softmax of scores and labels | -Σ t log p | p - t |
| multiple negatives, z = scale · activation(x), p its softmax | -log p_0 | dz/dx (p - 1 of the first, p) |
| ListMLE by rank, L_i = log Σ_{j ≥ i} e^{x_j} | Σ w_i (L_i - x_i) | e^{x_k} Σ_{i ≤ k} w_i e^{-L_i} - w_k |

ListMLE's sums are scans of logarithms, which neither overflow nor lose the small to the large.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device import sigmoids
from .elements import triton_dtype
from .launch import launch_scope
from .operands import Matrix, Place, load, matrix
from .rows import num_warps


class Operands(NamedTuple):
    """Of lists, [Q, n]."""

    scores: Matrix
    labels: Matrix | None
    mask: Matrix | None
    order: Any  # where the document of each position is; None when they are in order. Contiguous, as what follows
    weight: Any  # of positions


class Documents(NamedTuple):
    """Those at some positions of a tile of lists, [ROWS, BLOCK]."""

    x: Any  # finite, 0 where nothing counts
    labels: Any
    weight: Any  # None for 1
    col: Any
    valid: Any


class Lists(NamedTuple):
    """A tile of lists: its documents, and in ListMLE those before and after each of them."""

    at: Documents
    before: Any
    after: Any


@triton.jit
def _finite(x):
    """Of two such numbers the difference is finite; NaN stays, as fp64's clamp cannot say."""
    LARGEST: tl.constexpr = 4e307 if x.dtype == tl.float64 else 8e37
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@triton.jit
def _top(x, valid):
    """The greatest of each list, 0 of one of nothing. Less it, scores keep their digits beside logarithms of sums."""
    top = tl.max(tl.where(valid, x, -float("inf")), 1, keep_dims=True)
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _softmax(x, valid):
    """Probabilities and the logarithm of the sum; lists of nothing have 0."""
    top = _top(x, valid)
    e = tl.where(valid, tl.exp(tl.where(valid, x - top, 0.0)), 0.0)
    total = tl.sum(e, 1, keep_dims=True)
    total = tl.where(total == 0, 1.0, total)
    return e / total, top + tl.log(total)


@triton.jit
def _list_net(lists, PARAMS: tl.constexpr):
    valid = lists.at.valid
    x = tl.where(valid, lists.at.x - _top(lists.at.x, valid), 0.0)
    p, log_total = _softmax(x, valid)
    t, _ = _softmax(lists.at.labels, valid)
    return tl.sum(t * (log_total - x), 1), p - t


@triton.jit
def _multiple_negatives(lists, PARAMS: tl.constexpr):
    SCALE: tl.constexpr = PARAMS[0]
    z, slope = lists.at.x - _top(lists.at.x, lists.at.valid), 1.0
    if PARAMS[1] != 0:
        z, rest, _, _ = sigmoids(-lists.at.x, False)
        slope = z * rest
    z = _finite(z * SCALE)
    first = lists.at.col == 0
    positive, negative = lists.at.valid & first, lists.at.valid & ~first
    of_negatives, log_total = _softmax(z, negative)
    own = tl.sum(tl.where(positive, z, 0.0), 1, keep_dims=True)
    counts = (_number(positive) > 0) & (_number(negative) > 0)
    _, q, nll, _ = sigmoids(log_total - own, False)
    q = tl.where(counts, q, 0.0)
    return tl.sum(tl.where(counts & first, nll, 0.0), 1), tl.where(first, -q, q * of_negatives) * (slope * SCALE)


@triton.jit
def _number(of):
    return tl.sum(of.to(tl.int32), 1, keep_dims=True)


@triton.jit
def _log_add(a, b):
    """log(e^a + e^b), -inf for the logarithm of 0."""
    top = tl.maximum(a, b)
    finite = tl.where(top == -float("inf"), 0.0, top)
    return finite + tl.log(tl.exp(a - finite) + tl.exp(b - finite))


@triton.jit
def _log_of(documents, top):
    """The exponents of their e^(x - top)."""
    return tl.where(documents.valid, documents.x - top, -float("inf"))


@triton.jit
def _list_mle(lists, PARAMS: tl.constexpr):
    at, before = lists.at, lists.before
    top = _top(at.x, at.valid)
    x = tl.where(at.valid, at.x - top, 0.0)
    log_rest = tl.associative_scan(_log_of(lists.after, top), 1, _log_add, reverse=True)
    _, q, nll, _ = sigmoids(tl.where(at.valid, log_rest, 0.0) - x, False)
    # Of the document before each, its weight over the sum from it on.
    log_share = -_log_add(_log_of(before, top), _log_add(_log_of(at, top), log_rest))
    if at.weight is not None:
        q *= at.weight
        nll *= at.weight
        log_share += tl.log(before.weight)
    log_shares = tl.associative_scan(tl.where(before.valid, log_share, -float("inf")), 1, _log_add)
    return tl.sum(tl.where(at.valid, nll, 0.0), 1), tl.exp(x + log_shares) - q


FORMULAS = {
    "list_net": _list_net,
    "multiple_negatives": _multiple_negatives,
    "list_mle": _list_mle,
    "p_list_mle": _list_mle,
}


@triton.jit
def _load(operands, row, position, num_lists, length, DTYPE: tl.constexpr):
    valid = (row < num_lists) & (position >= 0) & (position < length)
    col = tl.zeros_like(row) + position
    if operands.order is not None:
        col = tl.load(operands.order + row * length + position, valid, 0)
    place = Place(None, row * length + col, row, col, valid, length)
    labels, weight = None, None
    if operands.weight is not None:
        weight = tl.load(operands.weight + row * length + position, valid, 0.0).to(DTYPE)
    if operands.mask is not None:
        valid &= load(operands.mask, place, 0, None) != 0
    if operands.labels is not None:
        labels = tl.where(valid, load(operands.labels, place, 0.0, DTYPE), 0.0)
    x = _finite(load(operands.scores, place, 0.0, DTYPE))
    return Documents(tl.where(valid, x, 0.0), labels, weight, col, valid)


@triton.jit
def _lists_kernel(
    operands,  # Operands
    loss_ptr,  # [Q]
    grad_ptr,  # [Q, n], of each list's loss; or None
    num_lists,
    length,
    FORMULA: tl.constexpr,
    PARAMS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = tl.arange(0, BLOCK)[None, :]
    at = _load(operands, row, position, num_lists, length, DTYPE)
    before, after = None, None
    if FORMULA is _list_mle:
        before = _load(operands, row, position - 1, num_lists, length, DTYPE)
        after = _load(operands, row, position + 1, num_lists, length, DTYPE)
    loss, slope = FORMULA(Lists(at, before, after), PARAMS)
    tl.store(loss_ptr + row, loss[:, None], row < num_lists)
    if grad_ptr is not None:
        inside = (row < num_lists) & (position < length)
        tl.store(grad_ptr + row * length + at.col, tl.where(at.valid, slope, 0.0), inside)


# Short lists share a tile of one warp; four elements a thread leave registers for both scans.
_TILE, _ELEMENTS_A_THREAD = 128, 4


def lists_launcher(
    formula: str,
    params: tuple[float, ...],
    scores: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    order: Tensor | None,
    weight: Tensor | None,
    losses: Tensor,
    grads: Tensor | None,
) -> None:
    """Launch one pass over lists [Q, n] of any strides; ``order``, ``weight``, ``losses`` and ``grads`` are contiguous.

    Losses [Q] and their gradients are in the dtype of the computation.
    """
    num_lists, length = scores.shape
    block = triton.next_power_of_2(length)
    rows = max(_TILE // block, 1)
    with launch_scope(scores):
        _lists_kernel[(triton.cdiv(num_lists, rows),)](
            Operands(matrix(scores), matrix(labels), matrix(mask), order, weight),
            losses,
            grads,
            num_lists,
            length,
            FORMULA=FORMULAS[formula],
            PARAMS=params,
            DTYPE=triton_dtype(losses.dtype),
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps(rows * block // _ELEMENTS_A_THREAD),
        )
