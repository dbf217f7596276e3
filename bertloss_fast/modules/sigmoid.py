"""The elementwise multi-label losses as modules over ``functional/``. Tensors are buffers, so ``.to()`` moves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..functional.checks import (
    LARGEST,
    check_alpha,
    check_backend,
    check_fraction,
    check_ignore_index,
    check_no_gradient,
    check_number,
    check_probabilities,
    check_reduction,
    one_reduction,
)
from ..functional.elementwise import Options
from ..functional.layer import call_of_labels
from ..ops.linear import Call, linear_loss
from ..ops.upstream import UpstreamMemory
from ..targets import SparseLabels
from .shown import shown

_OF_CALL = frozenset({"sample_weight", "mask", "normalizer", "ignore_index"})


class ElementwiseLoss(nn.Module):
    """What the elementwise losses share: the options that do not change from batch to batch.

    A call takes those that do: ``sample_weight``, ``mask`` and ``normalizer``; and an ``ignore_index`` in the place of
    the module's, which None keeps, since labels of one form have a place for it, and those of another have not.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        reduction: str,
        *,
        weight: Tensor | None = None,
        pos_weight: float | Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_backend(backend)
        check_ignore_index(ignore_index)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.backend = backend
        if pos_weight is not None and not isinstance(pos_weight, Tensor):
            pos_weight = torch.tensor(check_number("pos_weight", pos_weight, 0))
        check_no_gradient("weight", weight)
        check_no_gradient("pos_weight", pos_weight)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self._upstream_memory = UpstreamMemory()

    def _options(self, of_call: dict[str, Any]) -> Options:
        """All options of a call."""
        if not of_call.keys() <= _OF_CALL:
            unknown = next(name for name in of_call if name not in _OF_CALL)
            raise TypeError(f"{unknown}: expected one of {', '.join(sorted(_OF_CALL))}; others belong to the module")
        options: Options = {
            "weight": self.weight,
            "pos_weight": self.pos_weight,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "backend": self.backend,
            "upstream_memory": self._upstream_memory,
        }
        if not of_call:
            return options
        given = {name: value for name, value in of_call.items() if value is not None}
        return options | given  # type: ignore[return-value, operator]

    def extra_repr(self) -> str:
        more = {name: getattr(self, name) for name in ("weight", "pos_weight", "ignore_index")}
        options = {name: getattr(self, name) for name in (*self._shown, "reduction")}
        return shown({**options, **more, "label_smoothing": self.label_smoothing or None})

    _shown: tuple[str, ...] = ()


class SeparableLoss(ElementwiseLoss):
    """And those whose labels stand for themselves: a linear layer takes them in, some labels at a time."""

    formula: str

    def _params(self) -> tuple[float, ...]:
        return ()

    def linear_call(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor | SparseLabels,
        linear_bias: Tensor | None,
        chunk_size: int | None,
        of_call: dict[str, Any],
    ) -> Call:
        """The call of this loss on a linear layer's logits, checked, that `MultiLabelHead` makes."""
        options, alpha = self._options(of_call), getattr(self, "alpha", None)
        layer = input, linear_weight, target, linear_bias
        return call_of_labels(self.formula, self._params(), *layer, self.reduction, chunk_size, options, alpha=alpha)

    def of_layer(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor | SparseLabels,
        linear_bias: Tensor | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss of a linear layer's logits; :func:`bertloss_fast.linear_sigmoid_focal_loss` has the arguments."""
        return linear_loss(self.linear_call(input, linear_weight, target, linear_bias, chunk_size, options))


class SigmoidFocalLoss(SeparableLoss):
    r"""Focal loss for multi-label classification; :func:`bertloss_fast.sigmoid_focal_loss` has the formula.

    Args:
        alpha: weight of the positive labels, a number in [0, 1], a tensor ``[L]`` (a buffer), or ``None``.
        gamma: how strongly well-classified elements are damped, at least 0.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        options: ``weight`` (``[L]`` or the inputs' shape) and ``pos_weight`` (``[L]`` or a scalar), which are buffers;
            ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import SigmoidFocalLoss
        >>> criterion = SigmoidFocalLoss(alpha=None, reduction="batchmean")
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, dtype=torch.bool))
    """

    alpha: float | Tensor | None
    formula = "focal"
    _shown = ("alpha", "gamma")

    def __init__(
        self, alpha: float | Tensor | None = 0.25, gamma: float = 2.0, reduction: str = "none", **options: Any
    ) -> None:
        super().__init__(reduction, **options)
        self.gamma = check_number("gamma", gamma, 0)
        if isinstance(alpha, Tensor):
            check_probabilities("alpha", alpha)
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha if alpha is None else check_alpha(alpha)

    def _params(self) -> tuple[float, ...]:
        return (self.gamma,)

    def forward(self, inputs: Tensor, targets: Tensor | SparseLabels, **options: Any) -> Tensor:
        return F.sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction, **self._options(options))


