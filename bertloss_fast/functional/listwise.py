"""The ranking losses as functions: of scores that a cross-encoder gives the documents of each query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.listwise import listwise_loss
from ..reference.listwise import SCHEMES, Operands, Spec
from .checks import as_normalizer, check_index, check_number, check_positive, check_reduction
from .lists import as_lists, check_position_weight

REDUCTIONS = ("none", "sum", "mean", "batchmean")
Weighting = Literal["NDCGLoss1", "NDCGLoss2", "LambdaRank", "NDCGLoss2++"]
WEIGHTINGS = SCHEMES[1:]
ACTIVATIONS = ("sigmoid",)
_HIGHEST = 100.0  # label of which 2^label - 1 is a gain


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    weighting: Weighting | None = "NDCGLoss2++",
    mu: float = 10.0,
    k: int | None = None,
    sigma: float = 1.0,
    eps: float = 1e-10,
    reduction_log: Literal["natural", "binary"] = "binary",
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""LambdaLoss: a bound of NDCG, of all pairs of a query's documents, without a tensor of pairs.

    .. math::
        \ell = -\sum_{i, j : y_i > y_j} w_{ij} \log_2 \mathrm{sigmoid}(\sigma (s_i - s_j))

    for each query, with the gains :math:`G_i = (2^{y_i} - 1) / \mathrm{maxDCG@}k`, the ranks :math:`r_i` by score and
    :math:`D(r) = \log_2 (1 + r)`:

    ============= =====================================================================================
    ``weighting`` :math:`w_{ij}`
    ============= =====================================================================================
    None          1
    NDCGLoss1     :math:`G_i / D(r_i)`, of all ordered pairs of any labels, and of each i with itself
    NDCGLoss2     :math:`|1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| \; |G_i - G_j|`
    LambdaRank    :math:`|1/D(r_i) - 1/D(r_j)| \; |G_i - G_j|`
    NDCGLoss2++   μ times that of NDCGLoss2, plus that of LambdaRank
    ============= =====================================================================================

    Args:
        scores: ``[n]`` or ``[..., n]``, up to 4096 documents for each query, in float16, bfloat16, float32 or float64,
            of any strides. Documents of equal scores are ranked as they stand.
        labels: relevance, of the scores' shape, in any real dtype; negative ones gain 0. Labels get no gradient.
        mask: bool, of the scores' shape; where it is False, there is no document. What stands there has no effect.
        lengths: instead of a mask, how many documents each query has, ``scores.shape[:-1]``, of an integer dtype.
        weighting: as above.
        mu: of NDCGLoss2++.
        k: only pairs count that have one of the k highest scores, and maxDCG ends there; None for all.
        sigma: steepness of the sigmoid, above 0. Like all numbers but ``k`` it is compiled in.
        eps: the least maxDCG, above 0, which lists without a relevant document have.
        reduction_log: ``"binary"`` for the logarithm above, ``"natural"`` for log.
        reduction: ``"none"`` for a loss a query, ``"sum"``, ``"mean"`` over all pairs of the batch that count (those of
            the weight 0 too), or ``"batchmean"`` over queries.
        normalizer: a number, or a tensor of shape ``()`` on the scores' device, that takes the denominator's place.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best of the first two that runs on the
            scores' device. Inside ``torch.func`` and forward-mode autograd the loss is plain operations, which do make
            tensors of pairs.

    Returns:
        A scalar in float32 (float64 if scores are), or with ``"none"`` the shape ``scores.shape[:-1]`` in that dtype.
        Where no pair counts, 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Labels that are not finite
            or exceed 100, and lengths out of range, are found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``.

    Example::

        >>> import torch
        >>> from bertloss_fast import lambda_loss
        >>> scores = torch.tensor([[0.2, 1.5, -0.3], [0.4, 0.1, 0.0]], requires_grad=True)
        >>> labels = torch.tensor([[0, 2, 1], [1, 0, 0]])
        >>> lambda_loss(scores, labels, lengths=torch.tensor([3, 2]), k=10).backward()

    Follows Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018, and LambdaLoss of
    sentence-transformers 6.2.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    sigma, of_logarithm = check_pairs(sigma, reduction_log)
    params = (sigma, check_number("mu", mu, 0), check_positive("eps", eps), of_logarithm)
    formula = "RankNet" if weighting is None else weighting
    operands = as_lists(scores, labels, mask, lengths, highest=None if weighting is None else _HIGHEST)
    return _loss(formula, params, operands, reduction, normalizer, backend, k=check_k(k))


def rank_net_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    k: int | None = None,
    sigma: float = 1.0,
    reduction_log: Literal["natural", "binary"] = "binary",
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""RankNet: the logistic loss of every pair of documents with different labels; LambdaLoss without weights.

    .. math::
        \ell = -\sum_{i, j : y_i > y_j} \log_2 \mathrm{sigmoid}(\sigma (s_i - s_j))

    Args:
        scores, labels, mask, lengths, k, sigma, reduction_log: as in :func:`lambda_loss`.
        reduction, normalizer, backend: as in :func:`lambda_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import rank_net_loss
        >>> rank_net_loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]])).backward()

    Follows Burges et al., "Learning to Rank using Gradient Descent", ICML 2005, and RankNetLoss of
    sentence-transformers 6.2.
    """
    sigma, of_logarithm = check_pairs(sigma, reduction_log)
    operands = as_lists(scores, labels, mask, lengths)
    params = (sigma, 0.0, 1.0, of_logarithm)
    return _loss("RankNet", params, operands, reduction, normalizer, backend, k=check_k(k))


