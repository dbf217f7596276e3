"""Trains a single-label text classifier in English or Chinese with a loss of bertloss_fast, and says how good it is.

    python examples/train_multiclass.py                                  the chapter of a clinical text, cross-entropy
    python examples/train_multiclass.py --language chinese --loss focal  the sentiment of a review, softmax focal loss
    python examples/train_multiclass.py --loss distillation              2 layers learn from 6, which are trained first
    python examples/train_multiclass.py --loss distillation --teacher runs/english-cross-entropy.pt
    python examples/train_multiclass.py --compare                        everything, with three seeds for the students

A run ends on the clock, evaluation and all, and leaves a checkpoint and its figures in runs/. `--compare` writes
docs/multiclass.json as its runs end, goes on from there when it is started again, and draws docs/multiclass.png.
The rest: `single_label_texts.py` (the data), `single_label.py` (model, losses, a run).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import train_multilabel as demo
from train_multilabel import STARTED

LANGUAGES = {"english": "the chapter of a clinical text", "chinese": "the sentiment of a review"}
LOSSES = {
    "cross-entropy": "softmax cross-entropy",
    "focal": "softmax focal loss",
    "ldam": "label-distribution-aware margin",
    "distillation": "cross-entropy and the logits of a teacher",
}
OPTIONS_OF = {"gamma": ("focal", 2.0), "temperature": ("distillation", 2.0), "alpha": ("distillation", 0.5)}
"""The loss that an option belongs to, and the option's default."""
LAYERS, STUDENT_LAYERS = 6, 2
SHARED = ("minutes", "epochs", "batch_size", "limit", "device", "runs")
"""Options that --compare hands on to its runs."""
FIGURES = ("accuracy", "macro-F1")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a single-label text classifier with a loss of bertloss_fast and says how good it is."
    )
    seed = demo.number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0")
    layers = demo.number(int, lambda value: 1 <= value <= LAYERS, f"a whole number from 1 to {LAYERS}")
    share = demo.number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    gamma = demo.number(float, lambda value: value >= 0, "a number of at least 0")
    add = parser.add_argument
    for name, default, meanings in (("--language", "english", LANGUAGES), ("--loss", "cross-entropy", LOSSES)):
        shown = ", ".join(f"{choice}: {meaning}" for choice, meaning in meanings.items())
        add(name, choices=meanings, default=default, metavar="NAME", help=f"{shown} (default %(default)s)")
    add("--gamma", type=gamma, help="focusing of the focal loss (default 2)")
    add("--temperature", type=demo.positive, help="of teacher and student in distillation (default 2)")
    add("--alpha", type=share, help="weight of the teacher in distillation (default 0.5)")
    add("--teacher", type=Path, metavar="FILE.pt", help="checkpoint of an earlier run (default: trained first)")
    add("--layers", type=layers, help=f"of the {LAYERS} (default {LAYERS}; {STUDENT_LAYERS} with distillation)")
    add("--minutes", type=demo.positive, default=3.0, help="of a run, evaluation included (default %(default)g)")
    add(
        "--epochs",
        type=demo.positive,
        help="at most so many passes over the texts (default: until time is up; about one with --compare)",
    )
    add("--batch-size", type=demo.count, default=32, help="texts in a step (default %(default)s)")
    add("--limit", type=demo.limit, help="use only so many texts (default: all)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add("--seed", type=seed, default=0, help="of the head's weights and the texts' order; the split stays (default 0)")
    add("--runs", type=Path, default=Path("runs"), metavar="DIRECTORY", help="where results go (default %(default)s)")
    add("--compare", action="store_true", help="all losses in both languages, and students with and without a teacher")
    add("--seeds", type=demo.count, default=3, help="with --compare: of each student, from 0 (default %(default)s)")
    add("--out", type=Path, default=Path("docs/multiclass.json"), metavar="FILE.json", help="default %(default)s")
    return parser


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    for name, (loss, default) in OPTIONS_OF.items():
        if getattr(options, name) is None:
            setattr(options, name, default if options.loss == loss else None)
        elif options.loss != loss:
            parser.error(f"--{name} belongs to --loss {loss}")
    if options.teacher is not None and options.loss != "distillation":
        parser.error("--teacher belongs to --loss distillation")
    if options.teacher is not None and not options.teacher.is_file():
        parser.error(f"--teacher {options.teacher}: there is no such file")
    for name in ("language", "loss", "seed", "layers", "teacher"):
        if options.compare and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} has no use with --compare, which tries them all")
    for name in ("seeds", "out"):
        if not options.compare and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name} belongs to --compare")
    if options.layers is None:
        options.layers = STUDENT_LAYERS if options.loss == "distillation" else LAYERS
    return options


OF_THE_STUDENTS = ("cross-entropy", "distillation")
EPOCHS_COMPARED = {"english": 0.6, "chinese": 1.0}
"""Unless --epochs says other: so many end before the clock does, even where two cores have more to do."""


