"""The pointwise losses as modules over ``functional/pointwise.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..functional.checks import check_backend, check_reduction, one_reduction
from ..functional.pointwise import KL_REDUCTIONS, MSE_REDUCTIONS, kl_div, mse_loss
from ..ops.upstream import UpstreamMemory


class PointwiseLoss(nn.Module):
    """What the pointwise losses share: a reduction of those known, a backend, and what came last as upstream."""

    def __init__(self, reduction: str, known: Sequence[str], backend: str | None) -> None:
        super().__init__()
        check_reduction(reduction, known)
        check_backend(backend)
        self.reduction = reduction
        self.backend = backend
        self._upstream_memory = UpstreamMemory()

    def _options(self) -> dict[str, Any]:
        return {"reduction": self.reduction, "backend": self.backend, "upstream_memory": self._upstream_memory}

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class MSELoss(PointwiseLoss):
    """Mean squared error; :func:`bertloss_fast.mse_loss` has the formula. A drop-in for :class:`torch.nn.MSELoss`.

    Args:
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the input's device.

    Shape:
        input and target of one shape; the loss is a scalar, or that shape with ``"none"``. A call also takes
        ``weight``, ``mask`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no input fits; those that depend on the input at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import MSELoss
        >>> loss = MSELoss()(torch.zeros(4, 5, requires_grad=True), torch.ones(4, 5))
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(one_reduction(size_average, reduce, reduction), MSE_REDUCTIONS, backend)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return mse_loss(input, target, weight=weight, mask=mask, normalizer=normalizer, **self._options())


class KLDivLoss(PointwiseLoss):
    """Kullback-Leibler divergence; :func:`bertloss_fast.kl_div` has the formula.

    A drop-in for :class:`torch.nn.KLDivLoss`.

    Args:
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        log_target: whether targets are logarithms of probabilities.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the input's device.

    Shape:
        input and target of one shape; the loss is a scalar, or that shape with ``"none"``. A call also takes ``mask``
        and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no input fits; those that depend on the input at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import KLDivLoss
        >>> criterion = KLDivLoss(reduction="batchmean")
        >>> loss = criterion(torch.randn(4, 5).log_softmax(-1), torch.randn(4, 5).softmax(-1))
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(one_reduction(size_average, reduce, reduction), KL_REDUCTIONS, backend)
        self.log_target = log_target

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return kl_div(input, target, log_target=self.log_target, mask=mask, normalizer=normalizer, **self._options())

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, log_target={self.log_target}"
