"""Losses of pairs of texts for which every label of the model is a yes-or-no question of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import modules
from .base import IDENTITY
from .pairs import PairLoss, check_labels


class LabelLoss(PairLoss):
    """A criterion for which every label of every pair is a yes-or-no question of its own."""

    def compute(self, logits: Tensor, labels: Tensor) -> Tensor:
        activated = self.activate(logits.squeeze(1))
        check_labels(labels, logits)
        loss: Tensor = self.criterion(activated.view_as(logits), labels.float().view_as(logits))
        return loss.view_as(activated) if loss.dim() else loss


class BinaryCrossEntropyLoss(LabelLoss):
    """Binary cross-entropy of the label of each pair, or of its several labels.

    Args:
        model: a CrossEncoder. With ``num_labels`` above 1, which sentence-transformers' loss refuses, the task is
            multi-label.
        activation_fn: what the logits go through before the loss.
        pos_weight: weight of the positive labels, a scalar or ``[num_labels]``.
        options: those of :class:`bertloss_fast.BCEWithLogitsLoss`, which has torch's and more.

    Shape:
        labels are numbers from 0 to 1, ``[N]``, or for several labels ``[N, num_labels]``.

    Raises:
        ValueError: at construction for a model that is no CrossEncoder; at the call for other than two columns, or
            another number of labels.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        weight = options.pop("weight", None)
        if weight is not None and getattr(model, "num_labels", None) == 1 and weight.dim() == 1:
            weight = weight.unsqueeze(1)  # one a pair, as torch has it for logits [N]; here they are [N, 1]
        criterion = modules.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, **options)
        super().__init__(model, activation_fn, criterion)

    @property
    def pos_weight(self) -> Tensor | None:
        assert isinstance(self.criterion, modules.BCEWithLogitsLoss)
        return self.criterion.pos_weight

    def get_config_dict(self) -> dict[str, Any]:
        weight = self.pos_weight
        return super().get_config_dict() | {
            "pos_weight": weight if weight is None else weight.item() if weight.numel() == 1 else weight.tolist()
        }


class FocalLoss(LabelLoss):
    """Focal loss of the label of each pair, or of its several labels; damps those that are well classified.

    Args:
        model: a CrossEncoder, with one label or several.
        activation_fn: what the logits go through before the loss.
        alpha: weight of the positive labels against the negative ones, from 0 to 1, or ``None`` for none.
        gamma: how strongly well-classified labels are damped.
        reduction: as in :func:`bertloss_fast.sigmoid_focal_loss`.
        options: those of :class:`bertloss_fast.SigmoidFocalLoss`.

    Shape:
        labels as of :class:`BinaryCrossEntropyLoss`.

    Raises:
        ValueError: as :class:`BinaryCrossEntropyLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        alpha: float | Tensor | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(model, activation_fn, modules.SigmoidFocalLoss(alpha, gamma, reduction, **options))

    def get_config_dict(self) -> dict[str, Any]:
        alpha, gamma = self.criterion.alpha, self.criterion.gamma
        return super().get_config_dict() | {
            "alpha": alpha.tolist() if isinstance(alpha, Tensor) else alpha,
            "gamma": gamma,
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{lin2017focal,
    title = {Focal Loss for Dense Object Detection},
    author = {Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr},
    booktitle = {International Conference on Computer Vision},
    year = {2017},
    eprint = {1708.02002},
    archivePrefix = {arXiv},
}
"""


class AsymmetricLoss(LabelLoss):
    """Asymmetric loss (ASL) of the label of each pair, or of its several labels; damps negatives more than positives.

    Args:
        model: a CrossEncoder, with one label or several.
        activation_fn: what the logits go through before the loss.
        gamma_neg, gamma_pos: how strongly well-classified negatives and positives are damped.
        clip: negatives with a probability below it have neither loss nor gradient.
        reduction: as in :func:`bertloss_fast.sigmoid_focal_loss`.
        options: those of :class:`bertloss_fast.AsymmetricLossMultiLabel`.

    Shape:
        labels as of :class:`BinaryCrossEntropyLoss`.

    Raises:
        ValueError: as :class:`BinaryCrossEntropyLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float | None = 0.05,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        criterion = modules.AsymmetricLossMultiLabel(gamma_neg, gamma_pos, clip, reduction=reduction, **options)
        super().__init__(model, activation_fn, criterion)

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {
            name: getattr(self.criterion, name) for name in ("gamma_neg", "gamma_pos", "clip")
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{ridnik2021asymmetric,
    title = {Asymmetric Loss For Multi-Label Classification},
    author = {Ridnik, Tal and Ben-Baruch, Emanuel and Zamir, Nadav and Noy, Asaf and Friedman, Itamar and
              Protter, Matan and Zelnik-Manor, Lihi},
    booktitle = {International Conference on Computer Vision},
    year = {2021},
    eprint = {2009.14119},
    archivePrefix = {arXiv},
}
"""


class GHMLoss(LabelLoss):
    """Gradient harmonizing (GHM-C) of the label of each pair, or of its several labels; damps what is common.

    A model in evaluation mode leaves the running counts as they are. They are of the loss and not of the model: a
    checkpoint of the trainer does not have them, and after it they begin anew.

    Args:
        model: a CrossEncoder, with one label or several.
        activation_fn: what the logits go through before the loss.
        bins: how many bins of gradients.
        momentum: of the running counts of the bins, from 0, and less than 1.
        reduction: as in :func:`bertloss_fast.sigmoid_focal_loss`.
        options: those of :class:`bertloss_fast.GHMLoss`.

    Shape:
        labels as of :class:`BinaryCrossEntropyLoss`.

    Raises:
        ValueError: as :class:`BinaryCrossEntropyLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        bins: int = 30,
        momentum: float = 0.75,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(model, activation_fn, modules.GHMLoss(bins, momentum, reduction, **options))

    def compute(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.criterion.train(self.model.training)  # which is all that a trainer switches
        return super().compute(logits, labels)

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"bins": self.criterion.bins, "momentum": self.criterion.momentum}

    @property
    def citation(self) -> str:
        return """
@inproceedings{li2019gradient,
    title = {Gradient Harmonized Single-Stage Detector},
    author = {Li, Buyu and Liu, Yu and Wang, Xiaogang},
    booktitle = {AAAI Conference on Artificial Intelligence},
    year = {2019},
    eprint = {1811.05181},
    archivePrefix = {arXiv},
}
"""
