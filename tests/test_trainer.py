"""Trainer with our losses: against the model's own, accumulated against at once, and what it evaluates."""

from __future__ import annotations

import doctest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')

import transformers
from transformers import BertTokenizerFast, Trainer

import bertloss_fast as bf
from bertloss_fast.integrations import transformers as integration
from bertloss_fast.integrations.transformers import FusedLossTrainer, MultiLabelCollator, compute_loss_func
from bertloss_fast.integrations.transformers.losses import logits_of
from tests.bert import LABELS, arguments, class_labels, multi_hot, rows_of, some_ignored, tiny, trained
from tests.processes import outputs_of

ROWS = 22  # a window of 16, and one of 6 whose last batch is of 2


pytestmark = pytest.mark.usefixtures("one_thread")


def lists() -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in multi_hot(ROWS)]


def numbers() -> Tensor:
    return torch.randn(ROWS, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(35))]))
    return BertTokenizerFast(str(vocabulary))


def make_trainer(
    kind: type[Trainer], folder: Path, loss: nn.Module | None, labels: Any, model: Any = None, **more: Any
) -> Trainer:
    """A trainer of a model on rows with labels; more are options of its arguments, and what it collates with."""
    given: dict[str, Any] = {} if loss is None else {"compute_loss_func": compute_loss_func(loss)}
    given |= {"data_collator": more.pop("collator")} if "collator" in more else {}
    rows = rows_of(labels)
    return kind(
        tiny() if model is None else model, arguments(folder, **more), train_dataset=rows, eval_dataset=rows, **given
    )


