"""The ranking losses as modules over ``functional/listwise.py``. Tensors are buffers, so ``.to()`` moves them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from .. import functional as F
from ..functional.checks import (
    check_backend,
    check_no_gradient,
    check_number,
    check_positive,
    check_reduction,
    check_tensor,
)
from ..functional.lists import check_weights
from ..functional.listwise import ACTIVATIONS, REDUCTIONS, WEIGHTINGS, Weighting, check_choice, check_k, check_pairs
from .shown import shown

_OF_CALL = ("mask", "lengths", "normalizer")


class ListLoss(nn.Module):
    """What the ranking losses share. A call also takes ``mask`` or ``lengths``, and ``normalizer``."""

    _shown: tuple[str, ...] = ()

    def __init__(self, reduction: str, backend: str | None) -> None:
        super().__init__()
        check_reduction(reduction, REDUCTIONS)
        check_backend(backend)
        self.reduction = reduction
        self.backend = backend

    def _options(self, of_call: dict[str, Any]) -> dict[str, Any]:
        """All options of a call."""
        unknown = next((name for name in of_call if name not in _OF_CALL), None)
        if unknown is not None:
            raise TypeError(f"{unknown}: expected one of {', '.join(_OF_CALL)}; others belong to the module")
        return {**{name: getattr(self, name) for name in (*self._shown, "reduction", "backend")}, **of_call}

    def extra_repr(self) -> str:
        return shown({name: getattr(self, name) for name in (*self._shown, "reduction")})


class LambdaLoss(ListLoss):
    """LambdaLoss; :func:`bertloss_fast.lambda_loss` has the formula.

    Args:
        weighting: ``None``, ``"NDCGLoss1"``, ``"NDCGLoss2"``, ``"LambdaRank"`` or ``"NDCGLoss2++"``.
        mu, k, sigma, eps, reduction_log: as in :func:`bertloss_fast.lambda_loss`.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over pairs or ``"batchmean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        scores and labels ``[..., n]``; the loss is a scalar, or ``[...]`` with ``"none"``. A call also takes ``mask``
        or ``lengths``, and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import LambdaLoss
        >>> criterion = LambdaLoss("LambdaRank", k=10)
        >>> loss = criterion(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    """

    _shown = ("weighting", "mu", "k", "sigma", "eps", "reduction_log")

    def __init__(
        self,
        weighting: Weighting | None = "NDCGLoss2++",
        mu: float = 10.0,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: Literal["natural", "binary"] = "binary",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, backend)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting
        self.mu = check_number("mu", mu, 0)
        self.k = check_k(k) or None
        self.sigma, _ = check_pairs(sigma, reduction_log)
        self.eps = check_positive("eps", eps)
        self.reduction_log = reduction_log

    def forward(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.lambda_loss(scores, labels, **self._options(options))


class RankNetLoss(ListLoss):
    """RankNet; :func:`bertloss_fast.rank_net_loss` has the formula.

    Args:
        k, sigma, reduction_log: as in :func:`bertloss_fast.lambda_loss`.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over pairs or ``"batchmean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        as :class:`LambdaLoss`.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import RankNetLoss
        >>> loss = RankNetLoss()(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    """

    _shown = ("k", "sigma", "reduction_log")

    def __init__(
        self,
        k: int | None = None,
        sigma: float = 1.0,
        reduction_log: Literal["natural", "binary"] = "binary",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, backend)
        self.k = check_k(k) or None
        self.sigma, _ = check_pairs(sigma, reduction_log)
        self.reduction_log = reduction_log

    def forward(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.rank_net_loss(scores, labels, **self._options(options))


class ListNetLoss(ListLoss):
    """ListNet; :func:`bertloss_fast.list_net_loss` has the formula.

    Args:
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"`` over queries.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        as :class:`LambdaLoss`.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import ListNetLoss
        >>> loss = ListNetLoss()(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    """

    def __init__(self, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction, backend)

    def forward(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.list_net_loss(scores, labels, **self._options(options))


class ListMLELoss(ListLoss):
    """ListMLE; :func:`bertloss_fast.list_mle_loss` has the formula.

    Args:
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"`` over queries.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        as :class:`LambdaLoss`; without labels, documents come in the right order.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import ListMLELoss
        >>> loss = ListMLELoss()(torch.zeros(2, 3, requires_grad=True), lengths=torch.tensor([3, 2]))
    """

    def __init__(self, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction, backend)

    def forward(self, scores: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        return F.list_mle_loss(scores, labels, **self._options(options))


def check_of_positions(weight: Tensor | None) -> None:
    if weight is None:
        return
    check_tensor("lambda_weight", weight)
    if weight.dim() != 1:
        raise ValueError(f"lambda_weight: expected shape (n,), one value a position, got {tuple(weight.shape)}")
    check_no_gradient("lambda_weight", weight)
    check_weights(weight)


class PListMLELoss(ListLoss):
    """Position-aware ListMLE; :func:`bertloss_fast.p_list_mle_loss` has the formula.

    Args:
        lambda_weight: of the positions, ``[n]``; None for 2^(n - i) - 1.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"`` over queries.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        as :class:`ListMLELoss`.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import PListMLELoss
        >>> loss = PListMLELoss()(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    """

    lambda_weight: Tensor | None
    _shown = ("lambda_weight",)

    def __init__(
        self, lambda_weight: Tensor | None = None, reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(reduction, backend)
        check_of_positions(lambda_weight)
        self.register_buffer("lambda_weight", lambda_weight)

    def forward(self, scores: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        return F.p_list_mle_loss(scores, labels, **self._options(options))


class ADRMSELoss(ListLoss):
    """ADR-MSE; :func:`bertloss_fast.adr_mse_loss` has the formula.

    Args:
        alpha: steepness of the approximate ranks, above 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over documents or ``"batchmean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        as :class:`LambdaLoss`.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import ADRMSELoss
        >>> loss = ADRMSELoss()(torch.zeros(2, 3, requires_grad=True), torch.tensor([[0, 2, 1], [1, 0, 0]]))
    """

    _shown = ("alpha",)

    def __init__(self, alpha: float = 1.0, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction, backend)
        self.alpha = check_positive("alpha", alpha)

    def forward(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.adr_mse_loss(scores, labels, **self._options(options))


class MultipleNegativesRankingLoss(ListLoss):
    """Multiple negatives ranking; :func:`bertloss_fast.multiple_negatives_ranking_loss` has the formula.

    Args:
        scale: the inverse of a temperature, above 0.
        activation: ``"sigmoid"`` or ``None``, of the scores before they are scaled.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` and ``"batchmean"`` over queries.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        scores ``[..., n]``, the positive document first; the loss is a scalar, or ``[...]`` with ``"none"``. A call
        also takes ``mask`` or ``lengths``, and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import MultipleNegativesRankingLoss
        >>> loss = MultipleNegativesRankingLoss()(torch.zeros(2, 5, requires_grad=True))
    """

    _shown = ("scale", "activation")

    def __init__(
        self,
        scale: float = 10.0,
        activation: Literal["sigmoid"] | None = "sigmoid",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, backend)
        check_choice("activation", activation, ACTIVATIONS)
        self.scale = check_positive("scale", scale)
        self.activation = activation

    def forward(self, scores: Tensor, **options: Any) -> Tensor:
        return F.multiple_negatives_ranking_loss(scores, **self._options(options))
