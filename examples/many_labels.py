"""A classifier of very many labels: its heads, and the training of one of them, which is to have a process of its own.

- *unfused*: `nn.Linear` makes the logits `[N, L]`, and a loss of bertloss_fast takes them.
- *fused*: `MultiLabelHead` takes what the linear layer would, and the labels; it never holds the logits.
- *fused step*: that head updates itself by `HeadSGD` in the same pass, and never holds its gradient either.

All begin with the same weights and see the same batches in the same order. No scores `[N, L]` are needed to judge them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from bertloss_fast import HeadSGD, MultiLabelHead, SparseLabels, collate_labels, label_counts
from classifier import TextClassifier
from clinical_codes import Split, labels_by_frequency, load_families, split_families
from evaluation import AT, RANKED, Figures, Ranking, figures_of, precisions, target_matrix, threshold_of
from experiment import (
    CHECKPOINT,
    EVALUATION_SHARE,
    LEAST_TRAINING_SHARE,
    Clock,
    OptionError,
    choose_device,
    describe_machine,
    make_directory,
    new_model,
    texts_of,
)
from training import History, Learn, Pace, by_autograd, descend, make_loss, parameter_groups, sparse_labels, until

HEAD_SGD_RATE = 3.0
"""So much more than AdamW's, which divides each gradient by its own size."""
MATRICES = {"unfused": 4, "fused": 4, "fused step": 1}
"""Of the size of the head's weight, how many there are at the peak: with AdamW its gradient and two means besides."""
FEATURES = 384
"""Of the MiniLM."""
SECONDS_FOR_BASELINES = 10.0
STEPS_MEASURED = 5
CLEAR_REFS = Path("/proc/self/clear_refs")


class Data(NamedTuple):
    """The labels are those seen in training, the commonest first; the head may have more."""

    split: Split
    codes: list[str]
    train: csr_matrix
    validation: csr_matrix
    test: csr_matrix
    num_labels: int

    def held_out(self, texts: int) -> Data:
        """With so many texts to validate and to test."""
        split = self.split._replace(validation=self.split.validation[:texts], test=self.split.test[:texts])
        return self._replace(split=split, validation=self.validation[:texts], test=self.test[:texts])


class Ready(NamedTuple):
    data: Data
    model: TextClassifier
    token_ids: list[Tensor]
    seconds_per_text: float


class Plan(NamedTuple):
    """What the first head's training settles and the others follow, so that only the head sets them apart."""

    precision: torch.dtype
    held_out: int
    progress: list[float]
    """After each step, which gives their number and learning rates."""


class Cost(NamedTuple):
    """`peak_bytes` are beyond what was held before the first step, the weights among it."""

    num_labels: int
    steps: int
    seconds_per_step: float
    peak_bytes: int


class Trained(NamedTuple):
    cost: Cost
    figures: Figures
    history: History
    plan: Plan
    machine: dict[str, Any]


class Measured(NamedTuple):
    cost: Cost
    precision: torch.dtype
    machine: dict[str, Any]


class TooLargeError(OptionError):
    """A head that does not fit in memory."""


def load_data(options: argparse.Namespace, num_labels: int | None) -> Data:
    """For a head of `num_labels`, by default all that the texts have, whether in training or not."""
    split = split_families(load_families(), options.limit)
    every_label = len(labels_by_frequency([*split.train, *split.validation, *split.test]))
    if num_labels is not None and num_labels < every_label:
        raise OptionError(f"{num_labels:,} labels are fewer than the texts have, {every_label:,}")
    codes = labels_by_frequency(split.train)
    return Data(split, codes, *(target_matrix(part, codes) for part in split), num_labels or every_label)


def prepare(head: str, options: argparse.Namespace, num_labels: int | None, precision: torch.dtype | None) -> Ready:
    """Everything before the first step. It is the same work where a precision is given: what the process takes once, at
    its first predictions, is then in no head's peak. The model has a linear layer, which a fused head takes over."""
    end_with_parent()
    data, device = load_data(options, num_labels), choose_device(options.device)
    check_size(head, data.num_labels, options.batch_size, device)
    targets = data.train.copy()
    targets.resize(targets.shape[0], data.num_labels)
    model = new_model(data.codes, targets, options.seed, device)
    token_ids = model.tokenize(texts_of(data.split.train))
    model.choose_precision(token_ids[:64])
    model.autocast_dtype = precision or model.autocast_dtype
    start = time.perf_counter()
    rank(fused(model.head), model.embed_all(token_ids[:256]))
    return Ready(data, model, token_ids, (time.perf_counter() - start) / len(token_ids[:256]))


