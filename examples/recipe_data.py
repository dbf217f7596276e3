"""The demo's texts as Trainer takes them: tokens and labels, the order in which they are drawn, and folds of them.

A text of several labels is rare if its rarest label is. Over-sampling draws a text with a probability in proportion to
one over how often that label occurs: all labels that are the rarest of some text are drawn alike, common texts
seldom, rare ones several times. Under-sampling leaves a text whose rarest label occurs n times out of an epoch, with
the probability 1 - m / n, if that is more often than the median label, m times: nothing is drawn twice, and the next
epoch leaves out others. Gupta et al., "LVIS", 2019 (arXiv:1908.03195), repeat an image by its rarest category too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy.sparse import csr_matrix
from sklearn.model_selection import KFold
from torch.utils.data import Dataset, RandomSampler, Sampler, WeightedRandomSampler

from classifier import MAX_TOKENS, pretrained_directory
from clinical_codes import Split, load_families, split_families
from evaluation import Targets, target_matrix
from experiment import choose_labels, texts_of

POOL = 50
"""Batches, among whose texts those of a length go together."""


class Texts(Dataset[dict[str, list[int]]]):
    """What `MultiLabelCollator` makes a batch of."""

    def __init__(self, token_ids: Sequence[list[int]], targets: csr_matrix) -> None:
        self.token_ids, self.targets = token_ids, targets

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        of_row = slice(*self.targets.indptr[row : row + 2])
        return {"input_ids": self.token_ids[row], "labels": self.targets.indices[of_row].tolist()}

    def __getitems__(self, rows: list[int]) -> list[dict[str, list[int]]]:
        return [self[row] for row in rows]

    def select(self, rows: np.ndarray) -> Texts:
        return Texts([self.token_ids[row] for row in rows], self.targets[rows])

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.token_ids])


class Data(NamedTuple):
    split: Split
    codes: list[str]
    """The labels, the commonest first."""
    targets: Targets
    tokenizer: Any
    train: Texts
    validation: Texts

    @property
    def held_out(self) -> list[str]:
        """The texts that `evaluation.judge` wants scores of."""
        return texts_of(self.split.validation + self.split.test)


def load_data(options: argparse.Namespace) -> Data:
    split = split_families(load_families(), options.limit)
    codes = choose_labels(split.train, options.labels)
    train, *held_out = (target_matrix(part, codes) for part in split)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained_directory(), local_files_only=True)

    def texts(part: int, targets: csr_matrix) -> Texts:
        encoded = tokenizer(texts_of(split[part]), truncation=True, max_length=MAX_TOKENS)
        return Texts(encoded["input_ids"], targets)

    targets = Targets(train, *(part.toarray() for part in held_out))
    return Data(split, codes, targets, tokenizer, texts(0, train), texts(1, held_out[0]))


def folds(texts: int, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows held out. Of random folds the rarest label of a thousand has some texts in each."""
    yield from KFold(count, shuffle=True, random_state=seed % 2**32).split(np.arange(texts))


def counts_of_rarest(targets: csr_matrix) -> np.ndarray:
    """How often the rarest label of each text occurs, `[N]`; a text without labels counts as one of the commonest."""
    counts = np.asarray(targets.sum(axis=0)).ravel()
    rarity = csr_matrix((1 / counts[targets.indices], targets.indices, targets.indptr), targets.shape)
    return 1 / np.maximum(rarity.max(axis=1).toarray().ravel(), 1 / counts.max())


def make_sampler(kind: str | None, texts: Texts, batch_size: int, seed: int) -> Sampler[int]:
    """Over- or under-sampling, or neither. Its order is the same on every process of a distributed training."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Sampler[int]
    if kind == "over":
        weights = 1 / counts_of_rarest(texts.targets)
        drawn = WeightedRandomSampler(weights.tolist(), len(texts), generator=generator)
    elif kind == "under":
        median = np.median(np.asarray(texts.targets.sum(axis=0)))
        drawn = Undersampler(np.minimum(1, median / counts_of_rarest(texts.targets)), generator)
    else:
        drawn = RandomSampler(texts, generator=generator)
    return ByLength(drawn, texts.lengths, batch_size, generator)


class Undersampler(Sampler[int]):
    """Each row is in an epoch with the probability given, and every epoch has as many rows.

    Systematic sampling: along the sum of the probabilities in random order, a row at every whole step from a random
    start (Madow, 1949).
    """

    def __init__(self, chances: np.ndarray, generator: torch.Generator) -> None:
        self._size = max(1, int(chances.sum()))
        self.chances = torch.from_numpy(chances * (self._size / chances.sum()))
        self.generator = generator

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.chances), generator=self.generator)
        reached = self.chances[order].cumsum(0)
        steps = torch.arange(self._size) + torch.rand(1, generator=self.generator, dtype=torch.float64)
        chosen = torch.searchsorted(reached, steps).clamp_max(len(order) - 1)
        yield from order[chosen[torch.randperm(self._size, generator=self.generator)]].tolist()


class ByLength(Sampler[int]):
    """The rows that another sampler draws, those of a length in one batch, to save padding; batches in random order."""

    def __init__(self, drawn: Sampler[int], lengths: np.ndarray, batch_size: int, generator: torch.Generator) -> None:
        self.drawn, self.lengths, self.batch_size = drawn, lengths, batch_size
        self.generator = generator  # accelerate looks for it, and shares its state among processes

    def __len__(self) -> int:
        return len(self.drawn)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        rows = np.fromiter(self.drawn, dtype=np.int64)
        for start in range(0, len(rows), POOL * self.batch_size):
            pool = rows[start : start + POOL * self.batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            whole = len(pool) - len(pool) % self.batch_size
            batches = pool[:whole].reshape(-1, self.batch_size)
            yield from batches[torch.randperm(len(batches), generator=self.generator).numpy()].ravel().tolist()
            yield from pool[whole:].tolist()  # last, or the batches after it would begin within another
