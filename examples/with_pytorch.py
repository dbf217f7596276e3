"""Plain PyTorch: a transformers model of clinical texts and the loss in a loop of one's own, thresholds and figures.

python examples/with_pytorch.py --limit 4000 --epochs 3
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bertloss_fast import SigmoidFocalLoss, SparseLabels, collate_labels
from bertloss_fast.metrics import ThresholdedClassifier, multilabel_metrics, tune_thresholds
from classifier import MAX_TOKENS, pretrained_directory
from clinical_codes import Family, describe, labels_by_frequency, load_families, split_families
from training import HEAD_LEARNING_RATE, LEARNING_RATE

LABELS, LAYERS = 200, 3
TOKENIZER = AutoTokenizer.from_pretrained(pretrained_directory(), local_files_only=True)


class Data(NamedTuple):
    codes: list[str]
    train: DataLoader
    validation: DataLoader
    test: DataLoader
    test_texts: list[str]


def load(limit: int) -> Data:
    split = split_families(load_families(), limit)
    codes = labels_by_frequency(split.train)[:LABELS]
    number = {code: place for place, code in enumerate(codes)}

    def item(family: Family) -> dict[str, list[int]]:
        ids = TOKENIZER(family.text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return {"input_ids": ids, "labels": [number[code] for code in family.labels if code in number]}

    collate = collate_labels(len(codes), collate=DataCollatorWithPadding(TOKENIZER))  # labels become SparseLabels
    train, *held_out = ([item(family) for family in part] for part in split)
    loaders = [DataLoader(part, batch_size=128, collate_fn=collate) for part in held_out]
    shuffled = DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate)
    return Data(codes, shuffled, *loaders, [family.text for family in split.test])


def new_model(num_labels: int) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        pretrained_directory(), local_files_only=True, num_labels=num_labels, num_hidden_layers=LAYERS
    )
    nn.init.constant_(model.classifier.bias, -4.0)  # labels are rare: from 0 the first steps would only learn that
    return model.train()  # it came in eval mode, in which Lightning would leave it


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": model.base_model.parameters(), "lr": LEARNING_RATE / 5},
        {"params": model.classifier.parameters(), "lr": HEAD_LEARNING_RATE},
    ]
    return torch.optim.AdamW(groups, fused=True)


@torch.inference_mode()
def predict(model: nn.Module, loader: DataLoader) -> tuple[Tensor, SparseLabels]:
    """Logits and labels of all batches."""
    model.eval()
    batches = [(batch.pop("labels"), model(**batch).logits) for batch in loader]
    labels, logits = zip(*batches, strict=True)
    return torch.cat(logits), SparseLabels.cat(labels)


def report(model: nn.Module, data: Data) -> dict[str, float]:
    """The thresholds come from validation; figures and labelled texts are of the test split."""
    threshold = tune_thresholds(*predict(model, data.validation)).overall
    figures = multilabel_metrics(len(data.codes), threshold=threshold)(*predict(model, data.test))
    print(f"threshold {threshold:.2f}, " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    classifier = ThresholdedClassifier(model, TOKENIZER, threshold, names=[describe(code) for code in data.codes])
    for text, names in zip(data.test_texts[:3], classifier.predict(data.test_texts[:3]), strict=True):
        print(f"{text}: {'; '.join(names) or 'no label'}")
    return figures


def arguments(description: str, given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--limit", type=int, default=4000, help="families of codes (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training texts (default %(default)s)")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> dict[str, float]:
    options = arguments("Trains a classifier of clinical texts in plain PyTorch.", given)
    data = load(options.limit)
    model = new_model(len(data.codes))
    optimizer = make_optimizer(model)
    criterion = SigmoidFocalLoss(alpha=None, gamma=2.0, reduction="batchmean")
    for _ in range(options.epochs):
        model.train()
        for batch in data.train:
            labels = batch.pop("labels")
            loss = criterion(model(**batch).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return report(model, data)


if __name__ == "__main__":
    main()
