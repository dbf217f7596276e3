"""Losses of the order of a query's documents: how likely it is that the scores, drawn by, give that order."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.cross_encoder import losses
from sentence_transformers.util import fullname
from torch import Tensor, nn

from ...functional import list_mle_loss, p_list_mle_loss
from .base import IDENTITY
from .lists import ListLoss

_POSITIONS = losses.PListMLELambdaWeight()


class PListMLELoss(ListLoss):
    """Position-aware ListMLE; :func:`bertloss_fast.p_list_mle_loss` has the formula.

    Args:
        model: a CrossEncoder with one label.
        lambda_weight: weights of the ranks; one without a function, the default, is computed in the kernel, of any
            other the weights are asked for. ``None`` for ListMLE.
        activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.
        respect_input_order: whether the documents come in the order of their relevance; else labels say it.

    Shape:
        as of :class:`LambdaLoss`.

    Raises:
        ValueError: as :class:`LambdaLoss`.
    """

    citation = losses.PListMLELoss.citation

    def __init__(
        self,
        model: nn.Module,
        lambda_weight: nn.Module | None = _POSITIONS,
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size, backend)
        self.lambda_weight = lambda_weight
        self.respect_input_order = respect_input_order

    def compute(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        by = None if self.respect_input_order else labels
        if self.lambda_weight is None:
            return list_mle_loss(scores, by, lengths=lengths, backend=self.backend)
        weight = self._position_weight(scores, lengths)
        return p_list_mle_loss(scores, by, lengths=lengths, lambda_weight=weight, backend=self.backend)

    def _position_weight(self, scores: Tensor, lengths: Tensor) -> Tensor | None:
        """The weights of ranks ``[Q, n]``; None for those that the kernel knows."""
        assert self.lambda_weight is not None
        if type(self.lambda_weight) is type(_POSITIONS) and self.lambda_weight.rank_discount_fn is None:
            return None
        valid = torch.arange(scores.shape[1], device=scores.device) < lengths.unsqueeze(1)
        weight: Tensor = self.lambda_weight(valid)
        return weight

    def get_config_dict(self) -> dict[str, Any]:
        weight = None if self.lambda_weight is None else fullname(self.lambda_weight)
        return super().get_config_dict() | {
            "lambda_weight": weight,
            "respect_input_order": self.respect_input_order,
        }


class ListMLELoss(PListMLELoss):
    """ListMLE; :func:`bertloss_fast.list_mle_loss` has the formula.

    Args:
        model, activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.
        respect_input_order: whether the documents come in the order of their relevance; else labels say it.

    Shape:
        as of :class:`LambdaLoss`.

    Raises:
        ValueError: as :class:`LambdaLoss`.
    """

    citation = losses.ListMLELoss.citation

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        respect_input_order: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, None, activation_fn, mini_batch_size, respect_input_order, backend=backend)

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        del config["lambda_weight"]
        return config
