"""The single-label family as functions: every row has one class, or a distribution over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.small import small_cross_entropy, small_softmax_focal_loss
from ..ops.softmax import softmax_loss
from ..reference.softmax import Operands, Spec
from .checks import (
    LARGEST,
    check_number,
    check_positive,
    check_probabilities,
    one_reduction,
)
from .rows import (
    IGNORED,
    ClassOptions,
    RowOptions,
    are_plain,
    as_class_vector,
    check_options,
    check_smoothing,
    classes_last,
    prepare_rows,
    split_targets,
)
from .weights import as_counts

if TYPE_CHECKING:
    from typing_extensions import Unpack


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    logit_softcap: float | None = None,
    **options: Unpack[RowOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of classes or class probabilities, in one pass over the logits; a drop-in for torch's.

    .. math::
        \ell(x, t) = \sum_c w_c \, \tilde t_c \, (\operatorname{lse}(x) - x_c) + z \operatorname{lse}(x)^2,
        \quad \operatorname{lse}(x) = \log \sum_j e^{x_j}

    for each row, with :math:`\tilde t = (1 - s) t + s / C` for the smoothing s and t the class or the probabilities. A
    row of up to 32768 classes is read once for its loss and its gradient (16384 with smoothing; 8192 in float64, with a
    soft cap, with smoothing and weights together, and beside class probabilities, 2048 for these three in float64), a
    longer one twice, beside class probabilities three times.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]`` (which costs a copy), of any strides, in float16,
            bfloat16, float32 or float64. A logit may be -inf; of a row of nothing else the loss is NaN, as
            in torch.
        target: classes, of any integer dtype and the input's shape without ``C``; or class probabilities of the input's
            shape, floating, to which a gradient flows if they require one.
        weight: of each class, ``[C]``. A mean over classes is one over the weights of the targets.
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        ignore_index: the class of rows that have no loss, no gradient, and do not count.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, or ``"batchmean"``, the sum over the number of rows.
        label_smoothing: from 0 to 1.
        z_loss: z, which keeps the logits from drifting: unweighted, over the number of rows that count.
        return_z_loss: also return what z_loss adds; it costs another reading of the logits.
        logit_softcap: a cap > 0; every logit is first made ``cap * tanh(x / cap)``.
        options: ``sample_weight``, one value a row, which multiplies its loss (but not what z_loss adds) and changes no
            denominator; ``normalizer``, ``backend`` and ``upstream_memory`` as in :func:`sigmoid_focal_loss`.

    Returns:
        A scalar of the input's dtype, or with ``"none"`` the shape of the classes; with ``return_z_loss`` a pair, of
        which the second part has no gradient. 0 where torch divides by nothing and gives NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Classes out of range are
            found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``; without, they make the loss NaN.

    On the CPU, cross-entropy without z_loss and softcap is torch's own kernel, whose gradient of rows that are sure and
    right is 0 from a margin of 17 on in float32; in 16 bits, and everywhere on a GPU, it is not.

    Example::

        >>> import torch
        >>> from bertloss_fast import cross_entropy
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> cross_entropy(logits, torch.tensor([0]), label_smoothing=0.1).backward()

    Follows :func:`torch.nn.functional.cross_entropy`; z_loss is that of Chowdhery et al., "PaLM", 2022
    (arXiv:2204.02311).
    """
    reduction = one_reduction(size_average, reduce, reduction)
    check_options(options, RowOptions)
    softcap = 0.0 if logit_softcap is None else check_positive("logit_softcap", logit_softcap)
    z_loss = check_number("z_loss", z_loss, 0)
    of_classes: ClassOptions = {
        **options,
        "weight": weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    if not (z_loss or softcap or return_z_loss) and are_plain(of_classes):
        small = small_cross_entropy(input, target, reduction, options.get("backend"))
        if small is not None:
            return small
    spec, operands = prepare_classes(
        "cross_entropy",
        (),
        input,
        target,
        reduction,
        of_classes,
        names=("input", "target"),
        as_torch=True,
        softcap=softcap,
        z_loss=z_loss,
    )
    loss = _compute(spec, operands, options)
    if not return_z_loss:
        return loss
    with torch.no_grad():
        only_z = spec._replace(formula="z_loss", smoothing=0.0)
        return loss, _compute(only_z, operands, options)


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    reduction: str = "mean",
    **options: Unpack[ClassOptions],
) -> Tensor:
    r"""Focal loss for single-label classification, in one pass over the logits.

    .. math::
        \ell(x, t) = w_t \, \alpha_t \, (1 - p_t)^\gamma \, \left( - \sum_c \tilde t_c \log p_c \right),
        \quad p = \operatorname{softmax}(x)

    with the smoothed target as in :func:`cross_entropy`, and :math:`p_t` the probability of the class itself. No class
    is background. 1 - p_t is relatively accurate however sure the prediction is.

    Args:
        inputs: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]`` (which costs a copy), of any strides, in float16,
            bfloat16, float32 or float64.
        targets: classes, of any integer dtype, the shape of the inputs without ``C``.
        gamma: how strongly well-classified rows are damped, at least 0; 0 is cross-entropy.
        alpha: a weight of each class, ``[C]``, another name of ``weight``; with both, their product.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over rows that are not ignored; weights change no denominator) or
            ``"batchmean"``, the sum over the number of rows.
        options: ``weight``, of each class, ``[C]``; ``sample_weight``, one value a row; ``ignore_index``, the class of
            rows that do not count (-100); ``label_smoothing``, from 0 to 1; ``normalizer``, ``backend`` and
            ``upstream_memory`` as in :func:`sigmoid_focal_loss`.

    Returns:
        A scalar in float32 (float64 if the inputs are), or with ``"none"`` the targets' shape in the inputs' dtype
        (under autocast at least float32). 0 where no row counts.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Classes out of range are
            found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``; without, they make the loss NaN.

    Example::

        >>> import torch
        >>> from bertloss_fast import softmax_focal_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> softmax_focal_loss(logits, torch.tensor([2]), gamma=1.5).backward()

    Follows Lin et al., "Focal Loss for Dense Object Detection", 2017 (arXiv:1708.02002).
    """
    check_options(options, ClassOptions)
    gamma = check_number("gamma", gamma, 0)
    if alpha is None and are_plain(options):
        loss = small_softmax_focal_loss(inputs, targets, gamma, reduction, options.get("backend"))
        if loss is not None:
            return loss
    check_classes_alone(targets)
    spec, operands = prepare_classes("focal", (gamma,), inputs, targets, reduction, options)
    return _compute(spec, times_alpha(alpha, spec, operands), options)