def assert_close(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Up to the order of summation."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


PROBLEMS: dict[str, tuple[nn.Module, Any, int]] = {
    "multi_label_classification": (bf.BCEWithLogitsLoss(backend="eager"), multi_hot(ROWS), LABELS),
    "single_label_classification": (bf.CrossEntropyLoss(backend="eager"), class_labels(ROWS), LABELS),
    "regression": (bf.MSELoss(backend="eager"), numbers(), 1),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_accumulation_as_the_model_s_own_loss(problem: str, tmp_path: Path) -> None:
    """With dropout: the same seed, the same losses, the same weights, by either trainer."""
    loss, labels, num_labels = PROBLEMS[problem]

    def run(kind: type[Trainer], of_ours: nn.Module | None) -> tuple[float, dict[str, Tensor]]:
        model = tiny(num_labels, dropout=0.2, problem_type=problem)
        return trained(make_trainer(kind, tmp_path, of_ours, labels, model, batch=8))

    expected = run(Trainer, None)
    for kind in (Trainer, FusedLossTrainer):
        assert_close(run(kind, loss), expected)


def test_the_model_s_own_loss_is_not_divided(tmp_path: Path) -> None:
    """transformers#47688: with 4 batches accumulated, a loss of log 2 is logged, and stepped along, as 4 log 2."""

    def loss_of(kind: type[Trainer], loss: nn.Module | None) -> float:
        model = tiny(problem_type="multi_label_classification", initializer_range=1e-4)
        return trained(make_trainer(kind, tmp_path, loss, multi_hot(ROWS)[:16], model, gradient_accumulation_steps=4))[
            0
        ]

    ours = loss_of(Trainer, PROBLEMS["multi_label_classification"][0])
    assert ours == pytest.approx(0.693, abs=2e-3)
    own = loss_of(Trainer, None)
    assert own == pytest.approx(ours * (4 if int(transformers.__version__[0]) >= 5 else 1), rel=1e-3)


ACCUMULATED: dict[str, tuple[type[Trainer], nn.Module, Any]] = {
    "Trainer, elements": (Trainer, bf.BCEWithLogitsLoss(), some_ignored(ROWS)),
    "Trainer, classes": (Trainer, bf.CrossEntropyLoss(), class_labels(ROWS)),
    "Trainer, rows of bool": (Trainer, bf.ZlprLoss(), multi_hot(ROWS, torch.bool)),
    "elements": (FusedLossTrainer, bf.SigmoidFocalLoss(reduction="mean"), some_ignored(ROWS, torch.int64)),
    "rows": (FusedLossTrainer, bf.AsymmetricLossMultiLabel(), some_ignored(ROWS)),
    "rows that count": (
        FusedLossTrainer,
        bf.ZlprLoss(),
        some_ignored(ROWS).masked_fill(torch.arange(ROWS)[:, None] == 7, -100),
    ),
    "positives": (FusedLossTrainer, bf.SigmoidFocalLoss(reduction="mean_positive"), some_ignored(ROWS)),
    "sum": (FusedLossTrainer, bf.SigmoidFocalLoss(reduction="sum"), some_ignored(ROWS)),
    "positives, none in some rows": (
        FusedLossTrainer,
        bf.SigmoidFocalLoss(reduction="mean_positive"),
        multi_hot(ROWS).masked_fill((torch.arange(ROWS) // 4 == 1)[:, None], 0),  # the second batch of an evaluation
    ),
    "weights": (FusedLossTrainer, bf.CrossEntropyLoss(torch.linspace(0.1, 3, LABELS)), class_labels(ROWS)),
}


@pytest.mark.parametrize("case", ACCUMULATED)
def test_accumulated_as_at_once(case: str, tmp_path: Path) -> None:
    """Windows of 16 and of 6 rows as batches of 16 and of 6; and an evaluation in either as one of all rows."""
    kind, loss, labels = ACCUMULATED[case]
    loss.backend = "eager"
    whole = make_trainer(kind, tmp_path, loss, labels, batch=16)
    expected = trained(whole)
    parts = make_trainer(kind, tmp_path, loss, labels, gradient_accumulation_steps=4)
    assert_close(trained(parts), expected)
    if kind is FusedLossTrainer:
        assert parts.evaluate()["eval_loss"] == pytest.approx(of_all(whole, loss, labels), rel=1e-5)


def of_all(trainer: Trainer, loss: nn.Module, labels: Tensor) -> float:
    """The loss of all rows at once, from the model's logits."""
    tokens = torch.stack([row["input_ids"] for row in trainer.train_dataset])
    with torch.no_grad():
        logits = trainer.model.eval()(tokens).logits
        value: float = compute_loss_func(loss).of_logits(logits, labels).item()
    return value


def test_an_evaluation_in_half_precision(tmp_path: Path) -> None:
    """Whose sum over the elements is more than float16 holds."""
    loss, labels = bf.BCEWithLogitsLoss(backend="eager"), torch.ones(100, 2000, dtype=torch.bool)
    trainer = make_trainer(FusedLossTrainer, tmp_path, loss, labels, tiny(2000), batch=100, fp16_full_eval=True)
    expected = of_all(trainer, loss, labels)
    assert expected * labels.numel() > torch.finfo(torch.float16).max
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-2)


def test_where_logits_are() -> None:
    logits = torch.zeros(2, 3)
    for outputs in ({"logits": logits}, SimpleNamespace(logits=logits), (logits, None), logits):
        assert logits_of(outputs) is logits


@pytest.mark.parametrize("sparse", [False, True])
def test_lists_of_labels(sparse: bool, tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """As zeros and ones; of the labels that a metric gets, none is lost."""
    loss = bf.AsymmetricLossMultiLabel(reduction="batchmean", backend="eager")
    expected = trained(make_trainer(FusedLossTrainer, tmp_path, loss, multi_hot(ROWS), batch=16))
    collator = MultiLabelCollator(tokenizer, LABELS, sparse=sparse)
    trainer = make_trainer(FusedLossTrainer, tmp_path, loss, lists(), collator=collator, gradient_accumulation_steps=4)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction.label_ids) or {}
    assert_close(trained(trainer), expected)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(of_all(trainer, loss, multi_hot(ROWS)), rel=1e-5)
    assert [[label for label in row if label >= 0] for row in seen[0].tolist()] == lists()


def test_padded_labels_under_trainer(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    """It counts positives: enough for mean_positive, and for the rest an error before the first step."""
    collator = MultiLabelCollator(tokenizer, LABELS)
    loss = bf.BCEWithLogitsLoss(reduction="mean_positive", backend="eager")
    expected = trained(make_trainer(Trainer, tmp_path, loss, lists(), collator=collator, batch=16))
    assert_close(
        trained(make_trainer(Trainer, tmp_path, loss, lists(), collator=collator, gradient_accumulation_steps=4)),
        expected,
    )
    with pytest.raises(
        ValueError, match=r"expected a count of elements .*, got Trainer's, of positive labels; FusedLossTrainer counts"
    ):
        make_trainer(Trainer, tmp_path, bf.BCEWithLogitsLoss(), lists(), collator=collator).train()
    collator = MultiLabelCollator(tokenizer, LABELS, sparse=True)
    with pytest.raises(ValueError, match=r"num_items_in_batch: expected a count .*, got None"):
        make_trainer(Trainer, tmp_path, loss, lists(), collator=collator).train()


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_other_ways_to_train(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the model's own loss, that is: accumulated in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves another here
    loss = bf.SigmoidFocalLoss(alpha=None, gamma=0.0, reduction="mean", backend="eager")
    model = tiny(problem_type="multi_label_classification")
    found = trained(make_trainer(FusedLossTrainer, tmp_path, loss, multi_hot(ROWS), model, batch=8, **options))
    model = tiny(problem_type="multi_label_classification")
    expected = trained(make_trainer(Trainer, tmp_path, None, multi_hot(ROWS), model, batch=8, **options))
    assert_close(found, expected)


class Counted:
    """A trainer of somebody else."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        return super().training_step(*args, **kwargs)  # type: ignore[misc]


class SomeTrainer(Counted, Trainer):
    pass


class Mixed(FusedLossTrainer, SomeTrainer):
    pass


def test_mixed_into_another_trainer(tmp_path: Path) -> None:
    loss = bf.AsymmetricLossMultiLabel(backend="eager")
    trainer = make_trainer(Mixed, tmp_path, loss, some_ignored(ROWS), gradient_accumulation_steps=4)
    found = trained(trainer)
    assert_close(found, trained(make_trainer(FusedLossTrainer, tmp_path, loss, some_ignored(ROWS), batch=16)))
    assert trainer.steps == 6


def test_collated_labels(tokenizer: BertTokenizerFast) -> None:
    def item(labels: Any, text: str = "word1 word2") -> dict[str, Any]:
        return {**tokenizer(text), "labels": labels}

    collate = MultiLabelCollator(tokenizer, 5, pad_to_multiple_of=8)
    batch = collate([item([4, 0], "word3"), item([]), item(torch.tensor([2]))])
    assert batch["labels"].tolist() == [[0, 4], [-100, -100], [2, -100]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 8)
    assert collate([item([])])["labels"].tolist() == [[-100]]
    everything = collate([item([0, 1, 2, 3, 4])])["labels"]
    assert everything.tolist() == [[0, 1, 2, 3, 4, -100]], "five columns would be zeros and ones"
    assert MultiLabelCollator(tokenizer, 1)([item([0])])["labels"].tolist() == [[0, -100]]
    sparse = MultiLabelCollator(tokenizer, 5, sparse=True)([item([4, 0]), item([])])["labels"]
    assert sparse.to_dense().long().tolist() == [[1, 0, 0, 0, 1], [0] * 5]
    assert collate([dict(tokenizer("word1"))]).keys() == tokenizer("word1").keys(), "as a model predicts them"
    with pytest.raises(ValueError, match="labels: expected 0 <= label < 5, got 5 in row 1"):
        collate([item([4]), item([5])])
    with pytest.raises(
        ValueError, match="labels: expected numbers of labels, each once, got 3 in row 1, of which 2 differ"
    ):
        collate([item([4]), item([0, 1, 0])])
    with pytest.raises(TypeError, match="labels: expected integers, got float"):
        collate([item([0.0, 1.0])])
    with pytest.raises(ValueError, match="key: expected a key or place that every item has, got 'labels'"):
        collate([item([1]), dict(tokenizer("word1"))])
    with pytest.raises(ValueError, match="num_labels"):
        MultiLabelCollator(tokenizer, -1)


@pytest.mark.parametrize("name", integration.__all__)
def test_examples(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(integration, name), name, globs={})
    assert all(doctest.DocTestRunner().run(test).failed == 0 for test in examples)


OF_PROCESSES = ["CrossEntropyLoss", "AsymmetricLossMultiLabel", "ZlprLoss", "sum", "local", "fused head"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return outputs_of("trainer_processes.py", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", OF_PROCESSES)
def test_two_processes(name: str, outputs: list[str]) -> None:
    for output in outputs:
        assert name in output.splitlines(), output
