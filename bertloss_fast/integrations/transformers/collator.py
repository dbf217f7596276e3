"""How a DataLoader makes batches of texts with several labels each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ...collate import collate_labels
from ...targets import SparseLabels
from .counting import PADDING


class MultiLabelCollator:
    """Pads texts, and makes one tensor of their lists of labels; workers can pickle it.

    A row of that tensor has the numbers of a text's labels, in order and each once, and then -100: int64 ``[N, K]``,
    with K never L, the number of labels, so that it is not taken for zeros and ones. So it goes through all of
    Trainer, which gathers and counts tensors, and takes 8 bytes a label where zeros and ones would take L.

    Args:
        tokenizer: what pads the texts.
        num_labels: how many labels there are, L.
        sparse: make :class:`SparseLabels` of the labels instead: for loops of one's own, and for
            :class:`FusedLossTrainer`, which then waits for a GPU nowhere.
        padding: ``DataCollatorWithPadding``'s options: ``padding``, ``max_length``, ``pad_to_multiple_of``.

    Lists are under ``labels``; where no text has any, as when a model predicts, the batch has none.

    Raises:
        TypeError, ValueError: for labels outside 0 ... L - 1, and for one twice in a list, by which lists of zeros and
            ones are told. ``[0, 1]`` and ``[1, 0]`` are taken for numbers.

    Example::

        >>> from bertloss_fast.integrations.transformers import MultiLabelCollator
        >>> collate = MultiLabelCollator(tokenizer, num_labels=1000)  # doctest: +SKIP
        >>> collate([{"input_ids": [2, 7, 3], "labels": [3, 999]}, {"input_ids": [2, 3], "labels": []}])["labels"]
        ... # doctest: +SKIP
        tensor([[   3,  999],
                [-100, -100]])
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_labels: int, sparse: bool = False, **padding: Any
    ) -> None:
        self.sparse = sparse
        self._pad = DataCollatorWithPadding(tokenizer, **padding)
        self._collate = collate_labels(num_labels, "labels", self._pad)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if features and not any("labels" in item for item in features):
            return dict(self._pad(features))
        batch: dict[str, Any] = self._collate(features)
        labels = batch["labels"]
        for row, (item, distinct) in enumerate(zip(features, labels.crow_indices.diff().tolist(), strict=True)):
            if len(item["labels"]) != distinct:
                got = f"{len(item['labels'])} in row {row}, of which {distinct} differ"
                raise ValueError(f"labels: expected numbers of labels, each once, got {got}")
        if not self.sparse:
            batch["labels"] = padded(labels)
        return batch


def padded(labels: SparseLabels) -> Tensor:
    """Labels as numbers padded with -100, int64 [N, K] with K > 0, and not the number of labels."""
    counts = labels.crow_indices.diff()
    width = max(int(counts.max()) if len(counts) else 0, 1)
    width += width == labels.num_labels
    place = torch.arange(width, device=labels.device)
    made = torch.full((len(labels), width), PADDING, device=labels.device)
    made[place < counts[:, None]] = labels.col_indices.long()
    return made
