"""Tiny BERTs, rows for them, and short trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from tests.architectures import SETTINGS

LABELS = 6


def tiny(num_labels: int = LABELS, dropout: float = 0.0, seed: int = 0, **options: Any) -> nn.Module:
    """A BERT of width 16. Its weights are large, so that its logits are far from each other."""
    of_model = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "initializer_range": 0.3}
    config = BertConfig(**{**SETTINGS["Bert"], **of_model, "num_labels": num_labels, **options})
    torch.manual_seed(seed)
    return BertForSequenceClassification(config)


def multi_hot(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(rows, LABELS, generator=torch.Generator().manual_seed(0)) < 0.3).to(dtype)


def some_ignored(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unevenly, so that no two batches count alike."""
    draw = torch.rand(rows, LABELS, generator=torch.Generator().manual_seed(2))
    return multi_hot(rows, dtype).masked_fill(draw < torch.linspace(0, 0.8, rows)[:, None], -100)


def class_labels(rows: int) -> Tensor:
    classes = torch.arange(rows) * 5 % LABELS
    classes[:9:2] = -100
    return classes


def rows_of(labels: Any, length: int = 5) -> list[dict[str, Any]]:
    """Texts of random tokens, with these labels."""
    tokens = torch.randint(5, 40, (len(labels), length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def arguments(folder: Path, batch: int = 4, **options: Any) -> TrainingArguments:
    """Of steps whose length is the gradient's, so that a gradient of another length is seen in the weights."""
    of_test: dict[str, Any] = {
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=batch, **of_test | options
    )


def trained(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """The mean of the steps' losses, and the weights after them."""
    loss = trainer.train().training_loss
    return loss, {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