def poly_cross_entropy(
    inputs: Tensor,
    targets: Tensor,
    epsilon: float = 2.0,
    reduction: str = "mean",
    **options: Unpack[ClassOptions],
) -> Tensor:
    r"""Poly-1 cross-entropy, in one pass over the logits: the leading term of its expansion in 1 - p is raised.

    .. math::
        \ell(x, t) = \sum_c w_c \, \tilde t_c \, (- \log p_c + \epsilon (1 - p_c)), \quad p = \operatorname{softmax}(x)

    with the smoothed target as in :func:`cross_entropy`, and for a class alone
    :math:`w_t (- \log p_t + \epsilon (1 - p_t))`.

    Args:
        inputs: logits, as in :func:`softmax_focal_loss`.
        targets: classes, or class probabilities of the inputs' shape, floating, to which a gradient flows if they
            require one.
        epsilon: how much that term is raised, at least -1 to keep the loss falling in p; 0 is cross-entropy.
        reduction: as in :func:`softmax_focal_loss`.
        options: as in :func:`softmax_focal_loss`.

    Returns:
        As :func:`softmax_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import poly_cross_entropy
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> poly_cross_entropy(logits, torch.tensor([2]), epsilon=1.0).backward()

    Follows Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", 2022
    (arXiv:2204.12511).
    """
    check_options(options, ClassOptions)
    params = (check_number("epsilon", epsilon, -LARGEST),)
    spec, operands = prepare_classes("poly", params, inputs, targets, reduction, options)
    if operands.targets is not None:
        check_probabilities("targets", operands.targets)
    return _compute(spec, operands, options)


