"""A linear layer and its loss in one: the logits of many labels are never held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops.linear import linear_loss
from ..targets import SparseLabels
from .checks import LARGEST, check_fraction, check_number, check_positive
from .elementwise import Options
from .layer import call_of_labels, loss_of_classes
from .rows import ClassOptions, RowOptions, check_options
from .softmax import check_classes_alone

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions
    from typing_extensions import Unpack


def linear_sigmoid_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseLabels,
    *,
    linear_bias: Tensor | None = None,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    chunk_size: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""Focal loss of a linear layer's logits, which are made, used and forgotten some labels at a time.

    .. math::
        \ell(h, y) = \text{focal}(W h + b, y)

    with the formula of :func:`sigmoid_focal_loss`. Forward computes loss and gradients of ``chunk_size`` labels
    together: beside the gradients it takes the memory of one such chunk, however many labels there are.

    Args:
        input: what the layer is given, ``[..., D]``, in float16, bfloat16, float32 or float64.
        linear_weight: ``[L, D]``, of the input's dtype; under autocast of any.
        target: labels ``[..., L]``, dense or :class:`SparseLabels`, as in :func:`sigmoid_focal_loss`.
        linear_bias: ``[L]``.
        alpha, gamma: as in :func:`sigmoid_focal_loss`.
        reduction: ``"none"`` (which gives ``[..., L]``, and computes the logits once more in backward), ``"sum"``,
            ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        chunk_size: how many labels to take at a time; ``None`` for as many as stay in the cache. Many rows are cut too.
        options: ``weight``, ``pos_weight``, ``sample_weight``, ``mask``, ``ignore_index``, ``label_smoothing``,
            ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`sigmoid_focal_loss`.

    Returns:
        As :func:`sigmoid_focal_loss`; gradients flow to input, weight and bias, and are computed only where they are
        asked for. Without ``upstream_memory`` they are written for an upstream gradient of 1, and multiplied once more
        by another. Derivatives beyond the first, ``torch.func``, and the gradient of soft labels hold all logits, and
        what plain operations make of them.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import SparseLabels, linear_sigmoid_focal_loss
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
        >>> labels = SparseLabels.from_lists([[3, 999], [500]], num_labels=1000)
        >>> linear_sigmoid_focal_loss(hidden, weight, labels, reduction="batchmean").backward()

    Named as :func:`torch.nn.functional.linear_cross_entropy`; that the labels can be taken in chunks is Schultheis and
    Babbar's, "Towards Memory-Efficient Training for Extremely Large Output Spaces", 2023 (arXiv:2306.03725), and
    Jain et al.'s, "Renee", 2023.
    """
    params = (check_number("gamma", gamma, 0),)
    return linear_loss(
        call_of_labels(
            "focal", params, input, linear_weight, target, linear_bias, reduction, chunk_size, options, alpha=alpha
        )
    )


def linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseLabels,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""Binary cross-entropy of a linear layer's logits, which are made, used and forgotten some labels at a time.

    .. math::
        \ell(h, y) = \text{BCE}(W h + b, y)

    with the formula of :func:`binary_cross_entropy_with_logits`.

    Args:
        input, linear_weight, target, linear_bias, reduction, chunk_size: as in :func:`linear_sigmoid_focal_loss`.
        options: as in :func:`linear_sigmoid_focal_loss`.

    Returns:
        As :func:`linear_sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import linear_binary_cross_entropy
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        >>> linear_binary_cross_entropy(hidden, weight, torch.ones(2, 5, dtype=torch.bool)).backward()
    """
    return linear_loss(
        call_of_labels("bce", (), input, linear_weight, target, linear_bias, reduction, chunk_size, options)
    )


def linear_asymmetric_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseLabels,
    *,
    linear_bias: Tensor | None = None,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float | None = 0.05,
    reduction: str = "batchmean",
    detach_focal_weight: bool = False,
    chunk_size: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""Asymmetric loss of a linear layer's logits, which are made, used and forgotten some labels at a time.

    .. math::
        \ell(h, y) = \text{ASL}(W h + b, y)

    with the formula of :func:`asymmetric_loss`.

    Args:
        input, linear_weight, target, linear_bias, reduction, chunk_size: as in :func:`linear_sigmoid_focal_loss`.
        gamma_neg, gamma_pos, clip, detach_focal_weight: as in :func:`asymmetric_loss`.
        options: as in :func:`linear_sigmoid_focal_loss`.

    Returns:
        As :func:`linear_sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import linear_asymmetric_loss
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        >>> linear_asymmetric_loss(hidden, weight, torch.ones(2, 5, dtype=torch.bool), clip=0.1).backward()
    """
    params = (
        check_number("gamma_neg", gamma_neg, 0),
        check_number("gamma_pos", gamma_pos, 0),
        check_fraction("clip", clip or 0.0),
        bool(detach_focal_weight),
    )
    return linear_loss(
        call_of_labels("asymmetric", params, input, linear_weight, target, linear_bias, reduction, chunk_size, options)
    )


def linear_poly_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseLabels,
    *,
    linear_bias: Tensor | None = None,
    epsilon: float = 2.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""Poly-1 loss of a linear layer's logits, which are made, used and forgotten some labels at a time.

    .. math::
        \ell(h, y) = \text{poly}(W h + b, y)

    with the formula of :func:`poly_focal_loss`.

    Args:
        input, linear_weight, target, linear_bias, reduction, chunk_size: as in :func:`linear_sigmoid_focal_loss`.
        epsilon, gamma, alpha: as in :func:`poly_focal_loss`.
        options: as in :func:`linear_sigmoid_focal_loss`.

    Returns:
        As :func:`linear_sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import linear_poly_focal_loss
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
        >>> linear_poly_focal_loss(hidden, weight, torch.ones(2, 5, dtype=torch.bool), epsilon=1.0).backward()
    """
    params = (check_number("gamma", gamma, 0), check_number("epsilon", epsilon, -LARGEST))
    return linear_loss(
        call_of_labels(
            "poly", params, input, linear_weight, target, linear_bias, reduction, chunk_size, options, alpha=alpha
        )
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    **more: Unpack[RowOptions],
) -> Tensor:
    r"""Cross-entropy of a linear layer's logits, which are made, used and forgotten some rows at a time.

    .. math::
        \ell(h, t) = \text{CE}(W h + b, t)

    with the formula of :func:`cross_entropy`; a drop-in for torch's, for weights ``[C, D]``.

    Args:
        input: what the layer is given, ``[..., D]``, in float16, bfloat16, float32 or float64.
        linear_weight: ``[C, D]``, of the input's dtype; under autocast of any.
        target: classes ``[...]``, of any integer dtype; or class probabilities ``[..., C]``, floating.
        linear_bias: ``[C]``.
        weight: of each class, ``[C]``.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``, the sum over the number of rows.
        ignore_index: the class of rows that do not count; ``None`` is -100, and all there is with probabilities.
        label_smoothing, z_loss, logit_softcap: as in :func:`cross_entropy`.
        options: torch's. Of these ``batch_chunk_size`` is another name of ``chunk_size``; the others are without
            effect: sums are always in float32, and a graph can always be kept.
        chunk_size: how many rows to take at a time; ``None`` for as many as stay in the cache, but 128 at least.
        more: ``sample_weight``, ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`cross_entropy`.

    Returns:
        A scalar of the logits' dtype, or with ``"none"`` ``[...]``; gradients as in :func:`linear_sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import linear_cross_entropy
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([3, 999])).backward()

    Follows :func:`torch.nn.functional.linear_cross_entropy`.
    """
    check_options(more, RowOptions)
    own: ClassOptions = {"weight": weight, "label_smoothing": label_smoothing}
    if ignore_index is not None:
        own["ignore_index"] = ignore_index
        if isinstance(target, Tensor) and target.is_floating_point():
            raise ValueError(f"ignore_index: expected None with class probabilities, got {ignore_index}")
    of_loss: dict[str, Any] = {
        "softcap": 0.0 if logit_softcap is None else check_positive("logit_softcap", logit_softcap),
        "z_loss": check_number("z_loss", z_loss, 0),
        "as_torch": True,
    }
    if options is not None:
        if not hasattr(options, "batch_chunk_size"):
            expected = "torch's LinearCrossEntropyOptions or None"
            raise TypeError(f"options: expected {expected}, got {type(options).__name__}")
        if chunk_size is not None and options.batch_chunk_size not in (None, chunk_size):
            both = f"{chunk_size} and {options.batch_chunk_size}"
            raise ValueError(f"chunk_size: expected the same as options.batch_chunk_size or None, got {both}")
        chunk_size = options.batch_chunk_size if chunk_size is None else chunk_size
    return loss_of_classes(
        "cross_entropy",
        (),
        input,
        linear_weight,
        target,
        linear_bias,
        reduction,
        chunk_size,
        {**more, **own},
        **of_loss,
    )


def linear_softmax_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    reduction: str = "mean",
    chunk_size: int | None = None,
    **options: Unpack[ClassOptions],
) -> Tensor:
    r"""Softmax focal loss of a linear layer's logits, which are made, used and forgotten some rows at a time.

    .. math::
        \ell(h, t) = \text{focal}(W h + b, t)

    with the formula of :func:`softmax_focal_loss`.

    Args:
        input, linear_weight, linear_bias, chunk_size: as in :func:`linear_cross_entropy`.
        target: classes ``[...]``, of any integer dtype.
        gamma, alpha, reduction: as in :func:`softmax_focal_loss`.
        options: as in :func:`softmax_focal_loss`.

    Returns:
        As :func:`softmax_focal_loss`; gradients as in :func:`linear_sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import linear_softmax_focal_loss
        >>> hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
        >>> linear_softmax_focal_loss(hidden, weight, torch.tensor([3, 999]), gamma=1.0).backward()
    """
    check_options(options, ClassOptions)
    params = (check_number("gamma", gamma, 0),)
    check_classes_alone(target, "target")
    return loss_of_classes(
        "focal", params, input, linear_weight, target, linear_bias, reduction, chunk_size, options, alpha=alpha
    )
