"""The single-label losses as modules over ``functional/``. Tensors are buffers, so ``.to()`` moves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from .. import functional as F
from ..functional.checks import (
    LARGEST,
    check_backend,
    check_class_weight,
    check_index,
    check_number,
    check_positive,
    check_reduction,
    one_reduction,
)
from ..functional.rows import IGNORED, REDUCTIONS, ClassOptions, check_smoothing
from ..functional.softmax import ldam, ldam_margins
from ..ops.upstream import UpstreamMemory
from .shown import shown

_OF_CALL = ("sample_weight", "normalizer")


class RowLoss(nn.Module):
    """What the losses of rows share: the options that do not change from batch to batch.

    A call takes those that do: ``sample_weight`` and ``normalizer``.
    """

    _shown: tuple[str, ...] = ()

    def __init__(self, reduction: str, *, backend: str | None = None) -> None:
        super().__init__()
        check_reduction(reduction, REDUCTIONS)
        check_backend(backend)
        self.reduction = reduction
        self.backend = backend
        self._upstream_memory = UpstreamMemory()

    def _options(self, of_call: dict[str, Any]) -> dict[str, Any]:
        """All options of a call."""
        unknown = next((name for name in of_call if name not in _OF_CALL), None)
        if unknown is not None:
            raise TypeError(f"{unknown}: expected one of {', '.join(_OF_CALL)}; others belong to the module")
        return {"backend": self.backend, "upstream_memory": self._upstream_memory, **of_call}

    def extra_repr(self) -> str:
        return shown(self._set())

    def _set(self) -> dict[str, Any]:
        """The options, and None for those that are as they are by default."""
        return {name: getattr(self, name) for name in (*self._shown, "reduction")}


class LabelLoss(RowLoss):
    """And those that have classes."""

    def __init__(self, reduction: str, *, ignore_index: int = IGNORED, backend: str | None = None) -> None:
        super().__init__(reduction, backend=backend)
        self.ignore_index = check_index("ignore_index", ignore_index)

    def _options(self, of_call: dict[str, Any]) -> dict[str, Any]:
        return super()._options(of_call) | {"ignore_index": self.ignore_index}

    def _set(self) -> dict[str, Any]:
        return {**super()._set(), "ignore_index": None if self.ignore_index == IGNORED else self.ignore_index}


class ClassLoss(LabelLoss):
    """And what those have that are made of cross-entropy."""

    weight: Tensor | None

    def __init__(
        self, reduction: str, *, weight: Tensor | None = None, label_smoothing: float = 0.0, **options: Any
    ) -> None:
        super().__init__(reduction, **options)
        self.label_smoothing = check_smoothing(label_smoothing)
        check_class_weight("weight", weight)
        self.register_buffer("weight", weight)

    def _options(self, of_call: dict[str, Any]) -> dict[str, Any]:
        return super()._options(of_call) | {"weight": self.weight, "label_smoothing": self.label_smoothing}

    def _set(self) -> dict[str, Any]:
        return {**super()._set(), "weight": self.weight, "label_smoothing": self.label_smoothing or None}


class CrossEntropyLoss(ClassLoss):
    """Cross-entropy; :func:`bertloss_fast.cross_entropy` has the formula.

    A drop-in for :class:`torch.nn.CrossEntropyLoss`, whose state dict it loads and writes.

    Args:
        weight: of each class, ``[C]`` (a buffer).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: the class of rows that do not count.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        label_smoothing: from 0 to 1.
        z_loss: what the squared logarithm of the sum of exponentials is multiplied by.
        logit_softcap: a cap > 0 of the logits.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the input's device.

    Shape:
        input ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; target without ``C``, or with it for class probabilities. A
        call also takes ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no input fits; those that depend on the input at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import CrossEntropyLoss
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 1]))
    """

    _shown = ("z_loss", "logit_softcap")

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORED,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        backend: str | None = None,
    ) -> None:
        reduction = one_reduction(size_average, reduce, reduction)
        super().__init__(
            reduction, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, backend=backend
        )
        self.z_loss = check_number("z_loss", z_loss, 0)
        self.logit_softcap = None if logit_softcap is None else check_positive("logit_softcap", logit_softcap)

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss = F.cross_entropy(
            input,
            target,
            reduction=self.reduction,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
            **self._options(options),
        )
        assert isinstance(loss, Tensor)
        return loss

    def of_layer(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of a linear layer's logits; :func:`bertloss_fast.linear_cross_entropy` has the arguments."""
        of_all = self._options(options)
        if target.is_floating_point():
            of_all["ignore_index"] = None  # probabilities have no place for it
        return F.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            reduction=self.reduction,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
            chunk_size=chunk_size,
            **of_all,
        )


