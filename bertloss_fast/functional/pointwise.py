"""The pointwise family as functions: losses of one input and one target number, drop-ins for torch's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.pointwise import pointwise_loss
from ..ops.upstream import UpstreamMemory
from ..reference.pointwise import Operands, Spec
from .checks import (
    as_normalizer,
    check_inputs,
    check_mask,
    check_reduction,
    check_upstream_memory,
    check_values,
    one_reduction,
)

MSE_REDUCTIONS = ("none", "sum", "mean")
KL_REDUCTIONS = ("none", "sum", "mean", "batchmean")


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
    upstream_memory: UpstreamMemory | None = None,
) -> Tensor:
    r"""Mean squared error, in one pass over inputs and targets; a drop-in for torch's.

    .. math::
        \ell = \frac{\sum_i w_i (x_i - t_i)^2}{\sum_i w_i}

    where :math:`w_i = 1` without a weight, and 0 where ``mask`` is False.

    Args:
        input: predictions, of any shape and strides, in float16, bfloat16, float32 or float64.
        target: numbers of the same shape, floating, bool or of an integer dtype; a floating one that requires a
            gradient gets it. Nothing is broadcast.
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"`` (of w (x - t)²), or ``"mean"`` as above.
        weight: of the input's shape, in any real dtype. A weight that requires a gradient gets it, and makes the loss
            plain operations, whatever ``backend`` says.
        mask: bool, of the input's shape; where it is False, an element has no loss, no gradient, and does not count.
        normalizer: a number, or a tensor of shape ``()`` on the input's device, that takes the denominator's place.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the input's device.
            Inside ``torch.func`` and forward-mode autograd the loss is plain operations, whatever it says.
        upstream_memory: as in :func:`sigmoid_focal_loss`.

    Returns:
        A scalar, or with ``"none"`` the input's shape, in torch's dtype: the one to which input, target and weight
        promote, and under autocast at least float32. It is computed in float32 (float64) all the same, and rounded
        once. An empty or wholly masked input gives 0, where torch's mean is NaN; weights that sum to 0 divide by 1.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. An integer input is none
            that a gradient could flow to, and is refused.

    Example::

        >>> import torch
        >>> from bertloss_fast import mse_loss
        >>> scores = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
        >>> ratings = torch.tensor([1.5, float("nan"), 0.0])
        >>> mse_loss(scores, ratings, mask=~ratings.isnan()).backward()

    Follows ``torch.nn.functional.mse_loss``.
    """
    check_inputs("input", input)
    check_values("target", target, "input", input, integers=True)
    if weight is not None:
        check_values("weight", weight, "input", input, integers=True)
    reduction = one_reduction(size_average, reduce, reduction)
    check_reduction(reduction, MSE_REDUCTIONS)
    return _loss("mse", Operands(input, target, weight, mask), reduction, normalizer, backend, upstream_memory)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
    upstream_memory: UpstreamMemory | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from log-probabilities, in one pass over them; a drop-in for torch's.

    .. math::
        \ell(x, t) = t (\log t - x) \quad \text{or, with } \texttt{log\_target}, \quad \ell(x, t) = e^t (t - x)

    Args:
        input: log-probabilities, of any shape and strides, in float16, bfloat16, float32 or float64.
        target: probabilities, or with ``log_target`` their logarithms, of the same shape, in a floating dtype; one that
            requires a gradient gets it. Nothing is broadcast.
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over elements as in torch (which warns of it), or ``"batchmean"``,
            the sum over the first dimension's size, which is the divergence of a batch of distributions.
        log_target: whether targets are logarithms.
        mask, normalizer, backend, upstream_memory: as in :func:`mse_loss`. A mask does not change ``"batchmean"``'s
            denominator.

    Returns:
        A scalar, or with ``"none"`` the input's shape, in torch's dtype: the one to which input and target promote, and
        under autocast at least float32. It is computed in float32 (float64) all the same, and rounded once. An empty or
        wholly masked input gives 0, where torch's mean is NaN.

        A target of probability 0 has the loss 0, also where the input is -inf, and no gradient flows to it: so that
        what reaches the logits that it was made of is right. torch has NaN there.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import kl_div
        >>> student = torch.randn(4, 5, requires_grad=True).log_softmax(-1)
        >>> kl_div(student, torch.randn(4, 5).softmax(-1), reduction="batchmean").backward()

    Follows ``torch.nn.functional.kl_div``.
    """
    check_inputs("input", input)
    check_values("target", target, "input", input, integers=False)
    reduction = one_reduction(size_average, reduce, reduction)
    check_reduction(reduction, KL_REDUCTIONS)
    formula = "kl of logs" if log_target else "kl"
    return _loss(formula, Operands(input, target, mask=mask), reduction, normalizer, backend, upstream_memory)


def _loss(
    formula: str,
    operands: Operands,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
    upstream_memory: UpstreamMemory | None,
) -> Tensor:
    inputs = operands.inputs
    check_mask(operands.mask, "input", inputs)
    check_upstream_memory(upstream_memory)
    dtypes = [tensor.dtype for tensor in operands[:3] if tensor is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    autocast = inputs.device.type != "meta" and torch.is_autocast_enabled(inputs.device.type)
    spec = Spec(
        formula=formula,
        params=(),
        reduction=reduction,
        compute_dtype=torch.promote_types(dtype, torch.float32),
        loss_dtype=torch.promote_types(dtype, torch.float32) if autocast else dtype,
    )
    operands = operands._replace(normalizer=as_normalizer(normalizer, reduction, "input", inputs))
    return pointwise_loss(spec, operands, dispatch.resolve(backend, inputs.device), upstream_memory)
