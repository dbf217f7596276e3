"""GradCache: that its two passes are one, and need the memory of a mini-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("sentence_transformers", reason='pip install "bertloss-fast[sentence-transformers]"')

from sentence_transformers.cross_encoder import CrossEncoder

import bertloss_fast.integrations.sentence_transformers as ours
from tests.rerankers import assert_same, texts, tiny, value_and_gradients

COLUMNS = [texts(6, seed) for seed in (5, 6, 7, 8)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return tiny(tmp_path_factory.mktemp("one label"))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return tiny(tmp_path_factory.mktemp("dropout"), dropout=0.3, layers=1)


class Recorded:
    """What a model is given and gives, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.with_graph: list[bool] = []
        self.scores: list[Tensor] = []
        self._handle = model.register_forward_hook(self._record)

    def _record(self, model: nn.Module, inputs: Any, output: dict[str, Tensor]) -> None:
        self.with_graph.append(torch.is_grad_enabled())
        self.scores.append(output["scores"].detach().clone())

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


@pytest.mark.parametrize("forward_in", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backward_in", [False, True], ids=["", "backward in bfloat16"])
def test_the_second_pass_is_the_first_again(random_model: CrossEncoder, forward_in: bool, backward_in: bool) -> None:
    """The same scores to the last bit, dropout and autocast as they were, and nothing drawn that others would miss."""
    torch.manual_seed(0)
    loss = ours.CachedMultipleNegativesRankingLoss(random_model, mini_batch_size=5)
    with Recorded(random_model) as recorded:
        with torch.autocast("cpu", enabled=forward_in):
            value = loss(COLUMNS[:3])
        torch.rand(9)  # what others draw between the two
        state = torch.get_rng_state()
        with torch.autocast("cpu", enabled=backward_in):
            value.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(scores) for scores in recorded.scores] == 2 * [5, 5, 5, 5, 5, 5, 5, 1]
    assert recorded.with_graph == [False] * 8 + [True] * 8
    for first, second in zip(recorded.scores[:8], recorded.scores[8:], strict=True):
        assert first.dtype == (torch.bfloat16 if forward_in else torch.float32)
        assert torch.equal(first, second)


def test_two_passes_give_the_gradient_of_one(random_model: CrossEncoder) -> None:
    """Under dropout, against mini-batches of which every graph is kept; the upstream gradient is not 1."""
    loss = ours.CachedMultipleNegativesRankingLoss(random_model, num_negatives=None, mini_batch_size=7)

    class InOnePass(nn.Module):
        model = random_model

        def forward(self, inputs: Any, labels: Any) -> Tensor:
            columns = list(loss.candidates(inputs))
            pairs = [pair for column in columns for pair in zip(inputs[0], column, strict=True)]
            parts = [loss.score(pairs[start : start + 7], None, None) for start in range(0, len(pairs), 7)]
            scores = 10 * torch.cat(parts).view(len(columns), -1).T.sigmoid()
            return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    expected = value_and_gradients(InOnePass(), COLUMNS[:3], None, upstream=-2.5)
    assert_same(value_and_gradients(loss, COLUMNS[:3], None, upstream=-2.5), expected)


def test_two_losses_at_once_keep_what_is_theirs(random_model: CrossEncoder) -> None:
    """Of two batches before the first backward."""
    loss = ours.CachedMultipleNegativesRankingLoss(random_model)
    apart = [value_and_gradients(loss, COLUMNS[start : start + 2], None, seed=start)[1] for start in (0, 2)]
    random_model.zero_grad()
    values = []
    for start in (0, 2):
        torch.manual_seed(start)
        values.append(loss(COLUMNS[start : start + 2]))
    (values[0] + values[1]).backward()
    for name, parameter in random_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], rtol=1e-5, atol=1e-6)


def test_a_frozen_model_and_no_graph(random_model: CrossEncoder) -> None:
    loss = ours.CachedMultipleNegativesRankingLoss(random_model, num_negatives=None)
    with Recorded(random_model) as recorded, torch.no_grad():
        assert not loss(COLUMNS[:2]).requires_grad
    assert recorded.with_graph == [False, False]
    random_model.requires_grad_(False)
    loss(COLUMNS[:2]).backward()
    random_model.requires_grad_(True)


class Kept:
    """How many bytes graphs keep for backward, at most, while this is open."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> Any:
        count, size = self, tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)

        class Held:
            def __init__(self) -> None:
                self.tensor = tensor

            def __del__(self) -> None:
                count.now -= size

        return Held()

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__(*_)


def test_memory_is_that_of_a_mini_batch(model: CrossEncoder) -> None:
    """Whatever the batch's size, while one pass keeps more for each pair."""

    def most(loss: nn.Module, queries: int) -> int:
        column = ["acute pain"] * queries
        with Kept() as kept:
            loss([column, column], None).backward()
        assert kept.now == 0
        return kept.most

    cached = ours.CachedMultipleNegativesRankingLoss(model, num_negatives=1, mini_batch_size=4)
    at_once = ours.MultipleNegativesRankingLoss(model, num_negatives=1)
    assert most(cached, 16) < 1.1 * most(cached, 4)
    assert most(at_once, 16) > 2 * most(at_once, 4)


def test_shows_how_far_it_is(model: CrossEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    ours.CachedMultipleNegativesRankingLoss(model, show_progress_bar=True)(COLUMNS[:2])
    assert "Predict mini-batches: 100%" in capsys.readouterr().err
