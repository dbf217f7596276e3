"""What the README's "Use it with" takes as the reader's own: small models, data and arguments.

A function makes the names of the block whose fence ends in ``yours=``, and the function's name. It imports what it
needs itself: the README's other blocks need the package alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bertloss_fast import collate_labels

ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
FEATURES = [(torch.randn(16), [3, 7]), (torch.randn(16), [])]


def pytorch(folder: Path) -> dict[str, Any]:
    model = nn.Linear(16, 1000)
    return {"torch": torch, "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "dataset": FEATURES}


def trainer(folder: Path) -> dict[str, Any]:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {
        "model": BertForSequenceClassification(BertConfig(vocab_size=9, num_labels=1000, **sizes)),
        "tokenizer": BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}),
        "arguments": TrainingArguments(str(folder), **ONE_STEP),
        "dataset": [{"input_ids": [2, 7, 3], "labels": [3, 999]}, {"input_ids": [2, 3], "labels": []}],
        "Trainer": Trainer,
    }


def sentence_transformers(folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    from tests.rerankers import tiny

    columns = {"query": ["broken arm"] * 2, "documents": [["fracture", "fever"]] * 2, "labels": [[1, 0]] * 2}
    return {
        "model": tiny(folder),
        "arguments": CrossEncoderTrainingArguments(str(folder / "runs"), **ONE_STEP),
        "dataset": Dataset.from_dict(columns),
        "CrossEncoderTrainer": CrossEncoderTrainer,
    }


def lightning(folder: Path) -> dict[str, Any]:
    loader = DataLoader(FEATURES, batch_size=2, collate_fn=collate_labels(num_labels=1000))
    return {"torch": torch, "model": nn.Linear(16, 1000), "loader": loader}
