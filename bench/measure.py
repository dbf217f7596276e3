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
from pathlib import Path
from statistics import quantiles
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bertloss_fast.targets import SparseLabels

from .cases import (
    Case,
    MeanLoss,
    OfLayer,
    Provider,
    Quartiles,
    Row,
    Targets,
    as_tensor,
    describe,
    leaves,
    make_data,
    start_rows,
    step,
)

COPY = "copy of as many bytes"

Oracle = Callable[[str, Tensor, Tensor], Tensor]
Sampler = Callable[[Callable[[], object], int], float]

# Largest error against float64, of the loss and of the gradient in units of its largest element. A formula computed in
# bfloat16 loses 1 to 2 %; what exceeds that computes another loss.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_ORACLE_ELEMENTS = 1 << 24
_MAX_COPIES = 16
_MIN_ROUNDS = 5
_MAX_ROUNDS = 500
# Calls per sample: enough to hide the clock's own resolution, too few to be interrupted often.
_SAMPLE_SECONDS = 2e-3


def measure_time(
    case: Case, providers: Sequence[Provider], oracle: Oracle, device: torch.device, budget: float
) -> list[Row]:
    """Check every provider that can run, then time the right ones in turns for about ``budget`` seconds."""
    data = [make_data(case, device, seed) for seed in range(_num_copies(case, device))]
    dense = [(inputs, as_tensor(targets)) for inputs, targets in data]
    losses = {p.name: p.losses[case.loss][1] for p in providers if case.loss in p.losses}
    rows = start_rows(case, providers, device)
    for row in rows:
        if row.status == "ok":
            row.status, row.note = _check(row, losses[row.provider], oracle, *(data if row.ours else dense)[0])

    host_counts = case.suite == "small" or device.type == "cpu"
    runs = {
        row.provider: _rotate(case, losses[row.provider], data if row.ours else dense)
        for row in rows
        if row.status == "ok"
    }
    if case.suite not in ("small", "head"):  # which the host's part bounds, or the products
        runs[COPY] = _copy(case, device)
        rows.append(Row(case, COPY, COPY))
    times = interleave(runs, _wall_sample if host_counts else _DeviceClock(), budget)
    for row in rows:
        if row.provider in times:
            seconds = times[row.provider]
            row.seconds, row.samples = Quartiles(*quantiles(seconds, n=4, method="inclusive")), len(seconds)
    return rows


def interleave(runs: dict[str, Callable[[], object]], sample: Sampler, budget: float) -> dict[str, list[float]]:
    """Seconds per call of every run, a sample of each in every round."""
    calls = {}
    for name, run in runs.items():
        sample(run, 2)  # the second warm-up finds every allocation made
        calls[name] = max(1, min(1000, math.ceil(_SAMPLE_SECONDS / sample(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for turn in range(_MAX_ROUNDS):
            if turn >= _MIN_ROUNDS and time.perf_counter() > end:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(sample(runs[name], calls[name]))
    finally:
        gc.enable()
    return times


def _wall_sample(run: Callable[[], object], calls: int) -> float:
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


def _check(row: Row, loss: MeanLoss, oracle: Oracle, inputs: Tensor, targets: Targets) -> tuple[str, str]:
    """Note the errors of loss and gradient, and return what they amount to."""
    try:
        value = step(row.case, loss, inputs, targets)
    except Exception as error:  # whatever a peer, its compiler or the memory may raise: the others go on
        return "failed", describe(error)
    grads = [leaf.grad for leaf in leaves(inputs, targets)]
    for leaf in leaves(inputs, targets):
        leaf.grad = None
    if any(grad is None for grad in grads):
        return "wrong", "no gradient"
    row.loss_error, row.grad_error = errors(row.case, oracle, inputs, targets, value, cast(list[Tensor], grads))
    tolerance = _TOLERANCE[row.case.dtype]
    # Not "error > tolerance", which lets NaN pass.
    if not row.loss_error <= tolerance:
        return "wrong", f"loss is off by {row.loss_error:.1e}"
    if not row.grad_error <= tolerance:
        return "wrong", f"gradient is off by {row.grad_error:.1e}"
    return "ok", ""


def errors(
    case: Case, oracle: Oracle, inputs: Tensor, targets: Targets, value: Tensor, grads: Sequence[Tensor]
) -> tuple[float, float]:
    """Relative error of the loss, and of a gradient in units of its largest element, against float64 autograd."""
    scale = case.upstream / case.mean_over
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    weight = targets.weight.detach().double().requires_grad_() if isinstance(targets, OfLayer) else None
    y = targets.targets if isinstance(targets, OfLayer) else targets
    worst, largest = torch.zeros_like(total), torch.zeros_like(total)
    num_rows = max(1, _ORACLE_ELEMENTS // case.shape[1])
    for start in range(0, case.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        x64 = inputs.detach()[rows].double().requires_grad_()
        logits = x64 if weight is None else F.linear(x64, weight)
        part = oracle(case.loss, logits, _in_double(case, y[rows])).sum()
        part.backward()
        total += part.detach()
        expected = cast(Tensor, x64.grad) * scale
        worst = torch.maximum(worst, (grads[0][rows].double() - expected).abs().max())  # Python's max drops NaN
        largest = torch.maximum(largest, expected.abs().max())
    expected_loss = total / case.mean_over
    error = worst / largest
    if weight is not None:
        expected = cast(Tensor, weight.grad) * scale
        error = torch.maximum(error, (grads[1].double() - expected).abs().max() / expected.abs().max())
    return ((value - expected_loss) / expected_loss).abs().item(), error.item()


def _in_double(case: Case, targets: Tensor | SparseLabels) -> Tensor:
    if isinstance(targets, SparseLabels):
        return targets.to_dense(torch.float64)
    return targets if case.targets == "classes" else targets.double()