class SoftmaxFocalLoss(ClassLoss):
    """Focal loss for single-label classification; :func:`bertloss_fast.softmax_focal_loss` has the formula.

    Args:
        gamma: how strongly well-classified rows are damped, at least 0.
        alpha: a weight of each class, ``[C]`` (a buffer), another name of ``weight``; with both, their product.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        options: ``weight`` of each class, ``[C]`` (a buffer), ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; targets, classes, without ``C``. A call also takes
        ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import SoftmaxFocalLoss
        >>> criterion = SoftmaxFocalLoss(alpha=torch.tensor([1.0, 2.0, 5.0]))
        >>> loss = criterion(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2]))
    """

    alpha: Tensor | None
    _shown = ("gamma", "alpha")

    def __init__(
        self, gamma: float = 2.0, alpha: Tensor | None = None, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(reduction, **options)
        self.gamma = check_number("gamma", gamma, 0)
        check_class_weight("alpha", alpha)
        self.register_buffer("alpha", alpha)

    def forward(self, inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.softmax_focal_loss(inputs, targets, self.gamma, self.alpha, self.reduction, **self._options(options))

    def of_layer(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of a linear layer's logits; :func:`bertloss_fast.linear_softmax_focal_loss` has the arguments."""
        return F.linear_softmax_focal_loss(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            gamma=self.gamma,
            alpha=self.alpha,
            reduction=self.reduction,
            chunk_size=chunk_size,
            **self._options(options),
        )


class PolyCrossEntropy(ClassLoss):
    """Poly-1 cross-entropy; :func:`bertloss_fast.poly_cross_entropy` has the formula.

    Args:
        epsilon: how much the leading term of the cross-entropy's expansion is raised.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        options: ``weight`` of each class, ``[C]`` (a buffer), ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; targets without ``C``, or with it for class probabilities. A
        call also takes ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import PolyCrossEntropy
        >>> loss = PolyCrossEntropy(epsilon=1.0)(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2]))
    """

    _shown = ("epsilon",)

    def __init__(self, epsilon: float = 2.0, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction, **options)
        self.epsilon = check_number("epsilon", epsilon, -LARGEST)

    def forward(self, inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.poly_cross_entropy(inputs, targets, self.epsilon, self.reduction, **self._options(options))


class LDAMLoss(ClassLoss):
    """Label-distribution-aware margin loss; :func:`bertloss_fast.ldam_loss` has the formula.

    Args:
        counts: how often each class occurs in training, ``[C]``.
        max_margin: the margin of the rarest class, at least 0.
        scale: what the cosines are multiplied by, > 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.
        options: ``weight`` of each class, ``[C]`` (a buffer), ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs, cosines, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; targets, classes, without ``C``. A call also takes
        ``sample_weight`` and ``normalizer``.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import LDAMLoss
        >>> criterion = LDAMLoss(counts=[1000, 100, 10])
        >>> loss = criterion(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2]))
    """

    margins: Tensor
    _shown = ("max_margin", "scale")

    def __init__(
        self,
        counts: Tensor | Sequence[float],
        max_margin: float = 0.5,
        scale: float = 30.0,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction, **options)
        self.max_margin = check_number("max_margin", max_margin, 0)
        self.scale = check_positive("scale", scale)
        self.register_buffer("margins", ldam_margins(counts, max_margin))

    def _apply(self, fn: Any, recurse: bool = True) -> LDAMLoss:
        """What casts the model leaves the margins in float64."""
        margins = self.margins
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.margins = self.margins.double() if margins.is_meta else margins.to(self.margins.device)
        return self

    def forward(self, inputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        of_all = cast(ClassOptions, self._options(options))
        return ldam(inputs, targets, self.margins, self.scale, self.reduction, of_all)
