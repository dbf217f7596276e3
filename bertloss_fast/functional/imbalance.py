"""Losses that weight each element by its batch or its row: for imbalance that a class weight cannot mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.passes import ghm_weights, row_rates
from ..targets import SparseLabels
from .checks import (
    LARGEST,
    check_fraction,
    check_inputs,
    check_no_gradient,
    check_number,
    check_positive,
    check_reduction,
)
from .elementwise import Options, compute, prepare
from .weights import as_counts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


def distribution_balanced_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    class_counts: Tensor | Sequence[float],
    num_samples: int,
    map_alpha: float = 0.1,
    map_beta: float = 10.0,
    map_mu: float = 0.2,
    neg_scale: float = 2.0,
    init_bias: float = 0.05,
    focal_gamma: float = 2.0,
    focal_balance: float = 2.0,
    reduction: str = "mean",
    **options: Unpack[Options],
) -> Tensor:
    r"""Distribution-balanced loss (DB), for long-tailed multi-label classification.

    .. math::
        \ell = \hat r \, b \left[ y \, q_+^\gamma \log(1 + e^{-z})
        + (1 - y) \, q_-^\gamma \log(1 + e^{\lambda z}) / \lambda \right], \quad
        \hat r = \alpha + \sigma\!\left(\beta \left( \frac{1 / n_c}{\sum_j y_j / n_j} - \mu \right)\right)

    with :math:`z = x - \kappa \log(N / n_c - 1) / \lambda`, :math:`q_+ = \sigma(-z)` and
    :math:`q_- = \sigma(\lambda z)`. It costs a pass over the targets for the rows' sums, and one launch.

    Args:
        inputs, targets: logits ``[..., L]`` and labels, as in :func:`sigmoid_focal_loss`; targets without gradient.
        class_counts: how often each label occurs in training, n, ``[L]``; taken as at least 1, at most N - 1. On the
            inputs' device: what lies elsewhere is copied at every call (the module copies it once).
        num_samples: how many samples training has, N, at least 2.
        map_alpha, map_beta, map_mu: the least weight, the steepness and the threshold of the rebalancing.
        neg_scale: what the logits of negatives are multiplied by, lambda, > 0.
        init_bias: how strongly the prior shifts the logits, kappa.
        focal_gamma, focal_balance: gamma and b; without gamma there is no b.
        reduction: as in :func:`sigmoid_focal_loss`.
        options: ``weight``, ``pos_weight``, ``sample_weight``, ``mask``, ``ignore_index``, ``label_smoothing`` (after
            the rows' sums), ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`sigmoid_focal_loss`.

    Returns:
        As :func:`sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import distribution_balanced_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> targets = torch.tensor([[True, False, False]])
        >>> distribution_balanced_loss(logits, targets, class_counts=[500, 20, 3], num_samples=1000).backward()

    Follows Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets", 2020
    (arXiv:2007.09654), and timm's ``DistributionBalancedLoss``.
    """
    check_inputs("inputs", inputs)
    by_label = balanced_values(class_counts, num_samples, neg_scale, init_bias)
    params = balanced_params(map_alpha, map_beta, map_mu, neg_scale, focal_gamma, focal_balance)
    return balanced_loss(inputs, targets, by_label.to(inputs.device), params, reduction, options)


def balanced_values(
    class_counts: Tensor | Sequence[float], num_samples: int, neg_scale: float, init_bias: float
) -> Tensor:
    """1 / counts and the shift of the logits, float64 ``[2, L]``."""
    check_number("num_samples", num_samples, 2)
    counts = as_counts("class_counts", class_counts, num_samples).clamp(1, num_samples - 1)
    init_bias = check_number("init_bias", init_bias, -LARGEST)
    shift = -torch.log(num_samples / counts - 1) * (init_bias / check_positive("neg_scale", neg_scale))
    return torch.stack([1 / counts, shift])


def balanced_params(
    map_alpha: float, map_beta: float, map_mu: float, neg_scale: float, focal_gamma: float, focal_balance: float
) -> tuple[float, ...]:
    """The numbers that the formula is compiled with."""
    gamma = check_number("focal_gamma", focal_gamma, 0)
    return (
        gamma,
        check_number("focal_balance", focal_balance, 0) if gamma > 0 else 1.0,
        check_positive("neg_scale", neg_scale),
        check_number("map_alpha", map_alpha, 0),
        check_number("map_beta", map_beta, 0),
        check_number("map_mu", map_mu, -LARGEST),
    )


def balanced_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    by_label: Tensor,
    params: tuple[float, ...],
    reduction: str,
    options: Options,
) -> Tensor:
    """The loss from values by label ``[2, L]`` that are ready."""
    check_inputs("inputs", inputs)
    spec, operands = prepare("balanced", params, inputs, targets, reduction, options)
    if by_label.shape[1:] != inputs.shape[-1:]:
        raise ValueError(
            f"class_counts: expected shape {tuple(inputs.shape[-1:])}, one count a label of inputs, "
            f"got {tuple(by_label.shape[1:])}"
        )
    check_no_gradient("targets", operands.targets)
    by_label = by_label.to(spec.compute_dtype).contiguous()
    rates = row_rates(spec, operands, by_label[0], dispatch.resolve(options.get("backend"), inputs.device))
    return compute(spec, operands._replace(by_label=by_label, by_row=rates), options)


def ghm_loss(
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    bins: int = 30,
    momentum: float = 0.75,
    reduction: str = "mean",
    *,
    running_counts: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""Gradient harmonizing (GHM-C): cross-entropy, each element weighted against how common its gradient is.

    .. math::
        \ell = \frac{N}{R_b \, M} \, \text{BCE}(x, y), \quad b = \lfloor B \, |\sigma(x) - y| \rfloor

    with B bins, of which M are not empty, N elements that count, and R the elements of a bin: in this batch, or by a
    running mean. The weights are constants to the gradient. It costs a pass over logits and targets, and one launch.

    Args:
        inputs, targets: logits ``[..., L]`` and labels, as in :func:`sigmoid_focal_loss`.
        bins: how many, from 1 to 1024.
        momentum: of the running mean, from 0 (this batch alone), and less than 1.
        reduction: as in :func:`sigmoid_focal_loss`.
        running_counts: float32 or float64 ``[bins]``, zero at first; where a bin of this batch is not empty, its value
            becomes momentum times itself plus (1 - momentum) times this batch's count, in place. None keeps no mean.
        process_group: sums the counts over the processes of this group.
        options: ``weight``, ``pos_weight``, ``sample_weight``, ``mask``, ``ignore_index``, ``label_smoothing``,
            ``normalizer``, ``backend``, ``upstream_memory``, as in :func:`sigmoid_focal_loss`.

    Returns:
        As :func:`sigmoid_focal_loss`.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has been computed then.

    Example::

        >>> import torch
        >>> from bertloss_fast import ghm_loss
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
        >>> counts = torch.zeros(30)
        >>> ghm_loss(logits, torch.tensor([[True, False, False]]), running_counts=counts).backward()

    Follows Li et al., "Gradient Harmonized Single-stage Detector", 2019 (arXiv:1811.05181), and mmdetection's ``GHMC``.
    """
    check_inputs("inputs", inputs)
    check_bins(bins)
    check_fraction("momentum", momentum)
    check_reduction(reduction)
    if running_counts is not None:
        _check_running_counts(running_counts, bins, inputs)
    spec, operands = prepare("ghm", (bins,), inputs, targets, reduction, options)
    backend = dispatch.resolve(options.get("backend"), inputs.device)
    table = ghm_weights(spec, operands, bins, momentum, running_counts, process_group, backend)
    return compute(spec, operands._replace(table=table), options)


def check_bins(bins: int) -> None:
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"bins: expected an integer from 1 to 1024, got {type(bins).__name__}")
    if not 1 <= bins <= 1024:
        raise ValueError(f"bins: expected an integer from 1 to 1024, got {bins}")


def _check_running_counts(counts: Tensor, bins: int, inputs: Tensor) -> None:
    if not isinstance(counts, Tensor) or counts.dtype not in (torch.float32, torch.float64):
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        # A count of 65536 is infinite in fp16.
        raise TypeError(f"running_counts: expected a tensor of float32 or float64, got {got}")
    if counts.requires_grad:
        raise ValueError("running_counts: expected a tensor without gradient, got requires_grad=True")
    if counts.shape != (bins,):
        raise ValueError(f"running_counts: expected shape ({bins},), one value a bin, got {tuple(counts.shape)}")
    if counts.device != inputs.device:
        raise ValueError(f"running_counts: expected device '{inputs.device}' like inputs, got '{counts.device}'")
