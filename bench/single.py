"""One case: on a GPU in this process, on a CPU in one of its own, where malloc is told what to do with memory.

``python -m bench.single`` is that process: a request comes in as JSON, rows go out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Case, Provider, Row, start_rows
from .families import family_of
from .measure import measure_time
from .memory import measure_memory

# What glibc reads at the start of a process; elsewhere these have no effect.
_MALLOC = {
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    # Between the blocks of the eager backend, which fit a cache, and a whole tensor.
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)},
    "default": {},
    # Everything goes back at once, so that no provider lives on what another one freed.
    "memory": {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
}


def run_case(case: Case, device: torch.device, budget: float, compiler: bool) -> list[Row]:
    """The rows of a case; ``compiler`` says whether torch.compile takes part."""
    if device.type != "cpu":
        return _run_here(case, device, budget, compiler)
    child = subprocess.run(
        [sys.executable, "-m", "bench.single"],
        input=json.dumps({"case": case.to_json(), "budget": budget, "compiler": compiler}),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _MALLOC["memory" if case.suite == "memory" else case.pages],
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if child.returncode == 0:
        return [Row.from_json(fields) for fields in json.loads(child.stdout)]
    rows = start_rows(case, family_of(case).PROVIDERS, device)
    for row in rows:
        row.status, row.note = "failed", f"its process ended with status {child.returncode}"
    return rows


def _run_here(case: Case, device: torch.device, budget: float, compiler: bool) -> list[Row]:
    family = family_of(case)
    providers = [p if compiler or p.name != "compile" else _left_out(p) for p in family.PROVIDERS]
    if case.suite == "memory":
        return measure_memory(case, providers, device)
    return measure_time(case, providers, family.oracle, device, budget)


def _left_out(provider: Provider) -> Provider:
    return provider._replace(why_not=lambda device: "left out by --quick")


if __name__ == "__main__":
    request = json.load(sys.stdin)
    case = Case.from_json(request["case"])
    if case.suite == "small":
        # Two threads gain nothing on 3200 elements, and wait milliseconds for each other on a busy machine.
        torch.set_num_threads(1)
    rows = _run_here(case, torch.device("cpu"), request["budget"], request["compiler"])
    json.dump([row.to_json() for row in rows], sys.stdout)
