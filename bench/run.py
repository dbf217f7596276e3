"""``python -m bench``: measure, show and keep."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import families
from .cases import COMPILED, SUITES, Case, Row, start_rows, taking_part
from .report import RESULTS, case_table, claims_table, missing, write_docs, write_run
from .results import Results, environment
from .single import run_again, run_case

# Seconds of timing a case, beside its checks.
_BUDGET = 1.0
_QUICK_BUDGET = 0.7
_MINUTES = {"cpu": 9.5, "cuda": 7.5}
_INTERRUPTED = 130  # a shell's status of what Ctrl-C has ended
# Which memory a process got, what its code lies beside in the caches, and who else uses the host at the time can cost
# it a third of its speed throughout: on a CPU these suites are timed in two, minutes apart.
_TIMED_TWICE = ("sigmoid", "softmax", "small", "listwise")
# What a case takes beside: seconds to begin with, for what compiles, and for each provider and logit, of documents each
# pair. On a CPU a dozen passes of an unfused formula are repeated ten times, three times for memory; a GPU's case is
# bound by compiling.
_BEGIN, _COMPILE = {"cpu": 0.5, "cuda": 1.0}, {"cpu": 7.0, "cuda": 4.0}
_LOGIT = {"cpu": 2e-7, "cuda": 2e-9}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 1 if one of our losses is wrong. A claim that is not met stands in the table as such."""
    args = _parse(argv)
    device = torch.device(args.device)
    run = Results(environment(device, args.quick))
    left_out = frozenset(set(families.peers()) - set(args.peers)) | ({COMPILED} if args.quick else set())
    chosen = _choose(device, args.suite, args.quick)
    _announce(run, chosen, device, left_out)
    folder = args.out or (RESULTS if args.suite == "all" and not args.quick and not left_out else None)
    end = time.monotonic() + 60 * (_MINUTES[device.type] if args.minutes is None else args.minutes)
    try:
        measure_all(run, chosen, device, left_out, end, folder)
    except KeyboardInterrupt:
        print("stopped" if folder is None else f"stopped; what is measured is in {run.save(folder)}")
        return _INTERRUPTED

    verdicts = (claim.verdict(run.rows) for claim in families.claims(device))
    run.claims = [verdict for verdict in verdicts if verdict is not None]
    if run.claims:
        print(f"claims\n{claims_table(run.claims)}\n")
    if folder is not None:
        print("written to " + ", ".join(map(str, write_run(run, folder))))
        if folder.resolve() == RESULTS:
            write_docs()
    return int(any(row.ours and row.status in ("wrong", "failed") for row in run.rows))


def _choose(device: torch.device, suite: str, quick: bool) -> list[Case]:
    """Those that claims are about come first in their suite: a run that must end early has them."""
    claimed = {claim.case for claim in families.claims(device)}
    chosen = [case for case in families.cases(device) if suite in ("all", case.suite)]
    if quick and claimed:
        return [case for case in chosen if case in claimed]
    return sorted(chosen, key=lambda case: case not in claimed)


def _announce(run: Results, chosen: Sequence[Case], device: torch.device, left_out: frozenset[str]) -> None:
    """What others do to the figures, who is missing, and how long it will take."""
    if (run.environment["load"] or 0) > 0.5:
        print(
            f"The load is {run.environment['load']} before we start: others use this machine, and figures will be off."
        )
    rows = [row for case in chosen for row in start_rows(case, families.providers(case, left_out), device)]
    if absent := missing(rows):
        print(f"Not taking part: {absent}.")
    if left_out:
        print(f"Left out: {', '.join(sorted(left_out))}.")
    seconds = sum(_estimate(case, device, left_out) for case in (*chosen, *_chosen_again(chosen, device)))
    print(f"{len(chosen)} cases, about {seconds / 60:.1f} minutes; less where compiled code is cached.\n")


def _estimate(case: Case, device: torch.device, left_out: frozenset[str]) -> float:
    """Seconds that a process of a case takes, about."""
    providers = taking_part(case, families.providers(case, left_out))
    kinds = [provider.kind for provider in providers if not provider.why_not(device)]
    first_calls = _BEGIN[device.type] + kinds.count(COMPILED) * _COMPILE[device.type]
    partners = case.shape[1] if case.suite == "listwise" else 1
    passes = len(kinds) * case.numel * partners * _LOGIT[device.type]
    if case.suite == "memory":
        return first_calls + passes / 5
    return first_calls + passes + _BUDGET


def measure_all(
    run: Results,
    chosen: Sequence[Case],
    device: torch.device,
    left_out: frozenset[str],
    end: float,
    folder: Path | None,
) -> None:
    """Fill a run case by case, and keep each at once: what is measured survives what comes after it.

    A case that would last beyond ``end``, a time of the monotonic clock, is noted as skipped.
    """
    budget = _QUICK_BUDGET if run.environment["quick"] else _BUDGET
    took: dict[Case, float] = {}
    for case in _progress(chosen, ""):
        begin = time.monotonic()
        if begin + _estimate(case, device, left_out) > end:
            rows = _skipped(case, device, left_out)
        else:
            rows = run_case(case, device, budget, left_out)
        took[case] = time.monotonic() - begin
        run.rows += rows
        _keep(run, rows, folder)
    # The shortest first, so that most get a second process; where there is no time for one, what the first measured
    # stands.
    for case in _progress(sorted(_chosen_again(chosen, device), key=took.__getitem__), ", once more"):
        rows = [row for row in run.rows if row.case == case]
        if time.monotonic() + took[case] <= end and run_again(rows, budget, left_out):
            _keep(run, rows, folder)


def _chosen_again(chosen: Sequence[Case], device: torch.device) -> list[Case]:
    return [case for case in chosen if device.type == "cpu" and case.suite in _TIMED_TWICE]


def _progress(chosen: Sequence[Case], what: str) -> Iterator[Case]:
    for case in (progress := tqdm(chosen, unit="case", dynamic_ncols=True, disable=None)):
        progress.set_description(f"{case.suite}{what}: {case.title}")
        yield case


def _keep(run: Results, rows: list[Row], folder: Path | None) -> None:
    tqdm.write(case_table(rows))
    if folder is not None:
        run.save(folder)


def _skipped(case: Case, device: torch.device, left_out: frozenset[str]) -> list[Row]:
    rows = start_rows(case, families.providers(case, left_out), device)
    for row in rows:
        if row.status == "ok":
            row.status, row.note = "skipped", "the run's time was over"
    return rows


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return minutes


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time and memory of our losses and their peers.",
        epilog="python -m bench report rewrites the docs; python -m bench compare OLD NEW tells what became slower.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--suite", default="all", choices=(*SUITES, "all"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the cases that claims are about, half the time, and nothing that compiles",
    )
    peers = families.peers()
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers, metavar="NAME", help=", ".join(peers))
    parser.add_argument("--minutes", type=_minutes, help="when to stop; default 9.5 on a CPU, 7.5 on a GPU")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default bench/results for a whole run, else none"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {args.out}")
    return args
