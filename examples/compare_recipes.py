"""Measures what each flag of `finetune_bert.py` changes: a training for each and seed, all of the same time.

    python examples/compare_recipes.py                            half an hour: seventeen recipes, three seeds
    python examples/compare_recipes.py --recipes baseline FGM     some of them
    python examples/compare_recipes.py --seconds 6 --limit 3000 --out runs/recipes.json    a try

Each training is written to --out (docs/recipes.json) when it ends; the same command, started again, goes on from there.
The picture lies beside it, and the table too, in the .md file if that is there, between its marks.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import finetune_bert
import records
import train_multilabel as demo

BASELINE = "baseline"
FIRST_SEED = 1
"""Learning rate and epsilon were chosen by the figures of seed 0, which would flatter them."""
TEACHER_LAYERS, TEACHER_TIME = 4, 3
"""The teacher has twice the layers, and was trained three times as long, outside of its pupils' time."""
RECIPES = {
    BASELINE: [],
    "pos_weight": ["--class-weights", "positives"],
    "class-balanced weights": ["--class-weights", "balanced"],
    "focal loss": ["--loss", "focal"],
    "asymmetric loss": ["--loss", "asl"],
    "GHM": ["--loss", "ghm"],
    "over-sampling": ["--sampler", "over"],
    "under-sampling": ["--sampler", "under"],
    "FGM": ["--adversarial", "fgm"],
    "PGD": ["--adversarial", "pgd"],
    "self-distillation": ["--distill", "self"],
    "distillation": ["--distill", "TEACHER"],
    "R-Drop": ["--r-drop", "1"],
    "weight decay": ["--weight-decay", "0.1"],
    "label smoothing": ["--label-smoothing", "0.01"],
    "early stopping": ["--early-stopping", "2"],
    "three folds": ["--folds", "3"],
}
COLUMNS = {"macro_f1_tail": "macro-F1, tail", "macro_f1": "macro-F1", "micro_f1": "micro-F1"}
MARKED = re.compile(r"(?<=<!-- written by make recipes -->\n).*?(?=<!-- end -->)", re.DOTALL)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measures what each flag of finetune_bert.py changes.")
    add = parser.add_argument
    shown = f"some of: {', '.join(RECIPES)} (default: all)"
    add("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help=shown)
    add("--seeds", type=demo.count, default=3, help="trainings of each, with seeds from 1 (default %(default)s)")
    add("--seconds", type=demo.positive, default=30.0, help="of each training (default %(default)g)")
    add("--labels", type=demo.count, help="how many labels, the commonest first (default 1000)")
    add("--limit", type=demo.limit, help="use only so many of the 36,227 families of codes (default: all)")
    add("--device", default="auto", help="cpu or cuda (default: the GPU if there is one)")
    add(
        "--runs",
        type=Path,
        default=Path("runs/recipes"),
        metavar="DIRECTORY",
        help="the teacher's (default %(default)s)",
    )
    add("--out", type=Path, default=Path("docs/recipes.json"), metavar="FILE.json", help="default %(default)s")
    return parser


def load_record(options: argparse.Namespace) -> dict[str, Any]:
    baseline = options_of(options, [])
    shared = ("seconds", "labels", "limit", "layers", "batch_size", "learning_rate")
    return records.load(options.out, {name: getattr(baseline, name) for name in shared})


def options_of(options: argparse.Namespace, arguments: list[str], seed: int = 0) -> argparse.Namespace:
    """Those of `finetune_bert.py`."""
    of_run = ["--seed", str(seed), "--seconds", str(options.seconds), "--runs", str(options.runs)]
    arguments = [str(options.runs / "recipe") if word == "TEACHER" else word for word in arguments]
    made = finetune_bert.parse_options(finetune_bert.make_parser(), [*arguments, *of_run])
    made.labels, made.limit, made.device = options.labels, options.limit, options.device
    return made


def train_all(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Seed by seed, so that what an interrupt leaves has about as many seeds of each recipe."""
    done = {(run["seed"], run["recipe"]) for run in record["runs"]}
    left = [
        pair for pair in product(range(FIRST_SEED, FIRST_SEED + options.seeds), options.recipes) if pair not in done
    ]
    if not left:
        return
    import recipe
    from evaluation import judge
    from experiment import machine_of

    data, device = recipe.load_data(options), recipe.choose_device(options.device)
    record["machine"] = machine_of(device, recipe.precision(device))
    print(f"{len(left)} trainings of {options.seconds:g} s. Ctrl-C stops, and keeps the finished ones.", flush=True)
    for seed, name in left:
        if name == "distillation" and not train_teacher(options, data, device):
            return
        fitted = recipe.train(options_of(options, RECIPES[name], seed), data, device)
        if fitted.interrupted:
            print("Stopped; the finished trainings are kept.")
            return
        figures = judge(name, data.targets, recipe.scores_of(fitted, data)).figures
        run = {"recipe": name, "seed": seed, "seconds": round(fitted.seconds, 1), "texts": fitted.texts}
        record["runs"].append(run | {"figures": asdict(figures)})
        records.save(options.out, record)
        tail = "-" if figures.macro_f1_tail is None else f"{figures.macro_f1_tail:.3f}"
        print(f"{name}, seed {seed}: {fitted.texts:,} texts, macro-F1 of tail labels {tail}", flush=True)


def train_teacher(options: argparse.Namespace, data: Any, device: Any) -> bool:
    """Unless an earlier run left one; whether there is one now."""
    import recipe

    if not (options.runs / recipe.FOLDER).exists():
        of_teacher = options_of(options, ["--layers", str(TEACHER_LAYERS), "--learning-rate", "1e-3"])
        of_teacher.seconds *= TEACHER_TIME
        fitted = recipe.train(of_teacher, data, device)
        if fitted.interrupted:
            return False
        scores = recipe.scores_of(fitted, data)
        recipe.keep(options.runs / recipe.FOLDER, fitted, data, scores)
    return True


def table(found: dict[str, np.ndarray], record: dict[str, Any]) -> str:
    """In Markdown; what a flag changes is the mean over the seeds that both have."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | change of the tail | texts |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name, columns in found.items():
        cells = [records.shown(column) for column in columns.T]
        runs = [run for run in record["runs"] if run["recipe"] == name]
        change = "" if name == BASELINE else changed(name, record)
        flags = f"{name}, `{' '.join(RECIPES[name])}`" if RECIPES[name] else name
        lines.append(f"| {flags} | {' | '.join(cells)} | {change} | {np.mean([run['texts'] for run in runs]):,.0f} |")
    return "\n".join(lines)


def changed(name: str, record: dict[str, Any]) -> str:
    """Against the baseline of the same seed: mean, lowest and highest."""
    tails = {(run["recipe"], run["seed"]): run["figures"]["macro_f1_tail"] for run in record["runs"]}
    changes = [
        tail - tails[BASELINE, seed] for (of, seed), tail in tails.items() if of == name and (BASELINE, seed) in tails
    ]
    if not changes:
        return ""
    return f"{np.mean(changes):+.3f} ({min(changes):+.3f} to {max(changes):+.3f})"


def draw(path: Path, found: dict[str, np.ndarray], record: dict[str, Any], title: str) -> None:
    """A line for each recipe: its seeds, their mean, and the baseline's as a band through all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.34 * len(found)), layout="constrained", dpi=130)
    shown = ("macro_f1_tail", "micro_f1")
    for axes, column in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        place = list(COLUMNS).index(column)
        for line, (name, columns) in enumerate(found.items()):
            mean, low, high = columns[:, place]
            color = "tab:orange" if name == BASELINE else "tab:blue"
            axes.errorbar(mean, line, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=4)
            if name == BASELINE:
                axes.axvspan(low, high, color=color, alpha=0.15, linewidth=0)
                axes.axvline(mean, color=color, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(found)), list(found))
        axes.set(xlabel=COLUMNS[column])
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path)


def write_table(path: Path, text: str) -> None:
    if path.exists():
        page = path.read_text(encoding="utf-8")
        path.write_text(MARKED.sub(lambda _: f"\n{text}\n\n", page), encoding="utf-8")


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    options.recipes = list(dict.fromkeys(options.recipes))

    def work() -> None:
        record = load_record(options)
        train_all(options, record)
        found = records.spreads(record["runs"], "recipe", options.recipes, FIRST_SEED + options.seeds, tuple(COLUMNS))
        if found:
            made = table(found, record)
            title = f"{options.seconds:g} s of training each; mean, lowest and highest of {options.seeds} seeds"
            draw(options.out.with_suffix(".png"), found, record, title)
            write_table(options.out.with_suffix(".md"), made)
            print(f"\n{made}\n\nWritten to {options.out} and beside it.")

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
