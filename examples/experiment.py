"""The demo from beginning to end: data, baselines, training, evaluation, files. All of it within the minutes given."""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import time
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from classifier import TextClassifier
from clinical_codes import Family, Split, describe, labels_by_frequency, load_families, split_families
from evaluation import (
    FREQUENCY,
    NEIGHBOUR,
    Row,
    Targets,
    draw,
    frequency_scores,
    judge,
    neighbour_scores,
    precision_at,
    table,
    target_matrix,
)
from training import History, start_head_at_prior, train

CHECKPOINT = "checkpoint.pt"
COMMONEST_LABELS = 1000
EVALUATION_SHARE = 0.2
"""Of the time that is left, at most, for predicting held-out texts: a slow machine judges fewer of them."""
SECONDS_FOR_THE_REPORT = 2.0
LEAST_TRAINING_SHARE = 0.6
"""Of the time that is left, whatever the rest was measured to need: a machine busy just then would leave none."""
TEXTS_SHOWN = 3
LABELS_SHOWN = 3
"""Of a text with --text, however unlikely."""
WIDTH = 110


class OptionError(ValueError):
    """An option whose fault shows only beside the data or the machine."""


class Clock:
    """Counts from the start of the script."""

    def __init__(self, started: float, minutes: float) -> None:
        self.started, self.seconds = started, 60 * minutes

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def remaining(self) -> float:
        return self.seconds - self.elapsed()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]})") from None
    return probe.device


def choose_labels(train_families: list[Family], wanted: int | None) -> list[str]:
    labels = labels_by_frequency(train_families)
    if wanted is not None and wanted > len(labels):
        raise OptionError(
            f"--labels {wanted}: the {len(train_families):,} training texts have only {len(labels):,} labels"
        )
    return labels[: wanted or COMMONEST_LABELS]


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--runs {path}: cannot be made a directory ({error.strerror})") from None


def run(options: argparse.Namespace, started: float) -> None:
    clock = Clock(started, options.minutes)
    device = choose_device(options.device)
    make_directory(options.runs)
    split = split_families(load_families(), options.limit)
    codes = choose_labels(split.train, options.labels)
    print(data_sentence(split, codes))

    train_targets = target_matrix(split.train, codes)
    model = new_model(codes, train_targets, options.seed, device)
    train_ids = model.tokenize(texts_of(split.train))
    model.choose_precision(train_ids[:64])
    seconds_per_text = model.seconds_per_text(train_ids[:256])
    affordable = max(100, int(EVALUATION_SHARE * clock.remaining() / seconds_per_text / 2))
    split = split._replace(validation=split.validation[:affordable], test=split.test[:affordable])
    held_out = texts_of(split.validation + split.test)
    targets = Targets(train_targets, *(target_matrix(part, codes).toarray() for part in split[1:]))

    before = clock.elapsed()
    frequency = judge(FREQUENCY, targets, frequency_scores(train_targets, len(held_out)))
    neighbour = neighbour_row("", split.train, targets, held_out)
    baseline_seconds = clock.elapsed() - before

    reserve = 1.2 * len(held_out) * seconds_per_text + baseline_seconds + SECONDS_FOR_THE_REPORT
    training_seconds = max(clock.remaining() - reserve, LEAST_TRAINING_SHARE * clock.remaining())
    precision = str(model.autocast_dtype).removeprefix("torch.")
    print(f"Training on {device} in {precision}; Ctrl-C stops early and keeps the model.")
    history = train(model, train_ids, train_targets, options, training_seconds)
    if history.interrupted:
        print("Stopped; what was trained is now evaluated and saved. Ctrl-C again ends without that.")

    ours = judge("MiniLM", targets, model.predict(model.tokenize(held_out)))
    model.threshold = ours.figures.threshold
    model.save(options.runs / CHECKPOINT)
    rows = [ours, neighbour, frequency]
    if not history.seen.all():
        seen = np.flatnonzero(history.seen)
        seen_targets = targets._replace(train=train_targets[seen])
        rows.insert(2, neighbour_row(", same texts", [split.train[i] for i in seen], seen_targets, held_out))
    print(summary(rows, targets, history))
    draw(options.runs / "training.png", history.losses, targets.test, rows)
    show_texts(model, split.test[:TEXTS_SHOWN])
    report = make_report(options, model, split, targets, history, rows) | {"seconds": round(clock.elapsed(), 1)}
    (options.runs / "figures.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{clock.elapsed():.0f} s in all. In {options.runs}/: {CHECKPOINT}, training.png, figures.json.")