def planned(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The runs of --compare: in each language the teacher, then students without and with it, then the other losses."""
    runs = []
    for language in LANGUAGES:
        runs.append((language, "cross-entropy", LAYERS, 0))
        runs += [(language, loss, STUDENT_LAYERS, i) for i in range(options.seeds) for loss in OF_THE_STUDENTS]
        runs += [(language, loss, LAYERS, 0) for loss in ("focal", "ldam")]
    for language, loss, layers, seed in runs:
        arguments = ["--language", language, "--loss", loss, "--layers", str(layers), "--seed", str(seed)]
        run_options = parse_options(make_parser(), arguments)
        for name in SHARED:
            setattr(run_options, name, getattr(options, name))
        run_options.epochs = options.epochs or EPOCHS_COMPARED[language]
        if layers == STUDENT_LAYERS:
            run_options.runs = options.runs / "students"
        if loss == "distillation":
            run_options.teacher = options.runs / f"{language}-cross-entropy.pt"
        yield run_options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the runs that --out does not hold yet, or that the clock cut short."""
    import single_label
    from experiment import OptionError

    settings = {name: getattr(options, name) for name in SHARED if name not in ("device", "runs")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"settings": settings, "runs": []}
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
        if record["settings"] != settings:
            raise OptionError(f"--out {options.out}: its runs had other settings: {record['settings']}")
    record["runs"] = [run for run in record["runs"] if has_its_epochs(run)]
    done = [key_of(run["options"]) for run in record["runs"]]
    for run_options in planned(options):
        if key_of(vars(run_options)) not in done:
            print(f"\n{run_options.language}, {run_options.loss}, {run_options.layers} layers, seed {run_options.seed}")
            report = single_label.run(run_options, time.monotonic())
            if report["training"]["interrupted"]:
                raise KeyboardInterrupt
            record["runs"].append(report)
            unfinished = options.out.with_suffix(".tmp")
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(options.out)
    return record


def key_of(options: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(options[name] for name in ("language", "loss", "layers", "seed"))


def has_its_epochs(run: dict[str, Any]) -> bool:
    return run["training"]["epochs"] >= run["options"]["epochs"]


Results = dict[str, dict[str, np.ndarray]]
"""Language, row of the table, `[seeds, 2]`: accuracy and macro-F1."""


def collect(record: dict[str, Any]) -> Results:
    found: dict[str, dict[str, list[list[float]]]] = {language: {} for language in LANGUAGES}
    for run in record["runs"]:
        language, loss, layers, _ = key_of(run["options"])
        for name, figures in run["figures"].items():
            if name == "its teacher":
                continue
            ours = name.startswith("MiniLM")
            row = f"{layers} layers, {loss}" if ours else name
            values = found[language].setdefault(row, [])
            if ours or not values:
                values.append(list(figures.values()))
    return {
        language: {row: np.array(rows[row]) for row in sorted(rows, key=lambda row: "layers" not in row)}
        for language, rows in found.items()
    }


def table(results: Results) -> str:
    """Where a row has several seeds: their mean, and the lowest and the highest."""
    lines = ["| | " + " | ".join(f"{language}: {figure}" for language in results for figure in FIGURES) + " |"]
    lines.append("|---" * (1 + len(results) * len(FIGURES)) + "|")
    for row in dict.fromkeys(row for rows in results.values() for row in rows):
        cells = [cell(rows[row][:, i]) if row in rows else "" for rows in results.values() for i in range(len(FIGURES))]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cut_short(record: dict[str, Any]) -> str:
    """A sentence on the runs that the clock ended before their epochs: what they reached is not to be compared."""
    short = sum(not has_its_epochs(run) for run in record["runs"])
    if not short:
        return ""
    return f"The clock cut {short} runs short, which are not to be compared; the same command makes them again.\n\n"


def cell(values: np.ndarray) -> str:
    spread = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def draw(path: Path, results: Results) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=130)
    for axes, (language, rows) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for place, values in enumerate(rows.values()):
            for column, colour in enumerate(("tab:blue", "tab:orange")):
                height = np.full(len(values), place + 0.2 * column - 0.1)
                axes.plot(values[:, column], height, "o", color=colour, alpha=0.6, label=FIGURES[column])
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        least = min(values.min() for row, values in rows.items() if row != "majority class")
        axes.set(title=f"{language.capitalize()}: {LANGUAGES[language]}", xlim=(least - 0.02, 1.0))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles[:2], frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path)


def main() -> int:
    parser = make_parser()
    options = parse_options(parser)

    def work() -> None:
        if options.compare:
            record = compare(options)
            results = collect(record)
            picture = options.out.with_suffix(".png")
            draw(picture, results)
            print(f"\n{table(results)}\n\n{cut_short(record)}Written to {options.out} and {picture}.")
        else:
            import single_label

            single_label.run(options, STARTED)

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
