"""Losses of two rows of logits as functions: a student and a teacher, or two passes of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.softmax import softmax_loss
from .checks import check_device, check_inputs, check_number, check_positive, check_tensor
from .rows import LabelOptions, RowOptions, check_classes, check_options, prepare_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
    reduction: str = "mean",
    **options: Unpack[LabelOptions],
) -> Tensor:
    r"""Hinton's distillation loss: the teacher's softened distribution and the true class, in one pass over both
    logits.

    .. math::
        \ell = \alpha \, T^2 \operatorname{KL}(q \,\|\, p) + (1 - \alpha) \operatorname{CE}(x, t),
        \quad q = \operatorname{softmax}(z / T), \; p = \operatorname{softmax}(x / T)

    for student logits x and teacher logits z; without targets it is :math:`T^2 \operatorname{KL}(q \,\|\, p)`. Rows of
    up to 8192 classes are read once for the loss and its gradient, longer ones twice.

    Args:
        student_logits: ``[..., C]``, of any strides, in float16, bfloat16, float32 or float64.
        teacher_logits: of the same shape, in any of these dtypes. No gradient flows to them.
        targets: classes, ``[...]``, of any integer dtype, or ``None``.
        temperature: T, from 1e-4 to 1e4. Numbers are compiled in: each new value compiles a kernel.
        alpha: the share of the teacher, from 0 to 1; without targets it has no meaning.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over rows that are not ignored) or ``"batchmean"``, the sum over
            the number of rows.
        options: ``sample_weight``, one value a row; ``ignore_index``, the class of rows that have no loss at all
            (-100), of the teacher neither; ``normalizer``, ``backend`` and ``upstream_memory`` as in
            :func:`sigmoid_focal_loss`.

    Returns:
        A scalar in float32 (float64 if the logits are), or with ``"none"`` the shape without ``C``. 0 where no row
        counts.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import distillation_loss
        >>> student, teacher = torch.zeros(4, 3, requires_grad=True), torch.randn(4, 3)
        >>> distillation_loss(student, teacher, torch.tensor([0, 2, 1, 1])).backward()

    Follows Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).
    """
    params = (check_positive("temperature", temperature, 1e-4, 1e4), check_number("alpha", alpha, 0, 1))
    names = ("student_logits", "teacher_logits")
    if isinstance(teacher_logits, Tensor):
        teacher_logits = teacher_logits.detach()
    check_options(options, LabelOptions)
    return _pair("distillation", params, student_logits, teacher_logits, targets, reduction, options, names)


def r_drop_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    reduction: str = "mean",
    **options: Unpack[LabelOptions],
) -> Tensor:
    r"""R-Drop: cross-entropy of two passes with different dropout, and how much they disagree, in one pass over both.

    .. math::
        \ell = \tfrac12 \left( \operatorname{CE}(a, t) + \operatorname{CE}(b, t) \right)
        + \tfrac{\alpha}{2} \left( \operatorname{KL}(p \,\|\, q) + \operatorname{KL}(q \,\|\, p) \right),
        \quad p = \operatorname{softmax}(a), \; q = \operatorname{softmax}(b)

    Args:
        logits_a, logits_b: ``[..., C]``, of any strides, in float16, bfloat16, float32 or float64; the gradient of
            both is computed in the same pass.
        targets: classes, ``[...]``, of any integer dtype.
        alpha: the weight of the disagreement, at least 0.
        reduction: as in :func:`distillation_loss`.
        options: as in :func:`distillation_loss`.

    Returns:
        As :func:`distillation_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import r_drop_loss
        >>> a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        >>> r_drop_loss(a, b, torch.tensor([0, 2, 1, 1]), alpha=4.0).backward()

    Follows Wu et al., "R-Drop: Regularized Dropout for Neural Networks", 2021 (arXiv:2106.14448), with their sum of the
    two cross-entropies halved, so that alpha = 0 is cross-entropy.
    """
    params = (check_number("alpha", alpha, 0),)
    if targets is None:
        raise TypeError("targets: expected classes, got None; js_div_loss needs none")
    check_options(options, LabelOptions)
    return _pair("r_drop", params, logits_a, logits_b, targets, reduction, options, ("logits_a", "logits_b"))


def js_div_loss(logits_a: Tensor, logits_b: Tensor, reduction: str = "mean", **options: Unpack[RowOptions]) -> Tensor:
    r"""Jensen-Shannon divergence of the distributions that two rows of logits stand for, at most log 2.

    .. math::
        \ell = \tfrac12 \operatorname{KL}(p \,\|\, m) + \tfrac12 \operatorname{KL}(q \,\|\, m),
        \quad m = \tfrac12 (p + q), \; p = \operatorname{softmax}(a), \; q = \operatorname{softmax}(b)

    Args:
        logits_a, logits_b: ``[..., C]``, of any strides, in float16, bfloat16, float32 or float64; the gradient of
            both is computed in the same pass. Rows of more than 8192 classes are read three times.
        reduction: as in :func:`distillation_loss`.
        options: ``sample_weight``, ``normalizer``, ``backend`` and ``upstream_memory``, as in
            :func:`distillation_loss`.

    Returns:
        As :func:`distillation_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import js_div_loss
        >>> js_div_loss(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)).backward()

    Follows Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    check_options(options, RowOptions)
    return _pair("js", (), logits_a, logits_b, None, reduction, options, ("logits_a", "logits_b"))


