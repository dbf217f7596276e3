"""What a multi-label classifier learns from besides its labels: a teacher, its own average, and its own second look.

The package's `distillation_loss` and `r_drop_loss` compare softmax distributions. A multi-label classifier has a
Bernoulli distribution for each label: here the Kullback-Leibler divergences are sums over those.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bertloss_fast import binary_cross_entropy_with_logits

DECAY = 0.99
"""Of the average of one's own weights, a step: it is of about the last hundred."""


class Teacher:
    """The mean probabilities of one model or several, which learn nothing here."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], temperature: float) -> Tensor:
        """`[N, L]`."""
        chances = [(model(**inputs).logits.float() / temperature).sigmoid() for model in self.models]
        return torch.stack(chances).mean(0)

    def follow(self, student: nn.Module) -> None:
        """Called after every step; a teacher of another training stays as it is."""


class OwnAverage(Teacher):
    """A teacher with the moving average of the student's weights.

    Follows Xu et al., "Improving BERT Fine-Tuning via Self-Ensemble and Self-Distillation", 2020 (arXiv:2002.10345),
    and, for a moving average instead of one of the last few, Tarvainen and Valpola, "Mean teachers are better role
    models", 2017 (arXiv:1703.01780).
    """

    def __init__(self, student: nn.Module) -> None:
        shared = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
        super().__init__([copy.deepcopy(student, shared)])
        self._average = get_ema_multi_avg_fn(DECAY)

    def follow(self, student: nn.Module) -> None:
        pairs = zip(self.models[0].parameters(), student.parameters(), strict=True)
        own, learnt = zip(*((mine, yours) for mine, yours in pairs if yours.requires_grad), strict=True)
        self._average(own, learnt, 0)


def imitation(logits: Tensor, chances: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with a teacher's probabilities, which differs from their divergence by a constant; T² as Hinton."""
    soft = binary_cross_entropy_with_logits(logits / temperature, chances, reduction="batchmean")
    return temperature**2 * soft


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Half of KL(p‖q) + KL(q‖p) of two looks with other dropout, summed over labels: (p - q)(a - b) / 2.

    Follows Wu et al., "R-Drop: Regularized Dropout for Neural Networks", 2021 (arXiv:2106.14448), with the Bernoulli
    distribution in place of the softmax.
    """
    return ((first.sigmoid() - second.sigmoid()) * (first - second)).sum() / (2 * len(first))
