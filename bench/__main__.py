"""The command line of the bench; ``python -m bench --help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import families
from .cases import SUITES
from .report import RESULTS, case_table, claims_table, write_docs
from .results import Results, environment
from .single import run_case

# Seconds of timing a case, beside its checks; GPUs are steadier.
_BUDGET = {"cpu": 5.0, "cuda": 2.0}
_QUICK_BUDGET = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 1 if one of our losses is wrong. A claim that is not met stands in the table as such."""
    args = _parse(argv)
    if args.command == "report":
        write_docs()
        return 0
    device = torch.device(args.device)
    run = Results(environment(device, args.quick))
    if (run.environment["load"] or 0) > 0.5:
        print(
            f"The load is {run.environment['load']} before we start: others use this machine, and figures will be off."
        )
    folder = args.out or (RESULTS if args.suite == "all" and not args.quick else None)
    measure_all(run, device, args.suite, folder)

    verdicts = (claim.verdict(run.rows) for claim in families.claims(device))
    run.claims = [verdict for verdict in verdicts if verdict is not None]
    if run.claims:
        print(f"claims\n{claims_table(run.claims)}\n")
    if folder is not None:
        print(f"written to {run.save(folder)}")
        if folder.resolve() == RESULTS:
            write_docs()
    return int(any(row.ours and row.status in ("wrong", "failed") for row in run.rows))


def measure_all(run: Results, device: torch.device, suite: str, folder: Path | None) -> None:
    """Fill a run case by case, and keep each at once: what is measured survives what comes after it."""
    quick = run.environment["quick"]
    chosen = [case for case in families.cases(device) if suite in ("all", case.suite)]
    claimed = {claim.case for claim in families.claims(device)}
    if quick and claimed:
        chosen = [case for case in chosen if case in claimed]
    for case in (progress := tqdm(chosen, unit="case", dynamic_ncols=True, disable=None)):
        progress.set_description(f"{case.suite}: {case.title}")
        rows = run_case(case, device, _QUICK_BUDGET if quick else _BUDGET[device.type], compiler=not quick)
        run.rows += rows
        tqdm.write(case_table(rows))
        if folder is not None:
            run.save(folder)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Time and memory of our losses and their peers."
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run", help="report: rewrite the docs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--suite", default="all", choices=(*SUITES, "all"))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the cases that claims are about, a fifth of the time, and no torch.compile",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default bench/results for a whole run, else none"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
