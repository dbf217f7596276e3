"""CrossEncoderTrainer with our losses: what it says of them, checkpoints, and several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers", reason='pip install "bertloss-fast[sentence-transformers]"')

import bertloss_fast.integrations.sentence_transformers as ours
from tests.processes import outputs_of
from tests.rerankers import copies, tiny, trainer_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny(path)
    return path


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dropout")
    tiny(path, dropout=0.3)
    return path


@pytest.mark.parametrize("name", ["LambdaLoss", "CachedMultipleNegativesRankingLoss"])
def test_resumes_from_a_checkpoint(name: str, random_folder: Path, tmp_path: Path) -> None:
    """Under dropout: the weights of the training that went on are those of the one that began again in the middle."""
    whole, resumed = (getattr(ours, name)(model) for model in copies(random_folder, 2))
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_of(whole, tmp_path, **saving).train()
    trainer_of(resumed, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "trained" / "checkpoint-2"))
    start = copies(random_folder, 1)[0].state_dict()
    for key, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], weight, rtol=0, atol=0)
    assert any(not torch.equal(weight, start[key]) for key, weight in whole.model.state_dict().items())


def test_the_model_card_names_the_loss_and_cites_it(folder: Path, tmp_path: Path) -> None:
    (model,) = copies(folder, 1)
    trainer_of(ours.LambdaLoss(model, ours.LambdaRankScheme(), k=7), tmp_path, max_steps=1).train()
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "bertloss_fast.integrations.sentence_transformers.lists.LambdaLoss" in card
    assert '"k": 7' in card
    assert "LambdaRankScheme" in card
    assert "The LambdaLoss Framework for Ranking Metric Optimization" in card
    assert "loss:LambdaLoss" in card


LOSSES = [
    "LambdaLoss",
    "BinaryCrossEntropyLoss",
    "MultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "MarginMSELoss",
]


@pytest.fixture(scope="module")
def outputs(folder: Path) -> list[str]:
    return outputs_of("reranker_processes.py", folder)


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes(name: str, outputs: list[str]) -> None:
    for output in outputs:
        assert name in output.splitlines(), output
