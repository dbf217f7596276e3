"""How time and error are measured.

Providers take turns within a run, so that a noisy neighbour or a falling clock meets all of them alike, and the order
turns too. Inputs rotate through more memory than the last cache holds, up to a number of copies: 32 x 100 logits stay
cached, as they are when a model has just computed them.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor

from .cases import Case, MeanLoss, Provider, Quartiles, Row, start_rows
from .check import Expected, Oracle, check, measure_tails
from .data import Targets, as_tensor, make_data, step

COPY = "copy of as many bytes"

Sampler = Callable[[Callable[[], object], int], float]

_MAX_COPIES = 16
_MAX_ROUNDS = 500
# Calls per sample: enough to hide the clock's own resolution, too few to be interrupted often.
_SAMPLE_SECONDS = 2e-3
# A round in which eager formulas of a second a step take part would leave the others few rounds.
_SLOW_SECONDS = 0.2
# Of calls as long as that one tells how many make a sample.
_LONG_SECONDS = 2.0
_MIN_SAMPLES, _MIN_SLOW_SAMPLES = 5, 3


def measure_time(
    case: Case, providers: Sequence[Provider], oracle: Oracle, device: torch.device, budget: float
) -> list[Row]:
    """Check every provider that can run, then time the right ones in turns for about ``budget`` seconds."""
    runs = _Runs(case, providers, device)
    rows = start_rows(case, providers, device)
    expected = Expected(case, oracle, *runs.data[0])
    for row in rows:
        if row.status == "ok":
            check(row, runs.loss(row), expected, *runs.given(row)[0])
    del expected
    right = [row for row in rows if row.status == "ok"]
    if case.suite not in ("small", "listwise", "head"):  # whose bound is the host, the pairs, or the matrix product
        rows.append(Row(case, COPY, COPY))
    runs.time([row for row in rows if row.status == "ok"], budget)
    measure_tails(case, oracle, device, [(row, runs.loss(row), runs.takes_sparse(row)) for row in right])
    return rows


def measure_again(rows: Sequence[Row], providers: Sequence[Provider], device: torch.device, budget: float) -> list[Row]:
    """Time rows of a case that are right, and have been timed, once more."""
    again = [replace(row, seconds=None) for row in rows]
    runs = _Runs(again[0].case, providers, device)
    for row in again:
        if row.provider != COPY:
            step(row.case, runs.loss(row), *runs.given(row)[0])  # compiles, as the check did in the first process
    runs.time(again, budget)
    return again


class _Runs:
    """What the providers of a case are run on, and how."""

    def __init__(self, case: Case, providers: Sequence[Provider], device: torch.device) -> None:
        self._case, self._device = case, device
        self._providers = {provider.name: provider for provider in providers}
        self.data = [make_data(case, device, seed) for seed in range(_num_copies(case, device))]
        self._dense = [(inputs, as_tensor(targets)) for inputs, targets in self.data]

    def loss(self, row: Row) -> MeanLoss:
        return self._providers[row.provider].losses[self._case.loss][1]

    def takes_sparse(self, row: Row) -> bool:
        return self._providers[row.provider].sparse

    def given(self, row: Row) -> Sequence[tuple[Tensor, Targets]]:
        return self.data if self.takes_sparse(row) else self._dense

    def time(self, rows: Sequence[Row], budget: float) -> None:
        host_counts = self._case.suite == "small" or self._device.type == "cpu"
        runs = {row.provider: self._run(row) for row in rows}
        times = interleave(runs, wall_sample if host_counts else _DeviceClock(), budget)
        for row in rows:
            seconds = times[row.provider]
            row.seconds, row.samples = Quartiles(*quantiles(seconds, n=4, method="inclusive")), len(seconds)

    def _run(self, row: Row) -> Callable[[], object]:
        if row.provider == COPY:
            return _copy(self._case, self._device)
        return _rotate(self._case, self.loss(row), self.given(row))


@dataclass
class _Turns:
    """How a run takes part: so many calls a sample, in every ``stride``-th round, at least ``least`` times."""

    run: Callable[[], object]
    calls: int
    stride: int
    least: int
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, run: Callable[[], object], sample: Sampler) -> _Turns:
        seconds = sample(run, 1)
        if seconds < _LONG_SECONDS:
            seconds = min(seconds, sample(run, 1))  # which finds every allocation made
        slow = seconds >= _SLOW_SECONDS
        calls = max(1, min(1000, math.ceil(_SAMPLE_SECONDS / seconds)))
        return cls(run, calls, 4 if slow else 1, _MIN_SLOW_SAMPLES if slow else _MIN_SAMPLES)


def interleave(runs: dict[str, Callable[[], object]], sample: Sampler, budget: float) -> dict[str, list[float]]:
    """Seconds per call of every run, in rounds; a slow run takes part in some of them."""
    all_turns = {name: _Turns.of(run, sample) for name, run in runs.items()}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for number in range(_MAX_ROUNDS):
            if time.perf_counter() > end and all(len(t.seconds) >= t.least for t in all_turns.values()):
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                turns = all_turns[name]
                if number % turns.stride == 0:
                    turns.seconds.append(sample(turns.run, turns.calls))
    finally:
        gc.enable()
    return {name: turns.seconds for name, turns in all_turns.items()}


def wall_sample(run: Callable[[], object], calls: int) -> float:
    """Seconds a call as the caller sees them, the host's part included."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize()
    return (time.perf_counter() - start) / calls


class _DeviceClock:
    """Seconds of the GPU a call: calls queue up behind a sleeping kernel, so that the GPU never waits for the host."""

    # Launches beyond about a thousand block the host until the sleep is over.
    _max_calls = 8
    _max_cycles = 1 << 27  # 70 ms; a provider that synchronises is never ahead, and is timed as it is

    def __init__(self) -> None:
        self.cycles = 1 << 20

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        calls = min(calls, self._max_calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            was_ahead = not start.query()
            torch.cuda.synchronize()
            if was_ahead or self.cycles >= self._max_cycles:
                return float(start.elapsed_time(end)) / 1e3 / calls
            self.cycles *= 2


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rotate(case: Case, loss: MeanLoss, data: Sequence[tuple[Tensor, Targets]]) -> Callable[[], object]:
    turns = itertools.cycle(data)
    return lambda: step(case, loss, *next(turns))


def _copy(case: Case, device: torch.device) -> Callable[[], object]:
    """Half the floor's bytes read, half written: what the memory can do at this size."""
    pairs = [
        tuple(torch.ones(case.floor_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
        for _ in range(_num_copies(case, device))
    ]
    turns = itertools.cycle(pairs)

    def run() -> None:
        source, destination = next(turns)
        destination.copy_(source)

    return run


def _num_copies(case: Case, device: torch.device) -> int:
    return max(2, min(_MAX_COPIES, math.ceil(2 * _cache_bytes(device) / case.floor_bytes)))


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=32 << 20)
