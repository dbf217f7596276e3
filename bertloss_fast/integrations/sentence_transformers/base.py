"""What the losses of a cross-encoder share: pairs of texts go in, the model's scores come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.util import fullname
from torch import Tensor, nn

Pair = tuple[str, str]
Labels = Tensor | Sequence[Any]

IDENTITY = nn.Identity()


class CrossEncoderLoss(nn.Module):
    """A loss that has its model: it is called with columns of texts, and tokenizes and scores them itself.

    The trainer puts the model that it has wrapped in the place of ``model``: what only a CrossEncoder knows, as
    ``num_labels``, is asked for here and not in ``forward``.
    """

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None, num_labels: int | None = None) -> None:
        super().__init__()
        if not hasattr(model, "num_labels"):
            raise ValueError(f"model: expected a CrossEncoder, got {type(model).__name__}")
        if num_labels is not None and model.num_labels != num_labels:
            raise ValueError(f"model: expected num_labels={num_labels}, got num_labels={model.num_labels}")
        if not isinstance(activation_fn, nn.Module | None):
            raise TypeError(f"activation_fn: expected a module or None, got {type(activation_fn).__name__}")
        self.model = model
        self.activation_fn = activation_fn

    def activate(self, logits: Tensor) -> Tensor:
        """Logits after the activation function; those of a single label it gets without that dimension."""
        return logits if self.activation_fn is None else self.activation_fn(logits)

    def score(self, pairs: list[Pair], prompt: str | None, task: str | None) -> Tensor:
        """The logits of pairs, ``[N, num_labels]``."""
        return predict(self.model, tokenize(self.model, pairs, prompt, task))

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {"activation_fn": fullname(self.activation_fn)}


def tokenize(model: Any, pairs: list[Pair], prompt: str | None, task: str | None) -> dict[str, Any]:
    """What the model takes for pairs. Before 5.4 a CrossEncoder had a tokenizer, and neither prompts nor tasks."""
    if hasattr(model, "preprocess"):
        return dict(model.preprocess(pairs, prompt=prompt, task=task))
    for name, value in (("prompt", prompt), ("task", task)):
        if value is not None:
            raise ValueError(f"{name}: expected None with sentence-transformers before 5.4, got {value!r}")
    return dict(model.tokenizer(pairs, padding=True, truncation=True, return_tensors="pt"))


def predict(model: Any, features: dict[str, Any]) -> Tensor:
    """The logits of what was tokenized, ``[N, num_labels]``. The model gets copies: it may write into them."""
    features = {
        name: value.to(model.device, copy=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }
    scores: Tensor = model(features)["scores"] if hasattr(model, "preprocess") else model(**features)[0]
    return scores


def check_columns(inputs: Sequence[Sequence[Any]], least: int, most: int | None, wanted: str) -> None:
    """Columns of texts as they should be, and all of one length."""
    if len(inputs) < least or (most is not None and len(inputs) > most):
        raise ValueError(f"inputs: expected {wanted}, got {len(inputs)} column{'s' * (len(inputs) != 1)}")
    lengths = [len(column) for column in inputs]
    if len(set(lengths)) > 1:
        raise ValueError(f"inputs: expected columns of one length, got lengths {lengths}")


def stack(labels: Labels) -> Tensor:
    """Labels as a tensor: the collator makes a list of tensors of those that are several a row."""
    if isinstance(labels, Tensor):
        return labels
    rows = [torch.as_tensor(row) for row in labels]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"labels: expected as many for every row, got shapes {[tuple(row.shape) for row in rows]}")
    return torch.stack(rows)
