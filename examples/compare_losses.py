"""Trains the demo's classifier on the same texts with several losses and seeds, and draws how good each is.

    python examples/compare_losses.py                                  an epoch for each of fifteen trainings
    python examples/compare_losses.py --losses bce ghm --seeds 5       others

Every training is judged on the whole test split. Each is written to --out (docs/losses.json) when it ends; the same
command, started again, goes on from there. The picture lies beside it, and the table is printed in Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import records
import train_multilabel as demo

DEFAULT_LOSSES = ("bce", "focal", "asl", "db", "zlpr")
COLUMNS = {"micro_f1": "micro-F1", "macro_f1": "macro-F1"}
COLUMNS |= {f"macro_f1_{third}": third for third in ("head", "middle", "tail")}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compares losses on the demo's data: one training per loss and seed.")
    add = parser.add_argument
    shown = f"some of {', '.join(demo.LOSSES)} (default {' '.join(DEFAULT_LOSSES)})"
    add("--losses", nargs="+", choices=demo.LOSSES, default=DEFAULT_LOSSES, metavar="NAME", help=shown)
    add("--seeds", type=demo.count, default=3, help="trainings of each loss, with seeds from 0 (default %(default)s)")
    add("--epochs", type=demo.positive, default=1.0, help="of each training (default %(default)g)")
    add("--labels", type=demo.count, help="how many labels, the commonest first (default 1000)")
    add("--limit", type=demo.limit, help="use only so many of the 36,227 families of codes (default: all)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add("--out", type=Path, default=Path("docs/losses.json"), metavar="FILE.json", help="default %(default)s")
    return parser


def load_record(options: argparse.Namespace) -> dict[str, Any]:
    return records.load(options.out, {"epochs": options.epochs, "labels": options.labels, "limit": options.limit})


def train_all(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Seed by seed, so that what an interrupt leaves has about as many seeds of each loss."""
    import experiment
    from evaluation import Targets, judge, target_matrix
    from training import train

    device = experiment.choose_device(options.device)
    split = experiment.split_families(experiment.load_families(), options.limit)
    codes = experiment.choose_labels(split.train, options.labels)
    train_targets = target_matrix(split.train, codes)
    targets = Targets(train_targets, *(target_matrix(part, codes).toarray() for part in split[1:]))
    model = experiment.new_model(codes, train_targets, 0, device)
    train_ids = model.tokenize(experiment.texts_of(split.train))
    held_out_ids = model.tokenize(experiment.texts_of(split.validation + split.test))
    model.choose_precision(train_ids[:64])
    precision = model.autocast_dtype
    record["machine"] = experiment.describe_machine(model)
    done = {(run["seed"], run["loss"]) for run in record["runs"]}
    for seed, loss in [pair for pair in product(range(options.seeds), options.losses) if pair not in done]:
        model = experiment.new_model(codes, train_targets, seed, device)
        model.autocast_dtype = precision
        run_options = demo.parse_options(demo.make_parser(), ["--loss", loss, "--seed", str(seed)])
        run_options.epochs = options.epochs
        history = train(model, train_ids, train_targets, run_options, seconds=math.inf)
        if history.interrupted:
            print("Stopped; the finished trainings are kept.")
            return
        figures = asdict(judge(loss, targets, model.predict(held_out_ids)).figures)
        run = {"loss": loss, "seed": seed, "seconds": round(history.seconds, 1), "examples": history.examples}
        record["runs"].append(run | {"figures": figures})
        records.save(options.out, record)
        print(f"{loss}, seed {seed}: {history.examples:,} examples, micro-F1 {figures['micro_f1']:.3f}", flush=True)


def spreads(options: argparse.Namespace, record: dict[str, Any]) -> dict[str, np.ndarray]:
    return records.spreads(record["runs"], "loss", options.losses, options.seeds, tuple(COLUMNS))


def table(found: dict[str, np.ndarray]) -> str:
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for loss, columns in found.items():
        cells = map(records.shown, columns.T)
        lines.append(f"| {demo.LOSSES[loss]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, np.ndarray], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 1.5 * len(found), 4.5), layout="constrained", dpi=130)
    axes = figure.subplots()
    for column, third in list(enumerate(COLUMNS.values()))[2:]:
        mean, low, high = np.array([columns[:, column] for columns in found.values()]).T
        where = np.arange(len(found)) + 0.27 * (column - 3)
        axes.errorbar(where, mean, (mean - low, high - mean), fmt="o", capsize=4, label=third)
    axes.set_xticks(range(len(found)), [demo.LOSSES[loss].replace(" ", "\n") for loss in found])
    axes.set(title=title, ylabel="macro-F1 on the test split")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper", title="thirds of the labels")
    figure.savefig(path)


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    options.losses = list(dict.fromkeys(options.losses))

    def work() -> None:
        record = load_record(options)
        train_all(options, record)
        if found := spreads(options, record):
            picture = options.out.with_suffix(".png")
            title = f"Epochs of training: {options.epochs:g}. Mean, lowest and highest of {options.seeds} seeds"
            draw(picture, found, title)
            print(f"\n{table(found)}\n\nWritten to {options.out} and {picture}.")

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
