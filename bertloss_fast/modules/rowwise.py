"""ZLPR and two-way as modules over ``functional/rowwise.py``."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional.checks import check_backend, check_ignore_index, check_reduction
from ..functional.rowwise import check_mean, check_temperature, two_way_loss, zlpr_loss
from ..ops.upstream import UpstreamMemory
from ..targets import SparseLabels


class ZlprLoss(nn.Module):
    r"""Zero-bounded log-sum-exp and pairwise rank-based loss; :func:`bertloss_fast.zlpr_loss` has the formula.

    Args:
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        ignore_index: the target of elements that are neither positive nor negative.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the inputs' device.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[...]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import ZlprLoss
        >>> criterion = ZlprLoss()
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, dtype=torch.bool))
    """

    def __init__(self, reduction: str = "mean", ignore_index: int | None = None, backend: str | None = None) -> None:
        super().__init__()
        check_reduction(reduction)
        check_backend(backend)
        check_ignore_index(ignore_index)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.backend = backend
        self._upstream_memory = UpstreamMemory()

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | SparseLabels,
        *,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        ignore_index: int | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return zlpr_loss(
            inputs,
            targets,
            self.reduction,
            sample_weight=sample_weight,
            mask=mask,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            normalizer=normalizer,
            backend=self.backend,
            upstream_memory=self._upstream_memory,
        )

    def extra_repr(self) -> str:
        ignored = "" if self.ignore_index is None else f", ignore_index={self.ignore_index}"
        return f"reduction={self.reduction!r}{ignored}"


class TwoWayLoss(nn.Module):
    r"""Two-way multi-label loss; :func:`bertloss_fast.two_way_loss` has the formula.

    Args:
        tp: temperature of the positive labels, above 0.
        tn: temperature of the negative labels, above 0.
        reduction: ``"mean"``; the loss has no other.
        ignore_index: the target of elements that are neither positive nor negative.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the inputs' device.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar. A call also takes ``mask``, and an
        ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import TwoWayLoss
        >>> criterion = TwoWayLoss(tp=2.0)
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.eye(4, 5, dtype=torch.bool))
    """

    def __init__(
        self,
        tp: float = 4.0,
        tn: float = 1.0,
        reduction: str = "mean",
        ignore_index: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_mean(reduction)
        check_backend(backend)
        check_ignore_index(ignore_index)
        self.tp = check_temperature("tp", tp)
        self.tn = check_temperature("tn", tn)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.backend = backend

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | SparseLabels,
        *,
        mask: Tensor | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        return two_way_loss(
            inputs,
            targets,
            self.tp,
            self.tn,
            self.reduction,
            mask=mask,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        ignored = "" if self.ignore_index is None else f", ignore_index={self.ignore_index}"
        return f"tp={self.tp}, tn={self.tn}{ignored}"