def list_net_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""ListNet: cross-entropy from the softmax of the labels to that of the scores, in one pass over both.

    .. math::
        \ell = -\sum_i \mathrm{softmax}(y)_i \log \mathrm{softmax}(s)_i

    Args:
        scores, labels, mask, lengths: as in :func:`lambda_loss`.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"``, both over queries.
        normalizer, backend: as in :func:`lambda_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import list_net_loss
        >>> list_net_loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]])).backward()

    Follows Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007, and ListNetLoss of
    sentence-transformers 6.2.
    """
    return _loss("list_net", (), as_lists(scores, labels, mask, lengths), reduction, normalizer, backend)


def list_mle_loss(
    scores: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""ListMLE: the negative log-likelihood of the right order, document after document (Plackett-Luce).

    .. math::
        \ell = \sum_i \Big( \log \sum_{j \ge i} e^{s_j} - s_i \Big)

    over documents in the order of their labels, the highest first.

    Args:
        scores: as in :func:`lambda_loss`.
        labels: as in :func:`lambda_loss`; documents of equal labels are taken as they stand. None if documents come in
            the right order.
        mask, lengths, backend: as in :func:`lambda_loss`.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"``, both over queries.
        normalizer: as in :func:`lambda_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import list_mle_loss
        >>> list_mle_loss(torch.zeros(2, 3, requires_grad=True), lengths=torch.tensor([3, 2])).backward()

    Follows Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm", ICML 2008, and ListMLELoss of
    sentence-transformers 6.2, whose ``respect_input_order`` is ``labels=None``.
    """
    return _loss("list_mle", (), as_lists(scores, labels, mask, lengths, optional=True), reduction, normalizer, backend)


def p_list_mle_loss(
    scores: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    lambda_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Position-aware ListMLE: the terms of the first positions count more.

    .. math::
        \ell = \sum_i w_i \Big( \log \sum_{j \ge i} e^{s_j} - s_i \Big) \Big/ \sum_i w_i

    Args:
        scores, labels, mask, lengths: as in :func:`list_mle_loss`.
        lambda_weight: w, of the positions in the right order: ``[n]`` or of the scores' shape, at least 0; None for
            :math:`2^{n - i} - 1` with the n documents of the query. A list's weights are divided by their sum.
        reduction, normalizer, backend: as in :func:`list_mle_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import p_list_mle_loss
        >>> p_list_mle_loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]])).backward()

    Follows Lan et al., "Position-Aware ListMLE: A Sequential Learning Process for Ranking", UAI 2014, and PListMLELoss
    of sentence-transformers 6.2.
    """
    operands = as_lists(scores, labels, mask, lengths, optional=True)
    if lambda_weight is not None:
        check_position_weight(lambda_weight, scores)
        operands = operands._replace(weight=lambda_weight.expand(scores.shape))
    return _loss("p_list_mle", (), operands, reduction, normalizer, backend)


