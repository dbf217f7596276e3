"""The multi-label family as functions: every label of every row is a yes-or-no question of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.small import small_binary_cross_entropy, small_focal_loss
from ..ops.upstream import UpstreamMemory
from ..targets import SparseLabels
from .checks import LARGEST, check_fraction, check_inputs, check_number, one_reduction
from .elementwise import Options, are_plain, elementwise_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    **options: Unpack[Options],
) -> Tensor:
    r"""Focal loss for multi-label classification, in one pass over the logits; a drop-in for torchvision's.

    .. math::
        \ell(x, y) = w \, \alpha_t \, m^\gamma \left[ w_+ \, y \log(1 + e^{-x}) + (1 - y) \log(1 + e^x) \right]

    with :math:`m = y \, \sigma(-x) + (1 - y) \, \sigma(x)`, the probability that is given to the wrong label, and
    :math:`\alpha_t = \alpha y + (1 - \alpha)(1 - y)`.

    Args:
        inputs: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64.
        targets: labels of the same shape: bool, any integer dtype (0 and 1), or floating, where values between 0 and 1
            are soft labels. They are read as they are: a bool target costs one byte of traffic, an int64 eight. Or the
            labels without the zeros: :class:`SparseLabels` of ``(N, L)``, or a ``torch.sparse_csr`` tensor.
        alpha: weight of the positive labels against the negative ones, in [0, 1]; a tensor ``[L]`` gives each label
            its own; ``None`` or a negative number means no such weight. Numbers are compiled in: each new value of
            alpha or gamma compiles a kernel.
        gamma: how strongly well-classified elements are damped, at least 0; 0 is binary cross-entropy.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` over elements, ``"batchmean"`` (the sum over the number of rows) or
            ``"mean_positive"`` (the sum over the sum of the targets, at least 1, as detectors count).
        weight: ``[L]`` or the inputs' shape; multiplies each element's loss and does not change a denominator.
        pos_weight: ``[L]`` or a scalar; multiplies the positive term of the cross-entropy.
        sample_weight: one value a row, ``inputs.shape[:-1]``; multiplies its losses and changes no denominator.
        mask: bool, of the inputs' shape; where it is False, an element has no loss, no gradient, and does not count.
        ignore_index: the target of elements that are treated so, in signed or floating dense targets.
        label_smoothing: moves every label towards one half, y (1 - s) + s / 2; from 0, and less than 1.
        normalizer: a number, or a tensor of shape ``()`` on the inputs' device, that takes the denominator's place.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the inputs' device.
            Inside ``torch.func`` and forward-mode autograd the loss is plain operations, whatever it says.
        upstream_memory: what the modules have: an :class:`UpstreamMemory` by which the gradient is written for the
            upstream gradient that came last, and not for 1.

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
    if are_plain(options):
        loss = small_focal_loss(inputs, targets, alpha, gamma, reduction, options.get("backend"))
        if loss is not None:
            return loss
    check_inputs("inputs", inputs)
    params = (check_number("gamma", gamma, 0),)
    return elementwise_loss("focal", params, inputs, targets, reduction, options, alpha=alpha)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor | SparseLabels,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: float | Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
    upstream_memory: UpstreamMemory | None = None,
) -> Tensor:
    r"""Binary cross-entropy on logits, in one pass over them; a drop-in for torch's.

    .. math::
        \ell(x, y) = w \left[ w_+ \, y \log(1 + e^{-x}) + (1 - y) \log(1 + e^x) \right]

    Args:
        input: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64.
        target: labels of the same shape: floating as torch has them, and also bool or any integer dtype (0 and 1); or
            :class:`SparseLabels`.
        weight: any shape that broadcasts to the input's; multiplies each element's loss.
        size_average, reduce: deprecated, as in torch; they override ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``, as in
            :func:`sigmoid_focal_loss`.
        pos_weight: ``[L]`` or a scalar; multiplies the positive term.
        sample_weight, mask, ignore_index, label_smoothing, normalizer, backend, upstream_memory: as in
            :func:`sigmoid_focal_loss`.

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
    reduction = one_reduction(size_average, reduce, reduction)
    # As are_plain() says, without the time that a dict takes, a tenth of a small call.
    plain = weight is None and pos_weight is None and sample_weight is None and mask is None and ignore_index is None
    smooth = label_smoothing.__class__ is not float or label_smoothing
    if plain and normalizer is None and not smooth and isinstance(upstream_memory, UpstreamMemory | None):
        loss = small_binary_cross_entropy(input, target, reduction, backend)
        if loss is not None:
            return loss
    check_inputs("input", input)
    options: Options = {
        "weight": weight,
        "pos_weight": pos_weight,
        "sample_weight": sample_weight,
        "mask": mask,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "normalizer": normalizer,
        "backend": backend,
        "upstream_memory": upstream_memory,
    }
    return elementwise_loss("bce", (), input, target, reduction, options, as_torch=True)


def asymmetric_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float | None = 0.05,
    reduction: str = "batchmean",
    detach_focal_weight: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    r"""Asymmetric loss (ASL): negatives are damped more than positives, and easy ones dropped, in one pass.

    .. math::
        \ell(x, y) = -w \, m^{\gamma_+ y + \gamma_- (1 - y)} \left[ w_+ \, y \log p + (1 - y) \log(1 - r) \right]

    with :math:`p = \sigma(x)`, :math:`r = \max(p - \text{clip}, 0)` and :math:`m = y (1 - p) + (1 - y) r`.

    Args:
        inputs, targets: logits ``[..., L]`` and labels, as in :func:`sigmoid_focal_loss`.
        gamma_neg, gamma_pos: how strongly well-classified negatives and positives are damped, at least 0.
        clip: negatives with a probability below it have neither loss nor gradient; from 0, and less than 1.
        reduction: as in :func:`sigmoid_focal_loss`; ``"batchmean"`` is timm's default.
        detach_focal_weight: take the focal factor for a constant when differentiating (timm's
            ``disable_torch_grad_focal_loss``).
        options: ``weight``, ``pos_weight``, ``sample_weight``, ``mask``, ``ignore_index``, ``label_smoothing``,
            ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`sigmoid_focal_loss`.

    Returns:
        As :func:`sigmoid_focal_loss`. Where p is close to ``clip``, r has the absolute accuracy of p: the difference
        cancels.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import asymmetric_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> asymmetric_loss(logits, torch.tensor([[True, False, False]])).backward()

    Follows Ridnik et al., "Asymmetric Loss For Multi-Label Classification", 2021 (arXiv:2009.14119), and timm's
    ``AsymmetricLossMultiLabel``, without its eps.
    """
    check_inputs("inputs", inputs)
    params = (
        check_number("gamma_neg", gamma_neg, 0),
        check_number("gamma_pos", gamma_pos, 0),
        check_fraction("clip", clip or 0.0),
        bool(detach_focal_weight),
    )
    return elementwise_loss("asymmetric", params, inputs, targets, reduction, options)


def poly_focal_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    epsilon: float = 2.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    reduction: str = "mean",
    **options: Unpack[Options],
) -> Tensor:
    r"""Poly-1 on the focal loss, or with gamma 0 on binary cross-entropy, in one pass.

    .. math::
        \ell(x, y) = w \, \alpha_t \left[ m^\gamma \, \text{CE}(x, y) + \epsilon \, m^{\gamma + 1} \right]

    with the focal loss's :math:`m`, the probability that is given to the wrong label, :math:`\alpha_t`, and
    cross-entropy CE, which ``pos_weight`` is part of.

    Args:
        inputs, targets: logits ``[..., L]`` and labels, as in :func:`sigmoid_focal_loss`.
        epsilon: how much the leading term of the cross-entropy's expansion is raised.
        gamma, alpha, reduction: as in :func:`sigmoid_focal_loss`.
        options: ``weight``, ``pos_weight``, ``sample_weight``, ``mask``, ``ignore_index``, ``label_smoothing``,
            ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`sigmoid_focal_loss`.

    Returns:
        As :func:`sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import poly_focal_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> poly_focal_loss(logits, torch.tensor([[True, False, False]]), epsilon=1.0).backward()

    Follows Leng et al., "PolyLoss", 2022 (arXiv:2204.12511), and timm's ``PolyBinaryCrossEntropy``.
    """
    check_inputs("inputs", inputs)
    params = (check_number("gamma", gamma, 0), check_number("epsilon", epsilon, -LARGEST))
    return elementwise_loss("poly", params, inputs, targets, reduction, options, alpha=alpha)
