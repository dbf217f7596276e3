"""Adversarial training on word embeddings: a text is also learnt with the noise that disturbs the model most.

FGM, of Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", 2017 (arXiv:1605.07725),
adds noise of length epsilon in the direction of the loss's gradient. PGD, of Madry et al., "Towards Deep Learning
Models Resistant to Adversarial Attacks", 2018 (arXiv:1706.06083), takes several smaller steps and stays within a ball
of that radius. The weights learn from the sum of the losses without and with noise.

The noise is added to what the embedding layer gives, text by text. Weights are never touched, so that nothing is to be
restored, and frozen embeddings will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Attack(NamedTuple):
    epsilon: float
    """The length of a text's noise, over all its tokens."""
    steps: int
    step: float
    """Of each, the length."""


def make_attack(method: str, epsilon: float) -> Attack:
    """PGD's three steps of 0.8 epsilon can go round the ball: 2.5 / 3, as Madry et al. choose them."""
    return Attack(epsilon, 1, epsilon) if method == "fgm" else Attack(epsilon, 3, 2.5 / 3 * epsilon)


class Noise:
    """Is added to an embedding layer's output `[N, T, D]` while it is entered; nothing until the first `climb`."""

    def __init__(self, embeddings: nn.Module, attack: Attack) -> None:
        self.embeddings, self.attack = embeddings, attack
        self.value: Tensor | None = None

    def __enter__(self) -> Noise:
        self._hook = self.embeddings.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.value is None:
            self.value = torch.zeros_like(output, requires_grad=True)
        return output + self.value

    def climb(self, gradient: Tensor) -> None:
        """A step along each text's gradient, and back into the ball."""
        assert self.value is not None
        moved = self.value.detach() + self.attack.step * gradient / lengths(gradient)
        shrunk = moved * (self.attack.epsilon / lengths(moved)).clamp_max(1)
        self.value = shrunk.requires_grad_()


def lengths(noise: Tensor) -> Tensor:
    """Of each text's noise, `[N, 1, 1]`, and never 0."""
    return noise.flatten(1).norm(dim=1).clamp_min(torch.finfo(noise.dtype).tiny)[:, None, None]


def learn_disturbed(
    embeddings: nn.Module,
    attack: Attack,
    learn: Callable[[], Tensor],
    last: Callable[[], Tensor],
    loss: Callable[[], Tensor],
) -> Tensor:
    """Leaves the gradients of both losses in the weights and returns that without noise.

    `learn` computes the loss and goes backward, and `last` does the same where gradients are shared among processes;
    `loss` only computes it, for the steps between, which the weights do not learn from.
    """
    with Noise(embeddings, attack) as noise:
        clean = learn()
        assert noise.value is not None
        gradient = noise.value.grad
        assert gradient is not None
        for _ in range(attack.steps - 1):
            noise.climb(gradient)
            (gradient,) = torch.autograd.grad(loss(), noise.value)
        noise.climb(gradient)
        last()
    return clean