def ldam_loss(
    inputs: Tensor,
    targets: Tensor,
    counts: Tensor | Sequence[float],
    max_margin: float = 0.5,
    scale: float = 30.0,
    reduction: str = "mean",
    **options: Unpack[ClassOptions],
) -> Tensor:
    r"""Label-distribution-aware margin loss: cross-entropy in which rare classes must win by a larger margin.

    .. math::
        \ell(x, t) = w_t \, \operatorname{CE}(s (x - m_t e_t), t),
        \quad m_c = m \, n_c^{-1/4} / \max_j n_j^{-1/4}

    Args:
        inputs: cosines between features and class vectors, as the paper has them; otherwise as in
            :func:`softmax_focal_loss`.
        targets: classes, of any integer dtype, the shape of the inputs without ``C``.
        counts: how often each class occurs in training, ``[C]``; none counts as one.
        max_margin: m, the margin of the rarest class, at least 0.
        scale: s, what the logits are multiplied by, > 0.
        reduction: as in :func:`softmax_focal_loss`.
        options: as in :func:`softmax_focal_loss`.

    Returns:
        As :func:`softmax_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import ldam_loss
        >>> cosines = torch.tensor([[0.2, -0.1, 0.5]], requires_grad=True)
        >>> ldam_loss(cosines, torch.tensor([2]), counts=[1000, 100, 10]).backward()

    Follows Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019
    (arXiv:1906.07413). Their deferred re-weighting is :func:`class_balanced_weight` as ``weight`` from an epoch on.
    """
    margins = ldam_margins(counts, max_margin)
    return ldam(inputs, targets, margins, scale, reduction, options)


def ldam_margins(counts: Tensor | Sequence[float], max_margin: float) -> Tensor:
    """The margin of each class, float64 ``[C]``."""
    inverse = as_counts("counts", counts).clamp_min(1) ** -0.25
    return check_number("max_margin", max_margin, 0) * inverse / inverse.max()


def ldam(
    inputs: Tensor, targets: Tensor, margins: Tensor, scale: float, reduction: str, options: ClassOptions
) -> Tensor:
    """With margins that are made already."""
    check_options(options, ClassOptions)
    params = (check_positive("scale", scale),)
    check_classes_alone(targets)
    spec, operands = prepare_classes("ldam", params, inputs, targets, reduction, options)
    if margins.shape != operands.inputs.shape[-1:]:
        raise ValueError(
            f"counts: expected shape {tuple(operands.inputs.shape[-1:])}, one a class of inputs, "
            f"got {tuple(margins.shape)}"
        )
    return _compute(spec, operands._replace(margins=margins.to(inputs.device)), options)


def times_alpha(alpha: Tensor | None, spec: Spec, operands: Operands) -> Operands:
    """With alpha, another name of the classes' weight; their product is as exact as the loss."""
    if alpha is None:
        return operands
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: expected a tensor (C,), one value a class, or None; got {type(alpha).__name__}")
    as_class_vector("alpha", alpha, "inputs", operands.inputs)
    if operands.weight is not None:
        alpha = alpha.to(spec.compute_dtype) * operands.weight.to(spec.compute_dtype)
    return operands._replace(weight=alpha)


def check_classes_alone(targets: Tensor, name: str = "targets") -> None:
    if isinstance(targets, Tensor) and targets.is_floating_point():
        raise TypeError(
            f"{name}: expected classes of an integer dtype, since this loss is not defined for class probabilities; "
            f"got {str(targets.dtype).removeprefix('torch.')}"
        )


def prepare_classes(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor,
    reduction: str,
    options: ClassOptions,
    *,
    names: tuple[str, str] = ("inputs", "targets"),
    as_torch: bool = False,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Spec, Operands]:
    """A call with the classes where torch has them: in the second dimension, or the only one."""
    rows = classes_last(names[0], inputs)
    probabilities, labels = split_targets(targets, inputs, names)
    ignored = options.get("ignore_index", IGNORED)
    if probabilities is not None and ignored >= 0:
        raise ValueError(f"ignore_index: expected none with class probabilities, got {ignored}")
    weight = as_class_vector("weight", options.get("weight"), names[0], rows)
    return prepare_rows(
        formula,
        params,
        rows,
        probabilities,
        labels,
        reduction,
        options,
        names=names,
        smoothing=check_smoothing(options.get("label_smoothing", 0.0)),
        softcap=softcap,
        z_loss=z_loss,
        weight=weight,
        as_torch=as_torch,
    )


def _compute(spec: Spec, operands: Operands, options: RowOptions) -> Tensor:
    backend = dispatch.resolve(options.get("backend"), operands.inputs.device)
    return softmax_loss(spec, operands, backend, options.get("upstream_memory"))
