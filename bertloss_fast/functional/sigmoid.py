"""The multi-label family as functions: every label of every row is a yes-or-no question of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction

from ..ops import dispatch
from ..ops.sigmoid import Operands, Spec, sigmoid_loss
from .checks import (
    check_alpha,
    check_inputs,
    check_number,
    check_probabilities,
    check_reduction,
    check_targets,
    check_vector,
    check_weight,
)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Focal loss for multi-label classification, in one pass over the logits; a drop-in for torchvision's.

    .. math::
        \ell(x, y) = w \, \alpha_t \, m^\gamma \left[ w_+ \, y \log(1 + e^{-x}) + (1 - y) \log(1 + e^x) \right]

    with :math:`m = y \, \sigma(-x) + (1 - y) \, \sigma(x)`, the probability that is given to the wrong label, and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Args:
        inputs: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64.
        targets: labels of the same shape: bool, any integer dtype (0 and 1), or floating, where values between 0 and 1
            are soft labels. They are read as they are: a bool target costs one byte of traffic, an int64 eight.
        alpha: weight of the positive labels against the negative ones, in [0, 1]; a tensor ``[L]`` gives each label
            its own; ``None`` or a negative number means no such weight. Numbers are compiled in: each new value of
            alpha or gamma compiles a kernel.
        gamma: how strongly well-classified elements are damped, at least 0; 0 is binary cross-entropy.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over elements, ``"batchmean"`` (the sum over the number of rows) or
            ``"mean_positive"`` (the sum over the sum of the targets, at least 1, as detectors count).
        weight: ``[L]`` or the inputs' shape; multiplies each element's loss and does not change a denominator.
        pos_weight: ``[L]`` or a scalar; multiplies the positive term of the cross-entropy.
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the inputs' device. Inside
            ``torch.compile``, ``torch.func`` and forward-mode autograd the loss is plain operations, whatever it says.

    Returns:
        A scalar in float32 (float64 if inputs or targets are), or with ``"none"`` the inputs' shape, in the dtype to
        which torch promotes inputs and targets (under autocast at least float32). An empty batch gives 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Targets other than 0 and 1,
            soft ones outside of [0, 1], are found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``.

    Example::

        >>> import torch
        >>> from bertloss_fast import sigmoid_focal_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> loss = sigmoid_focal_loss(logits, torch.tensor([[True, False, False]]), reduction="mean")
        >>> loss.backward()

    Follows Lin et al., "Focal Loss for Dense Object Detection", 2017 (arXiv:1708.02002), and
    ``torchvision.ops.sigmoid_focal_loss``.
    """
    check_inputs("inputs", inputs)
    check_targets("targets", targets, "inputs", inputs)
    check_probabilities("targets", targets)
    alpha = _check_alpha(alpha, inputs)
    gamma = check_number("gamma", gamma, 0)
    check_reduction(reduction)
    check_weight(weight, "inputs", inputs)
    check_vector("pos_weight", pos_weight, "inputs", inputs)

    promoted = torch.promote_types(inputs.dtype, targets.dtype) if targets.is_floating_point() else inputs.dtype
    if reduction != "none" or torch.is_autocast_enabled(inputs.device.type):
        promoted = torch.promote_types(promoted, torch.float32)
    spec = Spec(
        formula="focal",
        params=(gamma,),
        alpha=alpha if isinstance(alpha, float) else None,
        reduction=reduction,
        compute_dtype=_compute_dtype(inputs, targets),
        loss_dtype=promoted,
    )
    operands = Operands(inputs, targets, alpha if isinstance(alpha, Tensor) else None, weight, pos_weight)
    return sigmoid_loss(spec, operands, dispatch.resolve(backend, inputs.device))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Binary cross-entropy on logits, in one pass over them; a drop-in for torch's.

    .. math::
        \ell(x, y) = w \left[ w_+ \, y \log(1 + e^{-x}) + (1 - y) \log(1 + e^x) \right]

    Args:
        input: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64.
        target: labels of the same shape: floating as torch has them, and also bool or any integer dtype (0 and 1).
        weight: any shape that broadcasts to the input's; multiplies each element's loss.
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``, as in
            :func:`sigmoid_focal_loss`.
        pos_weight: ``[L]`` or a scalar; multiplies the positive term.
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the input's device.

    Returns:
        A scalar, or with ``"none"`` the input's shape, in torch's dtype: a floating target's, else the input's, and
        float32 under autocast. It is computed in float32 (float64) all the same, and rounded once. An empty batch
        gives 0, where torch's mean is NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import binary_cross_entropy_with_logits
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> binary_cross_entropy_with_logits(logits, torch.tensor([[True, False, False]])).backward()

    Follows ``torch.nn.functional.binary_cross_entropy_with_logits``.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_inputs("input", input)
    check_targets("target", target, "input", input)
    check_reduction(reduction)
    check_weight(weight, "input", input, broadcast=True)
    check_vector("pos_weight", pos_weight, "input", input)

    loss_dtype = target.dtype if target.is_floating_point() else input.dtype
    if loss_dtype.itemsize == 2 and torch.is_autocast_enabled(input.device.type):
        loss_dtype = torch.float32
    spec = Spec(
        formula="bce",
        params=(),
        alpha=None,
        reduction=reduction,
        compute_dtype=_compute_dtype(input, target),
        loss_dtype=loss_dtype,
    )
    operands = Operands(input, target, weight=weight, pos_weight=pos_weight)
    return sigmoid_loss(spec, operands, dispatch.resolve(backend, input.device))


def _check_alpha(alpha: float | Tensor | None, inputs: Tensor) -> float | Tensor | None:
    """alpha as a number, a tensor, or None for no class weight."""
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        return check_alpha(alpha)
    check_vector("alpha", alpha, "inputs", inputs)
    check_probabilities("alpha", alpha)
    return alpha


def _compute_dtype(inputs: Tensor, targets: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (inputs.dtype, targets.dtype) else torch.float32