def end_with_parent() -> None:
    """What ends the script without Ctrl-C, as `kill` does, would else leave this process to train on."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if (parent := parent_process()) is not None:
        threading.Thread(target=wait, args=(parent,), daemon=True).start()


def check_size(head: str, num_labels: int, batch_size: int, device: torch.device) -> None:
    logits = 2 * batch_size if head == "unfused" else 0
    needed, free = 4 * num_labels * (MATRICES[head] * FEATURES + logits), free_bytes(device)
    if needed > free:
        sizes = f"about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        raise TooLargeError(f"{num_labels:,} labels: the {head} head needs {sizes}")


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", meminfo.read_text())[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget_peak(device: torch.device) -> int:
    """What is held now; where the system can set the peak back to it, as Linux can, nothing earlier hides a new one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """On a GPU the allocator's, on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fused(head: nn.Linear | MultiLabelHead, loss: nn.Module | None = None) -> MultiLabelHead:
    """The head with the weights of a linear layer, in the same memory."""
    if isinstance(head, MultiLabelHead):
        return head
    made = MultiLabelHead(head.in_features, head.out_features, loss, device="meta")
    made.load_state_dict(head.state_dict(), assign=True)
    return made


Batch = tuple[list[Tensor], SparseLabels]


def learn_by(head: str, model: TextClassifier, loss: nn.Module, batch_of: Callable[[np.ndarray], Batch]) -> Learn:
    """A step with this head; a fused one takes the place of the model's linear layer."""
    if head != "unfused":
        model.head = fused(model.head, loss)

    def unfused_loss(rows: np.ndarray) -> Tensor:
        texts, labels = batch_of(rows)
        return loss(model(texts), labels)

    def fused_loss(rows: np.ndarray) -> Tensor:
        texts, labels = batch_of(rows)
        return model.head(model.embed(texts), labels)

    optimizer = HeadSGD(HEAD_SGD_RATE)

    def fused_step(rows: np.ndarray, factor: float) -> Tensor:
        texts, labels = batch_of(rows)
        hidden = model.embed(texts)
        optimizer.lr = factor * HEAD_SGD_RATE
        value, grad_hidden = model.head.fused_step(hidden, labels, optimizer)
        hidden.backward(grad_hidden)
        return value

    return {"unfused": by_autograd(unfused_loss), "fused": by_autograd(fused_loss), "fused step": fused_step}[head]


def train(head: str, ready: Ready, options: argparse.Namespace, pace: Pace) -> tuple[History, Cost]:
    data, model, token_ids, _ = ready
    texts = list(zip(token_ids, np.split(data.train.indices, data.train.indptr[1:-1]), strict=True))
    collate = collate_labels(data.num_labels, collate=list)

    def batch_of(rows: np.ndarray) -> Batch:
        ids, labels = collate([texts[row] for row in rows])
        return ids, labels.to(model.device)

    loss = make_loss(options, label_counts(sparse_labels(data.train)), len(texts)).to(model.device)
    learn = learn_by(head, model, loss, batch_of)
    of_encoder, of_head = parameter_groups(model)
    groups = [of_encoder] if head == "fused step" else [of_encoder, of_head]
    model.train()
    before = forget_peak(model.device)
    history = descend(learn, groups, np.array([len(ids) for ids in token_ids]), options, pace)
    peak = peak_bytes(model.device) - before
    seconds = np.diff([second for second, _ in history.losses], prepend=0)
    return history, Cost(data.num_labels, len(seconds), float(np.median(seconds)), peak)


def measure(head: str, options: argparse.Namespace, num_labels: int | None, precision: torch.dtype | None) -> Measured:
    """What a few steps cost."""
    ready = prepare(head, options, num_labels, precision)
    _, cost = train(head, ready, options, until(math.inf, len(ready.token_ids), steps=STEPS_MEASURED))
    return Measured(cost, ready.model.autocast_dtype, describe_machine(ready.model))


def run(head: str, options: argparse.Namespace, clock: Clock, heads: int, plan: Plan | None) -> Trained:
    """Trains and judges one of so many heads, and leaves a checkpoint; the first one is to have no plan."""
    ready = prepare(head, options, options.labels_pad, plan.precision if plan else None)
    data, model = ready.data, ready.model
    if plan is None:
        seconds, texts = time_to_train(ready, clock, heads)
        plan, pace = Plan(model.autocast_dtype, texts, []), until(seconds, len(ready.token_ids), steps=options.steps)
    else:
        pace = follow(plan.progress)
    precision = str(model.autocast_dtype).removeprefix("torch.")
    print(f"The {head} head of {data.num_labels:,} labels on {model.device}, the encoder in {precision}.", flush=True)
    history, cost = train(head, ready, options, pace)
    figures = judge(model, data.held_out(plan.held_out))
    model.threshold = figures.threshold
    make_directory(options.runs / "xmc")
    model.save(options.runs / "xmc" / CHECKPOINT)
    return Trained(cost, figures, history, plan._replace(progress=history.progress), describe_machine(model))


def follow(progress: list[float]) -> Pace:
    return lambda history: progress[len(history.losses) - 1]


def time_to_train(ready: Ready, clock: Clock, heads: int) -> tuple[float, int]:
    """The seconds for each head, which are equal shares of what set-ups, evaluations and baselines leave; and how many
    texts to validate, and as many to test, are affordable. Another set-up takes as long as all has taken so far."""
    affordable = int(EVALUATION_SHARE * clock.remaining() / ready.seconds_per_text / 2 / heads)
    texts = min(len(ready.data.split.test), max(100, affordable))
    reserve = heads * 2.4 * texts * ready.seconds_per_text + (heads - 1) * clock.elapsed() + SECONDS_FOR_BASELINES
    return max(clock.remaining() - reserve, LEAST_TRAINING_SHARE * clock.remaining()) / heads, texts


def judge(model: TextClassifier, data: Data) -> Figures:
    head = fused(model.head)
    validation, test = (model.embed_all(model.tokenize(texts_of(part))) for part in data.split[1:])
    threshold = threshold_of(data.validation, rank(head, validation))
    labels = head.predict(test, threshold).labels.cpu()
    parts = np.ones(labels.nnz, dtype=int), labels.col_indices.numpy(), labels.crow_indices.numpy()
    predicted = csr_matrix(parts, labels.shape)[:, : len(data.codes)]
    likeliest = head.topk(test, AT[-1]).labels.cpu().numpy()
    return figures_of(data.test, predicted, precisions(data.test, likeliest), threshold)


def rank(head: MultiLabelHead, hidden: Tensor) -> Ranking:
    best = head.topk(hidden, RANKED)
    return Ranking(best.labels.cpu().numpy(), best.scores.cpu().numpy())
