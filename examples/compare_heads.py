"""Heads of very many labels beside each other: what they reach, what a step costs, and a picture of that by labels."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix

from evaluation import (
    AT,
    FREQUENCY,
    NEIGHBOUR,
    Figures,
    frequency_ranking,
    judge_rankings,
    nearest,
    neighbour_ranking,
    table,
)
from experiment import WIDTH, Clock, OptionError, describe_options, describe_training, make_directory, texts_of
from many_labels import Cost, Data, Measured, TooLargeError, Trained, load_data, measure, run
from training import stop_request


def heads_of(options: argparse.Namespace) -> list[str]:
    """The unfused one first: it is the slowest, so that the others, which take as many steps, end in time."""
    return ["unfused", "fused", *["fused step"] * options.fused_step]


def in_own_process(asked: threading.Event, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or None where it does not fit in memory; `asked` is set once Ctrl-C was pressed."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except TooLargeError as error:
        print(f"Skipped: {error}.")
    except BrokenProcessPool:
        if asked.is_set():
            raise KeyboardInterrupt from None
        print("Skipped: its process ended without an answer, for want of memory if no error stands above.")
    return None


def compare(options: argparse.Namespace, started: float) -> None:
    clock = Clock(started, options.minutes)
    make_directory(options.runs)
    trained = train_all(options, clock)
    first = next(iter(trained.values()))
    data = load_data(options, options.labels_pad).held_out(first.plan.held_out)
    figures = {f"MiniLM, {head}": one.figures for head, one in trained.items()}
    figures |= baselines(data, first.history.seen)
    costs = [(head, one.cost) for head, one in trained.items()]
    print(f"\nOn {data.test.shape[0]:,} test texts:\n\n{table(figures)}\n\n{notes(data)}\n\n{cost_table(costs)}")
    if {"unfused", "fused"} <= trained.keys():
        print(agreement(trained))
    report = make_report(options, data, trained, figures) | {"seconds": round(clock.elapsed(), 1)}
    write(options.runs / "xmc.json", report)
    print(f"\n{clock.elapsed():.0f} s in all. In {options.runs}/: xmc.json, xmc/checkpoint.pt.")


def train_all(options: argparse.Namespace, clock: Clock) -> dict[str, Trained]:
    heads, plan = heads_of(options), None
    trained: dict[str, Trained] = {}
    print("Ctrl-C stops early and keeps what was trained.", flush=True)
    with stop_request() as asked:
        try:
            for head in heads:
                if one := in_own_process(asked, run, head, options, clock, len(heads), plan):
                    trained[head], plan = one, one.plan
                if asked.is_set():
                    print("Stopped; what was trained is now reported. Ctrl-C again ends without that.")
                    break
        except KeyboardInterrupt:
            if not trained:
                raise
    if not trained:
        raise OptionError("no head was trained: see above")
    return trained


def baselines(data: Data, seen: np.ndarray) -> dict[str, Figures]:
    """Where the models saw only some of the training texts, the neighbour among these has a row of its own."""
    held_out = texts_of(data.split.validation + data.split.test)

    def neighbour(rows: np.ndarray) -> Figures:
        found = rows[nearest(texts_of([data.split.train[row] for row in rows]), held_out)]
        parts = np.split(found, [data.validation.shape[0]])
        return judge_rankings(data.validation, data.test, *(neighbour_ranking(data.train, part) for part in parts))

    figures = {NEIGHBOUR: neighbour(np.arange(len(seen)))}
    if not seen.all():
        figures[f"{NEIGHBOUR}, same texts"] = neighbour(np.flatnonzero(seen))
    frequency = (frequency_ranking(data.train, part.shape[0]) for part in (data.validation, data.test))
    return figures | {FREQUENCY: judge_rankings(data.validation, data.test, *frequency)}


def make_report(
    options: argparse.Namespace, data: Data, trained: dict[str, Trained], figures: dict[str, Figures]
) -> dict[str, Any]:
    sizes = {"labels": data.num_labels, "labels_in_training": len(data.codes)}
    return {
        "options": describe_options(options),
        "machine": next(iter(trained.values())).machine,
        "data": sizes | {name: len(families) for name, families in data.split._asdict().items()},
        "heads": {head: describe_training(one.history) | one.cost._asdict() for head, one in trained.items()},
        "figures": {name: asdict(of_name) for name, of_name in figures.items()},
    }


def notes(data: Data) -> str:
    return fill(
        f"The most that any classifier could reach: {ceiling(data.test)}. Of the head's {data.num_labels:,} labels, "
        f"the {len(data.codes):,} that occur in training are judged; macro-F1 is over those with a positive in the "
        "test split, and head, middle and tail are thirds of them by frequency in training.",
        WIDTH,
    )


def ceiling(truth: csr_matrix) -> str:
    labels_of_a_text = np.asarray(truth.sum(axis=1))
    return ", ".join(f"P@{k} {np.minimum(labels_of_a_text, k).mean() / k:.3f}" for k in AT)


def agreement(trained: dict[str, Trained]) -> str:
    unfused, fused = ([loss for _, loss in trained[head].history.losses] for head in ("unfused", "fused"))
    ratios = np.array([one / other for one, other in zip(unfused, fused, strict=False)])
    return f"\nOver {len(ratios):,} steps the losses of unfused and fused agree to {abs(ratios - 1).max():.1e}."


def cost_table(costs: list[tuple[str, Cost]]) -> str:
    lines = [f"{'head':<12}{'labels':>10}{'steps':>8}{'ms a step':>12}{'peak MiB':>10}"]
    for head, cost in costs:
        step, peak = 1e3 * cost.seconds_per_step, cost.peak_bytes / 2**20
        lines.append(f"{head:<12}{cost.num_labels:>10,}{cost.steps:>8,}{step:>12.1f}{peak:>10,.0f}")
    return "\n".join(lines)


def sweep(options: argparse.Namespace) -> None:
    """What steps cost with each head and number of labels; those that do not fit are left out."""
    make_directory(options.runs)
    measured: list[tuple[str, Measured]] = []
    with stop_request() as asked:
        for labels, head in product(options.sweep, heads_of(options)):
            precision = measured[0][1].precision if measured else None
            one = in_own_process(asked, measure, head, options, labels, precision)
            if asked.is_set():
                break
            if one:
                measured.append((head, one))
                print(cost_table([(head, one.cost)]), flush=True)
    if not measured:
        raise OptionError("--sweep: nothing was measured: see above")
    costs = [(head, one.cost) for head, one in measured]
    machine = measured[0][1].machine
    report = {"options": describe_options(options), "machine": machine}
    write(options.runs / "xmc-sweep.json", report | {"rows": [{"head": head} | cost._asdict() for head, cost in costs]})
    title = f"{options.batch_size} texts a step, {machine['device']}, {machine['threads']} threads"
    draw(options.runs / "xmc-sweep.png", costs, title)
    print(f"\n{cost_table(costs)}\n\nIn {options.runs}/: xmc-sweep.json, xmc-sweep.png.")


def draw(path: Path, costs: list[tuple[str, Cost]], title: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=130)
    memory, time = figure.subplots(1, 2)
    for head in dict.fromkeys(head for head, _ in costs):
        points = sorted(cost for of_head, cost in costs if of_head == head)
        labels = [cost.num_labels for cost in points]
        memory.plot(labels, [cost.peak_bytes / 2**30 for cost in points], "o-", label=head)
        time.plot(labels, [cost.seconds_per_step for cost in points], "o-", label=head)
    memory.set(title="Peak memory beyond the weights", ylabel="GiB")
    time.set(title="Time of a step", ylabel="seconds")
    for axes in (memory, time):
        axes.set(xlabel="labels", xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path)


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
