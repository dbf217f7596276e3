"""ZLPR and two-way: losses that hold the positive labels of a row against its negative ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.rowwise import rowwise_loss
from ..ops.upstream import UpstreamMemory
from ..reference.sigmoid import Operands, Spec
from ..targets import SparseLabels
from .checks import (
    as_normalizer,
    as_targets,
    check_inputs,
    check_mask,
    check_no_gradient,
    check_positive,
    check_probabilities,
    check_reduction,
    check_sample_weight,
    check_upstream_memory,
)


def zlpr_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    reduction: str = "mean",
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
    upstream_memory: UpstreamMemory | None = None,
) -> Tensor:
    r"""Zero-bounded log-sum-exp and pairwise rank-based loss for multi-label classification, in one pass over logits.

    .. math::
        \ell(x, y) = \log \Big( 1 + \sum_{j : y_j = 0} e^{x_j} \Big) + \log \Big( 1 + \sum_{j : y_j = 1} e^{-x_j} \Big)

    for each row: it ranks every positive label above 0, and 0 above every negative one. It has no parameters, and does
    not grow with the number of negatives as a sum of cross-entropies does. A row of up to 16384 labels (8192 in
    float64) is read once for its loss and its gradient, a longer one twice; once more where the denominator is to be
    counted, and with ``"none"``, whose gradient is computed in backward.

    Args:
        inputs: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64.
        targets: labels of the same shape: bool, any integer dtype (0 and 1), or floating, which count as positive above
            one half and get no gradient. They are read as they are: a bool target costs one byte of traffic, an int64
            eight. Or the labels without the zeros: :class:`SparseLabels` of ``(N, L)``, or a ``torch.sparse_csr``
            tensor.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"`` (both over rows that are not wholly ignored), or
            ``"mean_positive"`` (the sum over the number of positive labels, at least 1).
        sample_weight: one value a row, ``inputs.shape[:-1]``; multiplies its loss and changes no denominator.
        mask: bool, of the inputs' shape; where it is False, an element is neither positive nor negative.
        ignore_index: the target of elements that are treated so, in signed or floating dense targets.
        normalizer: a number, or a tensor of shape ``()`` on the inputs' device, that takes the denominator's place.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the inputs' device.
            Inside ``torch.func`` and forward-mode autograd the loss is plain operations, whatever it says.
        upstream_memory: as in :func:`sigmoid_focal_loss`.

    Returns:
        A scalar in float32 (float64 if inputs or targets are), or with ``"none"`` the shape ``inputs.shape[:-1]``, in
        the dtype to which torch promotes inputs and targets (under autocast at least float32). An empty batch gives 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Targets other than 0 and 1,
            soft ones outside of [0, 1], are found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``.

    Example::

        >>> import torch
        >>> from bertloss_fast import zlpr_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> zlpr_loss(logits, torch.tensor([[True, False, False]])).backward()

    Follows Su et al., "ZLPR: A Novel Loss for Multi-label Classification", 2022 (arXiv:2208.02955), and timm's
    ``ZlprLoss``.
    """
    operands = _operands(inputs, targets, mask, ignore_index)
    check_reduction(reduction)
    check_upstream_memory(upstream_memory)
    check_sample_weight(sample_weight, "inputs", inputs)
    normalizer = as_normalizer(normalizer, reduction, "inputs", inputs)
    operands = operands._replace(sample_weight=sample_weight, normalizer=normalizer)
    spec = _spec("zlpr", (1.0, 1.0), operands, reduction, ignore_index)
    return rowwise_loss(spec, operands, dispatch.resolve(backend, inputs.device), upstream_memory)


def two_way_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    tp: float = 4.0,
    tn: float = 1.0,
    reduction: str = "mean",
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Two-way multi-label loss: positives against negatives within each row, and within each column of the batch.

    .. math::
        \ell = \log \Big( 1 + \Big( \sum_{j : y_j = 0} e^{x_j / t_n} \Big)^{t_n}
        \Big( \sum_{j : y_j = 1} e^{-x_j / t_p} \Big)^{t_p} \Big)

    for each row, and for each column; the loss is the mean over the rows that have a positive label plus the mean over
    the columns that have one. A row or column without negatives has the loss 0.

    Args:
        inputs: logits, ``[..., L]``, of any strides, in float16, bfloat16, float32 or float64. All leading dimensions
            together are the batch.
        targets: labels of the same shape, or :class:`SparseLabels` of ``(N, L)``, as in :func:`zlpr_loss`.
        tp: temperature of the positive labels, above 0. Temperatures are compiled in: each new one compiles kernels.
        tn: temperature of the negative labels, above 0.
        reduction: ``"mean"``; the loss has no other.
        mask: bool, of the inputs' shape; where it is False, an element is neither positive nor negative.
        ignore_index: the target of elements that are treated so, in signed or floating dense targets.
        backend: ``"triton"``, ``"eager"``, ``"inductor"``, or ``None`` for the best that runs on the inputs' device.
            Inside ``torch.func`` and forward-mode autograd the loss is plain operations, whatever it says.

    Returns:
        A scalar in float32 (float64 if inputs or targets are). A batch without a positive label gives 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then. Targets other than 0 and 1,
            soft ones outside of [0, 1], are found on the CPU, and on a GPU with ``BERTLOSS_FAST_DEBUG=1``.

    Example::

        >>> import torch
        >>> from bertloss_fast import two_way_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.3, -0.2]], requires_grad=True)
        >>> two_way_loss(logits, torch.tensor([[True, False, False], [False, True, True]])).backward()

    Follows Kobayashi, "Two-way Multi-Label Loss", CVPR 2023, and timm's ``TwoWayLoss``.
    """
    operands = _operands(inputs, targets, mask, ignore_index)
    temperatures = check_temperature("tn", tn), check_temperature("tp", tp)
    check_mean(reduction)
    spec = _spec("two_way", temperatures, operands, reduction, ignore_index)
    return rowwise_loss(spec, operands, dispatch.resolve(backend, inputs.device))


def check_temperature(name: str, temperature: float) -> float:
    return check_positive(name, temperature, 1e-4, 1e4)


def check_mean(reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"reduction: expected mean, the two-way loss has no other; got {reduction!r}")


def _operands(
    inputs: Tensor, targets: Tensor | SparseLabels, mask: Tensor | None, ignore_index: int | None
) -> Operands:
    check_inputs("inputs", inputs)
    if inputs.dim() == 0:
        raise ValueError("inputs: expected shape (..., L), got ()")
    check_mask(mask, "inputs", inputs)
    dense, crow, col = as_targets("targets", targets, "inputs", inputs, ignore_index, mask)
    if dense is not None:
        check_probabilities("targets", dense, ignore_index, mask)
        check_no_gradient("targets", dense)
    return Operands(inputs, dense, crow, col, mask=mask)


def _spec(
    formula: str, temperatures: tuple[float, float], operands: Operands, reduction: str, ignored: int | None
) -> Spec:
    inputs, targets = operands.inputs, operands.targets
    dtype = inputs.dtype
    if targets is not None and targets.is_floating_point():
        dtype = torch.promote_types(dtype, targets.dtype)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    autocast = inputs.device.type != "meta" and torch.is_autocast_enabled(inputs.device.type)
    reduced = reduction != "none" or autocast
    return Spec(
        formula=formula,
        params=temperatures,
        alpha=None,
        smoothing=0.0,
        ignored=ignored,
        reduction=reduction,
        compute_dtype=compute_dtype,
        loss_dtype=compute_dtype if reduced else dtype,
    )