def new_model(codes: list[str], train_targets: csr_matrix, seed: int, device: torch.device) -> TextClassifier:
    """Where `train_targets` have more columns than there are codes, these are labels that no text has."""
    torch.manual_seed(seed)
    unused = [f"unused {column}" for column in range(len(codes), train_targets.shape[1])]
    model = TextClassifier(codes + unused, [describe(code) for code in codes] + unused)
    start_head_at_prior(model, train_targets)
    return model.to(device)


def texts_of(families: list[Family]) -> list[str]:
    return [family.text for family in families]


def neighbour_row(suffix: str, train_families: list[Family], targets: Targets, held_out: list[str]) -> Row:
    return judge(NEIGHBOUR + suffix, targets, neighbour_scores(texts_of(train_families), targets.train, held_out))


def data_sentence(split: Split, codes: list[str]) -> str:
    return fill(
        "Data: the descriptions of clinical codes (ICD-10-CM), one for each family of codes that differ only in the "
        f"7th character, to be labelled with the codes above them, the {len(codes):,} commonest. {len(split.train):,} "
        f"texts to train, {len(split.validation):,} to validate, {len(split.test):,} to test. The descriptions are "
        "written to templates, so that copying the labels of the most similar text is a strong baseline.",
        WIDTH,
    )


def summary(rows: list[Row], targets: Targets, history: History) -> str:
    labels_judged = int(targets.test.any(axis=0).sum())
    ceiling = ", ".join(f"P@{k} {precision_at(k, targets.test, targets.test):.3f}" for k in (1, 3, 5))
    best = max(rows, key=lambda row: row.figures.micro_f1)
    gain = rows[0].figures.micro_f1 - rows[-1].figures.micro_f1
    notes = (
        f"Best micro-F1: {best.name}. {rows[0].name} against label frequency: {gain:+.3f}. The most that any "
        f"classifier could reach: {ceiling}. Macro-F1 is over the {labels_judged:,} labels with a positive in the test "
        "split; head, middle and tail are thirds of all labels by frequency in training."
    )
    heading = f"On {len(targets.test):,} test texts, after {history.examples:,} examples in {history.seconds:.0f} s:"
    return f"\n{heading}\n\n{table({row.name: row.figures for row in rows})}\n\n{fill(notes, WIDTH)}"


def show_texts(model: TextClassifier, families: list[Family]) -> None:
    for family, answer in zip(families, model.label(texts_of(families), at_least=1), strict=True):
        print(f"\nTest text: {family.text}")
        for code, description, probability in answer:
            print(f"  {probability:4.0%}  {'right' if code in family.labels else 'wrong'}   {code:<8} {description}")
        for code in sorted(family.labels.intersection(model.codes) - {code for code, *_ in answer}):
            print(f"        missed  {code:<8} {describe(code)}")


def make_report(
    options: argparse.Namespace,
    model: TextClassifier,
    split: Split,
    targets: Targets,
    history: History,
    rows: list[Row],
) -> dict[str, Any]:
    return {
        "options": describe_options(options),
        "machine": describe_machine(model),
        "data": {
            "labels": len(model.codes),
            "train": len(split.train),
            "validation": len(split.validation),
            "test": len(split.test),
            "labels_with_test_positives": int(targets.test.any(axis=0).sum()),
        },
        "training": describe_training(history),
        "figures": {row.name: asdict(row.figures) for row in rows},
    }


def describe_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def describe_training(history: History) -> dict[str, Any]:
    return {
        "seconds": round(history.seconds, 1),
        "steps": len(history.losses),
        "examples": history.examples,
        "texts_seen": int(history.seen.sum()),
        "examples_per_second": round(history.examples / history.seconds, 1),
        "last_loss": history.losses[-1][1],
        "interrupted": history.interrupted,
    }


def describe_machine(model: TextClassifier) -> dict[str, Any]:
    return machine_of(model.device, model.autocast_dtype)


def machine_of(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": str(precision),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def label_text(options: argparse.Namespace) -> None:
    path = options.runs / CHECKPOINT
    try:
        model = TextClassifier.load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
        raise OptionError(f"--text: {path} is no checkpoint of this demo; train one and it is replaced") from None
    model.to(choose_device(options.device))
    print_labels(model.label([options.text], at_least=LABELS_SHOWN)[0], model.threshold)


def print_labels(labels: list[tuple[str, str, float]], threshold: float) -> None:
    for code, description, probability in labels:
        doubt = "" if probability >= threshold else "  (below the threshold)"
        print(f"{probability:4.0%}  {code:<8} {description}{doubt}")
