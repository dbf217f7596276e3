"""The demo's training loop, where the loss of bertloss_fast is called. Its end and its schedule follow the clock."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from tqdm import tqdm

from bertloss_fast import (
    AsymmetricLossMultiLabel,
    BCEWithLogitsLoss,
    DistributionBalancedLoss,
    GHMLoss,
    PolyBinaryCrossEntropy,
    SigmoidFocalLoss,
    SparseLabels,
    TwoWayLoss,
    ZlprLoss,
    label_counts,
)
from classifier import TextClassifier

LEARNING_RATE, HEAD_LEARNING_RATE = 5e-4, 5e-3
WARM_UP = 0.05
"""Share of the training in which the learning rate rises; it then falls to 0 in a straight line."""

ELEMENTWISE: dict[str, Callable[..., nn.Module]] = {
    "focal": lambda options, counts, samples, **more: SigmoidFocalLoss(options.alpha, options.gamma, **more),
    "bce": lambda options, counts, samples, **more: BCEWithLogitsLoss(**more),
    "asl": lambda options, counts, samples, **more: AsymmetricLossMultiLabel(**more),
    "poly": lambda options, counts, samples, **more: PolyBinaryCrossEntropy(**more),
    "db": lambda options, counts, samples, **more: DistributionBalancedLoss(counts, samples, **more),
    "ghm": lambda options, counts, samples, **more: GHMLoss(**more),
}
"""Each takes the options, how often each label occurs in training, how many texts that has, and the module's options.

They sum over labels: a mean over 1000 of them would leave the few positives no weight.
"""
OF_ROWS: dict[str, Callable[[], nn.Module]] = {"zlpr": ZlprLoss, "twoway": TwoWayLoss}
LOSSES = (*ELEMENTWISE, *OF_ROWS)


@dataclass
class History:
    """What training did. `losses` holds, for each step, the second and the loss, and `progress` how far training had
    come, from 0 to 1; `seen` marks the texts trained on."""

    seen: np.ndarray
    losses: list[tuple[float, float]] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0
    interrupted: bool = False


Learn = Callable[[np.ndarray, float], Tensor]
"""Leaves the gradients of the texts with these row numbers in the parameters, and returns their loss. The number is the
schedule's factor, for who updates parameters without the optimizer."""
Pace = Callable[[History], float]
"""How far training has come after a step; at 1 it ends."""


def make_loss(options: argparse.Namespace, train_label_counts: Tensor, num_samples: int, **more: Any) -> nn.Module:
    """`more` are options of the module, which only an elementwise loss takes."""
    if options.loss in OF_ROWS:
        return OF_ROWS[options.loss](**more)
    make = ELEMENTWISE[options.loss]
    return make(options, train_label_counts, num_samples, reduction="batchmean", **more)


def sparse_labels(targets: csr_matrix) -> SparseLabels:
    """The targets as the losses take them, on the CPU: a text has about three labels of a thousand."""
    return SparseLabels.from_csr(torch.from_numpy(targets.indptr), torch.from_numpy(targets.indices), targets.shape[1])


def start_head_at_prior(model: TextClassifier, targets: csr_matrix) -> None:
    """Each label starts at its own frequency; from zero, the first steps would only learn that labels are rare."""
    frequency = torch.from_numpy(np.asarray(targets.mean(axis=0), dtype=np.float32).ravel())
    with torch.no_grad():
        model.head.bias.copy_(torch.logit(frequency, eps=1e-6))


def endless_batches(lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Epoch after epoch in random order; within fifty batches' worth, texts of a length go together to save padding."""
    while True:
        order = generator.permutation(len(lengths))
        for start in range(0, len(order), 50 * batch_size):
            pool = order[start : start + 50 * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            for i in generator.permutation(len(batches)):
                yield batches[i]


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C; the second one ends the program as usual."""
    asked = threading.Event()

    def first(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.set()

    previous = signal.signal(signal.SIGINT, first)
    try:
        yield asked
    finally:
        if not asked.is_set():
            signal.signal(signal.SIGINT, previous)


def train(
    model: TextClassifier,
    token_ids: list[Tensor],
    targets: csr_matrix,
    options: argparse.Namespace,
    seconds: float,
) -> History:
    """Trains for `seconds` or `options.epochs`, whichever ends first, and for one batch at least."""
    compute_loss = make_loss(options, label_counts(sparse_labels(targets)), len(token_ids)).to(model.device)

    def loss_of(rows: np.ndarray) -> Tensor:
        labels = sparse_labels(targets[rows]).to(model.device)
        return compute_loss(model([token_ids[row] for row in rows]), labels)

    lengths = np.array([len(ids) for ids in token_ids])
    model.train()
    pace = until(seconds, len(lengths), options.epochs)
    return descend(by_autograd(loss_of), parameter_groups(model), lengths, options, pace)


def parameter_groups(model: TextClassifier) -> list[dict[str, Any]]:
    """The encoder's and the head's."""
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    return [{"params": encoder, "lr": LEARNING_RATE}, {"params": model.head.parameters(), "lr": HEAD_LEARNING_RATE}]


def by_autograd(loss_of: Callable[[np.ndarray], Tensor]) -> Learn:
    def learn(rows: np.ndarray, factor: float) -> Tensor:
        loss = loss_of(rows)
        loss.backward()
        return loss

    return learn


def until(seconds: float, texts: int, epochs: float | None = None, steps: int | None = None) -> Pace:
    """The end is after `seconds`, passes over so many texts, or steps, whichever comes first."""

    def pace(history: History) -> float:
        return max(
            history.seconds / max(seconds, 1e-9),
            history.examples / texts / (epochs or np.inf),
            len(history.losses) / (steps or np.inf),
        )

    return pace


def descend(
    learn: Learn, groups: list[dict[str, Any]], lengths: np.ndarray, options: argparse.Namespace, pace: Pace
) -> History:
    """Takes a step at least; `groups` say what AdamW moves and how fast. The learning rates follow `pace`."""
    optimizer = torch.optim.AdamW(groups, fused=True)  # else it takes temporaries as large as the parameters
    progress = 0.0

    def factor() -> float:
        return min((progress + 0.01) / WARM_UP, (1 - progress) / (1 - WARM_UP), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor())
    history = History(seen=np.zeros(len(lengths), dtype=bool))
    bar_format = "training {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100, mininterval=0.5, bar_format=bar_format)
    start = time.monotonic()
    with stop_request() as asked, bar:
        for rows in endless_batches(lengths, options.batch_size, np.random.default_rng(options.seed)):
            optimizer.zero_grad()  # before forward, in which a fused head makes its gradients
            loss = learn(rows, factor())
            optimizer.step()
            history.seen[rows] = True
            history.examples += len(rows)
            history.seconds = time.monotonic() - start
            history.losses.append((history.seconds, loss.item()))
            progress = min(1.0, pace(history))
            history.progress.append(progress)
            schedule.step()
            recent = np.mean([value for _, value in history.losses[-20:]])
            bar.set_postfix_str(
                f"loss {recent:.3f}, {history.examples / history.seconds:.0f} examples/s", refresh=False
            )
            bar.update(100 * progress - bar.n)
            history.interrupted = asked.is_set()
            if progress >= 1 or history.interrupted:
                break
    return history
