"""What is shown of a run: tables in the terminal and the page of benchmarks in docs."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import charts
from .cases import SUITES, Row
from .measure import COPY
from .results import Results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
_README_FIGURES = re.compile(r"(?<=<!-- written by make bench -->\n).*?(?=<!-- end -->)", re.DOTALL)

_TIME_HEADER = ("", "time", "quartiles", "speed against PyTorch", "speed against a copy", "error", "at the tails")
_MEMORY_HEADER = ("", "MiB", "in logits tensors")

_HEADINGS = {
    "sigmoid": "Multi-label losses, forward and backward",
    "softmax": "Single-label losses, forward and backward",
    "listwise": "Ranking losses on given scores, forward and backward",
    "head": "A linear layer and its loss in one, forward and backward",
    "small": "A small batch: the host's part counts",
    "memory": "Peak memory beyond the inputs, forward and backward",
}
_INTRODUCTION = """# Benchmarks

`make bench` writes this page from the newest file of each device in [bench/results](../bench/results), and
`python -m bench report` writes it again; edits here are lost. All providers of a case take turns in one run, on inputs
that rotate through more memory than the last cache holds; times are medians, with the quartiles beside them. The floor
is the logits and dense targets read once and the gradient written once; the copy moves as many bytes. The loss is the
mean; upstream is what its gradient is multiplied by (1 unless it is named). Every tenth label is positive, or as many a
row as are named. PyTorch's losses cannot take SparseLabels: where ours do, theirs are given the same labels as dense
bytes, and so is a second row of ours.

Before it is timed, each one's loss and gradient are compared with float64, on logits up to ±18; the error is the
gradient's, in units of its largest element. The tails are another matter: sure rows, right and wrong, with logits of
±20 to ±80. That figure is the worst relative error of the loss and of any element of the gradient whose true value is a
normal number of its dtype. 1 means that nothing of it is left; bfloat16's own rounding is 4e-03.

On a CPU each case has a process of its own. When all have had theirs, those that measure time, but for layers, have a
second one, the shortest first, while there is time: by the memory that it got, or by who else used the host just then,
a process can be slow throughout. The times of a case are those of the process that was quicker on the whole. The
allocator is malloc as it is, as a user's process has it; or is made to keep freed memory, as jemalloc or a warm heap
does ("kept pages"); or to hand large tensors back at once, as glibc does with any above 32 MiB ("fresh pages"): the
system then clears new pages for each temporary, which is most of an unfused formula's time. Left to itself glibc does
either at most of these sizes. Small batches run on one thread.
"""


def case_table(rows: list[Row]) -> str:
    """A case for the terminal: its title and a line for each provider."""
    header = _MEMORY_HEADER if rows[0].case.suite == "memory" else _TIME_HEADER
    return f"{rows[0].case.title}\n{tabulate(_lines(rows), header, disable_numparse=True)}\n"


def claims_table(claims: Iterable[dict[str, Any]], style: str = "simple") -> str:
    lines = [(c["claim"], f"{c['measured']:.2f}", c["bound"], "met" if c["met"] else "NOT MET") for c in claims]
    return tabulate(lines, ("claim", "measured", "bound", ""), tablefmt=style, disable_numparse=True)


def write_docs(results: Path = RESULTS, page: Path = DOCS, readme: Path = README) -> None:
    """Write the page of benchmarks, and the README's figures, from the newest file of each device; draw its charts."""
    newest = {}
    for path in sorted(results.glob("*.json")):
        run = Results.load(path)
        newest[run.environment["name"]] = run
    for run in newest.values():
        charts.draw(run, results)
    page.write_text("\n".join([_INTRODUCTION, *(_section(run, results, page) for run in newest.values())]))
    figures = "\n".join(
        f"{_where(run)}:\n\n{claims_table(run.claims, 'github')}\n" for run in newest.values() if run.claims
    )
    readme.write_text(_README_FIGURES.sub(lambda _: f"\n{figures}\n", readme.read_text()))


def write_run(run: Results, folder: Path) -> list[Path]:
    """A run's JSON, its page and its charts."""
    path = run.save(folder)
    page = path.with_suffix(".md")
    pictures = charts.draw(run, folder)
    page.write_text(_section(run, folder, page))
    return [path, page, *pictures]


def missing(rows: Iterable[Row]) -> str:
    """Who could take no part, and why; empty if everybody did."""
    reasons = {row.provider: row.note for row in rows if row.status == "missing"}
    return ", ".join(f"{provider} ({reason})" for provider, reason in reasons.items())


def _where(run: Results) -> str:
    env = run.environment
    device = (
        f"{env['name']}, {env['threads']} threads" if env["device"] == "cpu" else f"{env['name']}, CUDA {env['cuda']}"
    )
    return f"{device}, torch {env['torch']}, Triton {env['triton']}, Python {env['python']}, {env['date']}"


def _section(run: Results, folder: Path, page: Path) -> str:
    """A run in Markdown, with the charts that are in its folder."""
    absent = missing(run.rows)
    parts = [
        f"## {run.environment['name']}\n\n{_where(run)}. bertloss-fast {run.environment['bertloss_fast']}.",
        f"Not taking part: {absent}.\n" if absent else "",
    ]
    pictures = os.path.relpath(folder, page.parent)
    parts += [f"![{title}]({pictures}/{name})\n" for title, name in charts.drawn(run, folder)]
    for suite in SUITES:
        rows = [row for row in run.rows if row.case.suite == suite]
        if rows:
            parts.append(f"### {_HEADINGS[suite]}\n\n{_suite_table(rows)}\n")
    if run.claims:
        parts.append(f"### What the project holds itself to\n\n{claims_table(run.claims, 'github')}\n")
    return "\n".join(parts)


def _suite_table(rows: list[Row]) -> str:
    """A suite as one Markdown table, each case's title on a line of its own."""
    header = _MEMORY_HEADER if rows[0].case.suite == "memory" else _TIME_HEADER
    lines: list[tuple[str, ...]] = []
    for case in dict.fromkeys(row.case for row in rows):
        lines.append((f"**{case.title}**", *[""] * (len(header) - 1)))
        lines += _lines([row for row in rows if row.case == case])
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """The lines of one case, of those who can run here; why a figure is missing stands in its place."""
    medians = {row.provider: row.seconds.median for row in rows if row.seconds}
    return [
        (row.label, *(_memory(row) if row.case.suite == "memory" else _time(row, medians)))
        for row in rows
        if row.status != "missing"
    ]


def _memory(row: Row) -> tuple[str, ...]:
    if row.peak_bytes is None:
        return _why(row), ""
    return f"{row.peak_bytes / 2**20:.1f}", f"{row.peak_bytes / row.case.logits_bytes:.2f}"


def _time(row: Row, medians: dict[str, float]) -> tuple[str, ...]:
    if row.seconds is None:
        return (_why(row), *[""] * 5)
    against = (medians.get("pytorch"), medians.get(COPY))
    return (
        _duration(row.seconds.median),
        f"{_duration(row.seconds.low)} to {_duration(row.seconds.high)}",
        *("" if other is None else f"{other / row.seconds.median:.2f}" for other in against),
        *("" if error is None else f"{error:.0e}" for error in (row.grad_error, row.tail_error)),
    )


def _why(row: Row) -> str:
    return row.note if row.status == "skipped" else f"{row.status}: {row.note}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=write_docs.__doc__)
    parser.parse_args(argv)
    write_docs()
    return 0