class BCEWithLogitsLoss(SeparableLoss):
    """Binary cross-entropy on logits; :func:`bertloss_fast.binary_cross_entropy_with_logits` has the formula.

    A drop-in for :class:`torch.nn.BCEWithLogitsLoss`, whose state dict it loads and writes.

    Args:
        weight: any shape that broadcasts to the input's (a buffer).
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        pos_weight: ``[L]`` or a scalar (a buffer).
        options: ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        input and target ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no input fits; those that depend on the input at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import BCEWithLogitsLoss
        >>> criterion = BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
        >>> loss = criterion(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool))
    """

    formula = "bce"

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: float | Tensor | None = None,
        **options: Any,
    ) -> None:
        reduction = one_reduction(size_average, reduce, reduction)
        super().__init__(reduction, weight=weight, pos_weight=pos_weight, **options)

    def forward(self, input: Tensor, target: Tensor | SparseLabels, **options: Any) -> Tensor:
        if options:
            return F.binary_cross_entropy_with_logits(input, target, reduction=self.reduction, **self._options(options))
        # The same without a dict, which takes a twentieth of a small call.
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
            upstream_memory=self._upstream_memory,
        )


class AsymmetricLossMultiLabel(SeparableLoss):
    """Asymmetric loss; :func:`bertloss_fast.asymmetric_loss` has the formula.

    Takes timm's arguments by the same positions and names.

    Args:
        gamma_neg, gamma_pos: how strongly well-classified negatives and positives are damped, at least 0.
        clip: negatives with a probability below it have neither loss nor gradient; from 0, and less than 1.
        eps: taken and not used: nothing is clamped here.
        disable_torch_grad_focal_loss, detach_focal_weight: take the focal factor for a constant; two names of one.
        smoothing: timm's name of ``label_smoothing``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        weight, pos_weight: ``[L]``, or for pos_weight also a number (buffers).
        options: ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import AsymmetricLossMultiLabel
        >>> criterion = AsymmetricLossMultiLabel(gamma_neg=2.0, reduction="mean")
        >>> loss = criterion(torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 5, dtype=torch.bool))
    """

    formula = "asymmetric"
    _shown = ("gamma_neg", "gamma_pos", "clip", "detach_focal_weight")

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float | None = 0.05,
        eps: float = 1e-8,
        disable_torch_grad_focal_loss: bool = False,
        smoothing: float = 0.0,
        reduction: str = "batchmean",
        weight: Tensor | None = None,
        pos_weight: float | Tensor | None = None,
        *,
        detach_focal_weight: bool = False,
        **options: Any,
    ) -> None:
        options = one_smoothing(smoothing, options)
        super().__init__(reduction, weight=weight, pos_weight=pos_weight, **options)
        self.gamma_neg = check_number("gamma_neg", gamma_neg, 0)
        self.gamma_pos = check_number("gamma_pos", gamma_pos, 0)
        self.clip = check_fraction("clip", clip or 0.0)
        self.detach_focal_weight = detach_focal_weight or disable_torch_grad_focal_loss

    def _params(self) -> tuple[float, ...]:
        return self.gamma_neg, self.gamma_pos, self.clip, self.detach_focal_weight

    def forward(self, inputs: Tensor, targets: Tensor | SparseLabels, **options: Any) -> Tensor:
        return F.asymmetric_loss(
            inputs,
            targets,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            self.reduction,
            self.detach_focal_weight,
            **self._options(options),
        )


class PolyBinaryCrossEntropy(SeparableLoss):
    """Poly-1 on binary cross-entropy or the focal loss; :func:`bertloss_fast.poly_focal_loss` has the formula.

    Takes timm's arguments by the same positions and names.

    Args:
        epsilon: how much the leading term of the cross-entropy's expansion is raised.
        gamma: how strongly well-classified elements are damped, at least 0.
        alpha: weight of the positive labels, a number in [0, 1], a tensor ``[L]`` (a buffer), or ``None``.
        smoothing: timm's name of ``label_smoothing``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        options: ``weight``, ``pos_weight`` (buffers), ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import PolyBinaryCrossEntropy
        >>> loss = PolyBinaryCrossEntropy(epsilon=1.0)(torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.bool))
    """

    alpha: float | Tensor | None
    formula = "poly"
    _shown = ("epsilon", "gamma", "alpha")

    def __init__(
        self,
        epsilon: float = 2.0,
        gamma: float = 0.0,
        alpha: float | Tensor | None = None,
        smoothing: float = 0.0,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction, **one_smoothing(smoothing, options))
        self.epsilon = check_number("epsilon", epsilon, -LARGEST)
        self.gamma = check_number("gamma", gamma, 0)
        if isinstance(alpha, Tensor):
            check_probabilities("alpha", alpha)
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha if alpha is None else check_alpha(alpha)

    def _params(self) -> tuple[float, ...]:
        return self.gamma, self.epsilon

    def forward(self, inputs: Tensor, targets: Tensor | SparseLabels, **options: Any) -> Tensor:
        return F.poly_focal_loss(
            inputs, targets, self.epsilon, self.gamma, self.alpha, self.reduction, **self._options(options)
        )


def one_smoothing(smoothing: float, options: dict[str, Any]) -> dict[str, Any]:
    """timm's ``smoothing`` as our ``label_smoothing``."""
    if smoothing and options.get("label_smoothing"):
        raise ValueError("smoothing: expected 0 beside label_smoothing, of which it is another name")
    return options | {"label_smoothing": smoothing} if smoothing else options
