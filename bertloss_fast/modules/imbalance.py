"""Losses that weight each element by its batch or its row, as modules over ``functional/imbalance.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional as F
from ..functional.checks import check_fraction
from ..functional.imbalance import balanced_loss, balanced_params, balanced_values, check_bins
from ..targets import SparseLabels
from .sigmoid import ElementwiseLoss, one_smoothing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DistributionBalancedLoss(ElementwiseLoss):
    """Distribution-balanced loss; :func:`bertloss_fast.distribution_balanced_loss` has the formula.

    Takes timm's arguments by the same positions and names, and loads and writes its state dict.

    Args:
        class_counts: how often each label occurs in training, ``[L]``; what is made of it are buffers.
        num_samples: how many samples training has, at least 2.
        map_alpha, map_beta, map_mu: the least weight, the steepness and the threshold of the rebalancing.
        neg_scale: what the logits of negatives are multiplied by, > 0.
        init_bias: how strongly the prior shifts the logits.
        focal_gamma, focal_balance: exponent and factor of the focal term; without the one there is not the other.
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
        >>> from bertloss_fast import DistributionBalancedLoss
        >>> criterion = DistributionBalancedLoss(class_counts=[500, 20, 3], num_samples=1000)
        >>> loss = criterion(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool))
    """

    freq_inv: Tensor
    logit_bias: Tensor
    _shown = ("map_alpha", "map_beta", "map_mu", "neg_scale", "focal_gamma", "focal_balance")

    def __init__(
        self,
        class_counts: Tensor | Sequence[float],
        num_samples: int,
        map_alpha: float = 0.1,
        map_beta: float = 10.0,
        map_mu: float = 0.2,
        neg_scale: float = 2.0,
        init_bias: float = 0.05,
        focal_gamma: float = 2.0,
        focal_balance: float = 2.0,
        smoothing: float = 0.0,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(reduction, **one_smoothing(smoothing, options))
        balanced_params(map_alpha, map_beta, map_mu, neg_scale, focal_gamma, focal_balance)
        self.map_alpha, self.map_beta, self.map_mu = map_alpha, map_beta, map_mu
        self.neg_scale, self.focal_gamma, self.focal_balance = neg_scale, focal_gamma, focal_balance
        inverse, shift = balanced_values(class_counts, num_samples, neg_scale, init_bias)
        self.register_buffer("freq_inv", inverse.float())
        self.register_buffer("logit_bias", shift.float())

    def forward(self, inputs: Tensor, targets: Tensor | SparseLabels, **options: Any) -> Tensor:
        params = balanced_params(
            self.map_alpha, self.map_beta, self.map_mu, self.neg_scale, self.focal_gamma, self.focal_balance
        )
        by_label = torch.stack([self.freq_inv, self.logit_bias])
        return balanced_loss(inputs, targets, by_label, params, self.reduction, self._options(options))


class GHMLoss(ElementwiseLoss):
    """Gradient harmonizing (GHM-C); :func:`bertloss_fast.ghm_loss` has the formula.

    The one loss with a memory that its value depends on: with momentum, the running counts of the bins are a buffer of
    the state dict. A call in training mode changes them, one in evaluation mode does not.

    Args:
        bins: how many bins of gradients, from 1 to 1024.
        momentum: of the running counts, from 0 (no memory), and less than 1.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"mean_positive"``.
        process_group: sums the counts over the processes of this group; not copied or pickled with the module.
        options: ``weight``, ``pos_weight`` (buffers), ``ignore_index``, ``label_smoothing``, ``backend``.

    Shape:
        inputs and targets ``[..., L]``; the loss is a scalar, or ``[..., L]`` with ``"none"``. A call also takes
        ``sample_weight``, ``mask``, ``normalizer``, and an ``ignore_index`` in the place of the module's.

    Raises:
        TypeError, ValueError: for arguments that no inputs fit; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import GHMLoss
        >>> criterion = GHMLoss(bins=10, momentum=0.5)
        >>> loss = criterion(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.bool))
        >>> criterion.running_counts.sum().item()
        6.0
    """

    running_counts: Tensor | None
    _shown = ("bins", "momentum")

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        reduction: str = "mean",
        *,
        process_group: ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(reduction, **options)
        check_bins(bins)
        self.bins = bins
        self.momentum = check_fraction("momentum", momentum)
        self.process_group = process_group
        self.register_buffer("running_counts", torch.zeros(bins) if momentum > 0 else None)

    def forward(self, inputs: Tensor, targets: Tensor | SparseLabels, **options: Any) -> Tensor:
        counts = self.running_counts
        if counts is not None and not self.training:
            counts = counts.clone()
        return F.ghm_loss(
            inputs,
            targets,
            self.bins,
            self.momentum,
            self.reduction,
            running_counts=counts,
            process_group=self.process_group,
            **self._options(options),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GHMLoss:
        """The counts move, and stay float32: in fp16 one of 65536 is infinite, and its bin would weigh nothing."""
        counts = self.running_counts
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if counts is not None and self.running_counts is not None:
            self.running_counts = counts.to(self.running_counts.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process_group": None}
