"""Losses of two rows of logits as modules over ``functional/``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional as F
from ..functional.checks import check_number, check_positive
from .softmax import LabelLoss, RowLoss


class DistillationLoss(LabelLoss):
    """Hinton's distillation loss; :func:`bertloss_fast.distillation_loss` has the formula.

    Args:
        temperature: T, > 0.
        alpha: the share of the teacher, from 0 to 1.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        options: ``ignore_index``, ``backend``.

    Shape:
        student and teacher logits ``[..., C]``; targets, classes, ``[...]`` or ``None``. A call also takes
        ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no logits fit; those that depend on the logits at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import DistillationLoss
        >>> criterion = DistillationLoss(temperature=4.0, alpha=0.9)
        >>> loss = criterion(torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3), torch.tensor([0, 2]))
    """

    _shown = ("temperature", "alpha")

    def __init__(self, temperature: float = 2.0, alpha: float = 0.5, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction, **options)
        self.temperature = check_positive("temperature", temperature, 1e-4, 1e4)
        self.alpha = check_number("alpha", alpha, 0, 1)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None, **options: Any
    ) -> Tensor:
        return F.distillation_loss(
            student_logits,
            teacher_logits,
            targets,
            self.temperature,
            self.alpha,
            self.reduction,
            **self._options(options),
        )


class RDropLoss(LabelLoss):
    """R-Drop; :func:`bertloss_fast.r_drop_loss` has the formula.

    Args:
        alpha: the weight of the disagreement, at least 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        options: ``ignore_index``, ``backend``.

    Shape:
        both logits ``[..., C]``; targets, classes, ``[...]``. A call also takes ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no logits fit; those that depend on the logits at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import RDropLoss
        >>> loss = RDropLoss(alpha=4.0)(torch.zeros(2, 3), torch.randn(2, 3), torch.tensor([0, 2]))
    """

    _shown = ("alpha",)

    def __init__(self, alpha: float = 1.0, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction, **options)
        self.alpha = check_number("alpha", alpha, 0)

    def forward(self, logits_a: Tensor, logits_b: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.r_drop_loss(
            logits_a,
            logits_b,
            targets,
            self.alpha,
            self.reduction,
            **self._options(options),
        )


class JSDivLoss(RowLoss):
    """Jensen-Shannon divergence; :func:`bertloss_fast.js_div_loss` has the formula.

    Args:
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the logits' device.

    Shape:
        both logits ``[..., C]``. A call also takes ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no logits fit; those that depend on the logits at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import JSDivLoss
        >>> loss = JSDivLoss()(torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3))
    """

    def __init__(self, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction, backend=backend)

    def forward(self, logits_a: Tensor, logits_b: Tensor, **options: Any) -> Tensor:
        return F.js_div_loss(logits_a, logits_b, self.reduction, **self._options(options))


class MarginMSELoss(RowLoss):
    """Squared error of score margins; :func:`bertloss_fast.margin_mse_loss` has the formula.

    Args:
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the scores' device.

    Shape:
        scores ``[..., 1 + K]``, the positive's first; the teacher's of the same shape, or its margins ``[..., K]``. A
        call also takes ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no scores fit; those that depend on the scores at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import MarginMSELoss
        >>> loss = MarginMSELoss()(torch.zeros(2, 3, requires_grad=True), torch.randn(2, 2))
    """

    def __init__(self, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction, backend=backend)

    def forward(self, inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.margin_mse_loss(inputs, targets, self.reduction, **self._options(options))
