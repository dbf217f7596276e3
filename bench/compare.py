"""``python -m bench compare OLD NEW``: what of ours became slower, or larger, between two runs, beyond their spread.

A run's quartiles do not tell how far its medians lie from the next run's. The peers do, and the copies: their code is
the same in both runs, so that what they moved by is the machine's part. Where glibc was left to keep pages or to hand
them back, which it does by luck, no times are compared if the same case was run with kept pages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from tabulate import tabulate

from .cases import Row
from .results import Results

# Less is not told, however quiet the machine: of two runs of the same code on two shared cores, a figure or two of 200
# moved by 1.25 to 1.4.
_LEAST_SLOWDOWN = 1.35
_LEAST_PEERS = 40
# The resident set is counted in pages, and the allocator's arenas differ by a few.
_LEAST_GROWTH, _LEAST_GROWTH_BYTES = 1.1, 2 << 20

# Without which figures are not alike.
_CONDITIONS = ("name", "cuda", "threads", "torch", "triton", "python", "quick")

Pair = tuple[Row, Row]


class Change(NamedTuple):
    title: str
    label: str
    what: str


def compare(old: Results, new: Results) -> list[Change]:
    """What of ours is worse in ``new``; rows that only one of them has are not judged."""
    before = {_key(row): row for row in old.rows}
    steady = {replace(row.case, pages="default", kinds=()) for row in new.rows if row.case.pages == "kept"}
    pairs = []
    for row in new.rows:
        if (was := before.get(_key(row))) is not None:
            by_luck = replace(row.case, kinds=()) in steady
            pairs.append((replace(was, seconds=None), replace(row, seconds=None)) if by_luck else (was, row))
    peers: dict[tuple[str, str], list[Pair]] = {}
    for was, row in pairs:
        if not row.ours and was.seconds and row.seconds:
            peers.setdefault(_case(row), []).append((was, row))
    drifts = {case: max(1.0, median(map(_ratio, of_case))) for case, of_case in peers.items()}
    spread = _spread([_ratio(pair) / drifts[case] for case, of_case in peers.items() for pair in of_case])
    changes = []
    for was, row in pairs:
        if row.ours and (what := _worse(was, row, drifts.get(_case(row), 1.0), spread)):
            changes.append(Change(row.case.title, row.label, what))
    return changes


def _key(row: Row) -> tuple[str, str, str]:
    return *_case(row), row.provider


def _case(row: Row) -> tuple[str, str]:
    return row.case.suite, row.case.title


def _ratio(pair: Pair) -> float:
    """Slower code moves the quickest quarter as well as the median; a neighbour often moves but one of them."""
    was, row = pair
    if was.seconds is None or row.seconds is None:
        return 1.0
    return min(row.seconds.median / was.seconds.median, row.seconds.low / was.seconds.low)


def _spread(ratios: Sequence[float]) -> float:
    """The slowdown that 39 of 40 peers stay below, though their code is what it was."""
    return max(_LEAST_SLOWDOWN, quantiles(ratios, n=40)[-1]) if len(ratios) >= _LEAST_PEERS else _LEAST_SLOWDOWN


def _worse(was: Row, row: Row, drift: float, spread: float) -> str | None:
    if was.status == "ok" and row.status in ("wrong", "failed"):
        return f"{row.status}: {row.note}"
    if was.seconds and row.seconds:
        ratio = _ratio((was, row))
        if ratio >= spread * drift and row.seconds.low > was.seconds.high * drift:
            beside = f", where its peers take {drift:.2f} times theirs" if drift > 1.05 else ""
            return f"{ratio:.2f} times the time{beside}"
    if was.peak_bytes is not None and row.peak_bytes is not None:
        more = row.peak_bytes - was.peak_bytes
        if more > _LEAST_GROWTH_BYTES and row.peak_bytes > was.peak_bytes * _LEAST_GROWTH:
            return f"{more / 2**20:.1f} MiB more at the peak"
    return None


def main(argv: Sequence[str]) -> int:
    """1 if something is worse. Files that tell nothing end the process with 2, as wrong arguments do."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("old", type=Path, help="a file of bench/results")
    parser.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    try:
        old, new = Results.load(args.old), Results.load(args.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changes = compare(old, new)
    keys = [{_key(row) for row in run.rows if row.ours and row.status == "ok"} for run in (old, new)]
    if not keys[0] & keys[1]:
        parser.error("expected two runs of the same cases, got two without a figure of ours in common")
    for name in _CONDITIONS:
        if old.environment.get(name) != new.environment.get(name):
            print(f"The runs differ in {name}: {old.environment.get(name)} and {new.environment.get(name)}.")
    print(f"{len(keys[0] & keys[1])} figures of ours in both, {len(keys[0] ^ keys[1])} in one alone.")
    print(tabulate(changes, ("case", "provider", "change")) if changes else "Nothing of ours became slower or larger.")
    return int(bool(changes))