def adr_mse_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    alpha: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""ADR-MSE: squared error of approximate ranks, discounted by the true ones, without a tensor of pairs.

    .. math::
        \ell = \sum_i \frac{(r_i - \hat r_i)^2}{\log_2 (1 + r_i)}, \quad
        \hat r_i = 1 + \sum_{j \ne i} \mathrm{sigmoid}(\alpha (s_j - s_i))

    where :math:`r_i` is the rank that the labels give; equal ones share the mean of theirs.

    Args:
        scores, labels, mask, lengths: as in :func:`lambda_loss`.
        alpha: steepness of the approximation, above 0.
        reduction: ``"none"`` for a loss a query, ``"sum"``, ``"mean"`` over documents, or ``"batchmean"`` over queries.
        normalizer, backend: as in :func:`lambda_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import adr_mse_loss
        >>> adr_mse_loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]])).backward()

    Follows ADRMSELoss of sentence-transformers 6.2.
    """
    params = (check_positive("alpha", alpha),)
    return _loss("adr_mse", params, as_lists(scores, labels, mask, lengths), reduction, normalizer, backend)


def multiple_negatives_ranking_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    scale: float = 10.0,
    activation: Literal["sigmoid"] | None = "sigmoid",
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multiple negatives ranking (InfoNCE): cross-entropy of a positive document among negative ones.

    .. math::
        \ell = -\log \mathrm{softmax}(\text{scale} \cdot \text{activation}(s))_0

    Args:
        scores: ``[n]`` or ``[..., n]``, the positive document first, as in :func:`lambda_loss`.
        mask, lengths: as in :func:`lambda_loss`; a list without its positive or without a negative has no loss.
        scale: the inverse of a temperature, above 0.
        activation: ``"sigmoid"`` or None, of the scores before they are scaled.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"``, both over queries.
        normalizer, backend: as in :func:`lambda_loss`.

    Returns, raises: as :func:`lambda_loss`.

    Example::

        >>> import torch
        >>> from bertloss_fast import multiple_negatives_ranking_loss
        >>> multiple_negatives_ranking_loss(torch.zeros(2, 5, requires_grad=True)).backward()

    Follows MultipleNegativesRankingLoss of the cross-encoders of sentence-transformers 6.2.
    """
    check_choice("activation", activation, ACTIVATIONS)
    params = (check_positive("scale", scale), 1.0 if activation else 0.0)
    operands = as_lists(scores, None, mask, lengths, optional=True)
    return _loss("multiple_negatives", params, operands, reduction, normalizer, backend)


def _loss(
    formula: str,
    params: tuple[float, ...],
    operands: Operands,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
    *,
    k: int = 0,
) -> Tensor:
    scores = operands.inputs
    k = k if k < scores.shape[-1] else 0
    check_reduction(reduction, REDUCTIONS)
    compute_dtype = torch.promote_types(scores.dtype, torch.float32)
    spec = Spec(formula, params, k, reduction, compute_dtype, compute_dtype)
    operands = operands._replace(normalizer=as_normalizer(normalizer, reduction, "scores", scores))
    return listwise_loss(spec, operands, dispatch.resolve(backend, scores.device))


def check_choice(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and not (isinstance(value, str) and value in known):
        raise ValueError(f"{name}: expected one of {', '.join(known)} or None, got {value!r}")


def check_pairs(sigma: float, reduction_log: str) -> tuple[float, float]:
    """Sigma, and what the natural logarithm is multiplied by."""
    if reduction_log not in ("natural", "binary"):
        raise ValueError(f"reduction_log: expected natural or binary, got {reduction_log!r}")
    return check_positive("sigma", sigma), 1.0 if reduction_log == "natural" else 1 / math.log(2)


def check_k(k: int | None) -> int:
    """0 for all."""
    if k is None:
        return 0
    if check_index("k", k, "an integer or None") < 1:
        raise ValueError(f"k: expected at least 1, or None for all documents; got {k}")
    return int(k)
