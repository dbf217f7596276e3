"""The recipe's classifier, as transformers makes, saves and loads models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bertloss_fast.metrics import ThresholdedClassifier, Thresholds
from classifier import MAX_TOKENS, PREDICTION_BATCH, pretrained_directory
from experiment import OptionError

THRESHOLDS = "thresholds.json"


class MeanPooledBert(transformers.BertPreTrainedModel):
    """BERT, the mean of its last hidden states, dropout and a linear layer.

    The pretrained MiniLM was trained with that mean. From the first token, which `BertForSequenceClassification` takes,
    thirty seconds made micro-F1 0.53 and from the mean 0.83, in one try each.
    """

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Without labels: `compute_loss_func` makes the loss of the logits `[N, L]`."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def new_model(codes: list[str], layers: int, bias: Tensor, seed: int) -> MeanPooledBert:
    """The pretrained MiniLM's lowest layers, its embeddings frozen, and a head that starts with this bias."""
    transformers.set_seed(seed)
    config = transformers.AutoConfig.from_pretrained(pretrained_directory(), local_files_only=True)
    if layers > config.num_hidden_layers:
        raise OptionError(f"--layers {layers}: the pretrained encoder has {config.num_hidden_layers}")
    config.num_hidden_layers = layers
    config.problem_type = "multi_label_classification"
    config.id2label = dict(enumerate(codes))
    config.label2id = {code: number for number, code in enumerate(codes)}
    model = MeanPooledBert.from_pretrained(pretrained_directory(), config=config, local_files_only=True)
    model.bert.embeddings.requires_grad_(False)
    with torch.no_grad():
        model.classifier.bias.copy_(bias)
    return model


def codes_of(model: nn.Module) -> list[str]:
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


def voting(
    models: Sequence[nn.Module], tokenizer: Any, thresholds: Any = 0.5, device: torch.device | None = None
) -> ThresholdedClassifier:
    """The models' mean probabilities, for texts of the demo."""
    return ThresholdedClassifier(
        list(models),
        tokenizer,
        thresholds,
        names=codes_of(models[0]),
        batch_size=PREDICTION_BATCH,
        max_length=MAX_TOKENS,
        device=device,
    )


def save(folder: Path, models: Sequence[transformers.PreTrainedModel], tokenizer: Any, thresholds: Thresholds) -> None:
    """A folder for each model, and the thresholds of all. Written beside its place and then moved there."""
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number, model in enumerate(models):
        model.save_pretrained(unfinished / f"model-{number}")
        tokenizer.save_pretrained(unfinished / f"model-{number}")
    tuned = {"overall": thresholds.overall, "per_label": thresholds.per_label.tolist()}
    (unfinished / THRESHOLDS).write_text(json.dumps(tuned) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def load_models(folder: Path) -> list[MeanPooledBert]:
    """Those that `save` wrote."""
    folders = sorted(folder.glob("model-*"))
    try:
        models = [MeanPooledBert.from_pretrained(path, local_files_only=True) for path in folders]
    except (OSError, ValueError, RuntimeError):
        models = []
    if not models:
        raise OptionError(f"{folder}: there is no model of this recipe in it; `finetune_bert.py` writes one")
    return models


def load_classifier(folder: Path, device: torch.device) -> ThresholdedClassifier:
    models = load_models(folder)
    try:
        threshold = json.loads((folder / THRESHOLDS).read_text(encoding="utf-8"))["overall"]
    except (OSError, ValueError, KeyError):
        raise OptionError(f"{folder / THRESHOLDS}: expected the thresholds of a finished run") from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model-0", local_files_only=True)
    return voting(models, tokenizer, threshold, device)