def margin_mse_loss(inputs: Tensor, targets: Tensor, reduction: str = "mean", **options: Unpack[RowOptions]) -> Tensor:
    r"""Squared error of score margins, the positive's score less each negative's, against the teacher's.

    .. math::
        \ell = \sum_{k \geq 1} \left( (s_0 - s_k) - (t_0 - t_k) \right)^2

    for each row, and as a mean over all margins.

    Args:
        inputs: scores of a positive and then of one or more negatives, ``[..., 1 + K]``, in float16, bfloat16, float32
            or float64.
        targets: the teacher's scores, of the same shape; or its margins, ``[..., K]``, and for one negative ``[...]``.
            A gradient flows to them if they require one.
        reduction: ``"none"`` (the sum over each row's margins), ``"sum"``, ``"mean"`` (over all margins) or
            ``"batchmean"``, the sum over the number of rows.
        options: ``sample_weight``, ``normalizer``, ``backend`` and ``upstream_memory``, as in
            :func:`distillation_loss`.

    Returns:
        As :func:`distillation_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import margin_mse_loss
        >>> scores = torch.tensor([[2.0, 0.5], [1.0, 1.5]], requires_grad=True)
        >>> margin_mse_loss(scores, torch.tensor([1.0, 0.5])).backward()

    Follows Hofstaetter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020 (arXiv:2010.02666).
    """
    check_inputs("inputs", inputs)
    if not inputs.dim() or inputs.shape[-1] < 2:
        raise ValueError(
            "inputs: expected shape (..., 1 + K), a positive's score and at least one negative's, "
            f"got {tuple(inputs.shape)}"
        )
    if isinstance(targets, Tensor) and targets.is_floating_point():
        negatives = (*inputs.shape[:-1], inputs.shape[-1] - 1)
        if targets.shape == inputs.shape[:-1] and negatives[-1] == 1:
            targets = targets.unsqueeze(-1)
        if targets.shape == negatives:  # as the scores of a teacher who gives the positive 0
            targets = torch.nn.functional.pad(-targets, (1, 0))
    check_options(options, RowOptions)
    return _pair("margin_mse", (), inputs, targets, None, reduction, options, ("inputs", "targets"))


def _pair(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    other: Tensor,
    targets: Tensor | None,
    reduction: str,
    options: RowOptions,
    names: tuple[str, str],
) -> Tensor:
    check_inputs(names[0], inputs)
    check_classes(names[0], inputs)
    check_inputs(names[1], other)
    if other.shape != inputs.shape:
        raise ValueError(f"{names[1]}: expected shape {tuple(inputs.shape)} like {names[0]}, got {tuple(other.shape)}")
    check_device(names[1], other, names[0], inputs)
    if targets is not None:
        check_tensor("targets", targets)
    spec, operands = prepare_rows(
        formula, params, inputs, other, targets, reduction, options, names=(names[0], "targets")
    )
    backend = dispatch.resolve(options.get("backend"), inputs.device)
    return softmax_loss(spec, operands, backend, options.get("upstream_memory"))
