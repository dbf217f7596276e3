"""The multi-label family as modules over ``functional/sigmoid.py``. Tensors are buffers, so ``.to()`` moves them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import _reduction

from .. import functional as F
from ..functional.checks import check_alpha, check_backend, check_number, check_reduction


class SigmoidFocalLoss(nn.Module):
    r"""Focal loss for multi-label classification; :func:`bertloss_fast.sigmoid_focal_loss` has the formula.

    Args:
        alpha: weight of the positive labels, a number in [0, 1], a tensor ``[L]`` (a buffer), or ``None``.
        gamma: how strongly well-classified elements are damped, at least 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        weight: ``[L]`` or the inputs' shape (a buffer).
        pos_weight: ``[L]`` or a scalar (a buffer).
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the inputs' device.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import SigmoidFocalLoss
        >>> criterion = SigmoidFocalLoss(alpha=None, reduction="batchmean")
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, dtype=torch.bool))
    """

    alpha: float | Tensor | None
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        alpha: float | Tensor | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_backend(backend)
        self.gamma = check_number("gamma", gamma, 0)
        self.reduction = reduction
        self.backend = backend
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha if alpha is None else check_alpha(alpha)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=self.weight,
            pos_weight=self.pos_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        alpha = f"[{self.alpha.numel()} labels]" if isinstance(self.alpha, Tensor) else self.alpha
        return f"alpha={alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class BCEWithLogitsLoss(nn.Module):
    """Binary cross-entropy on logits; :func:`bertloss_fast.binary_cross_entropy_with_logits` has the formula.

    A drop-in for :class:`torch.nn.BCEWithLogitsLoss`, whose state dict it loads and writes.

    Args:
        weight: any shape that broadcasts to the input's (a buffer).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        pos_weight: ``[L]`` or a scalar (a buffer).
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the input's device.

    Shape:
        input and target ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``.

    Raises:
        TypeError, ValueError: for arguments that no input fits; those that depend on the input at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import BCEWithLogitsLoss
        >>> criterion = BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
        >>> loss = criterion(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool))
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        check_reduction(reduction)
        check_backend(backend)
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
