"""A case: on a GPU in this process, on a CPU in one or two of its own, where malloc is told what to do with memory."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any

import torch

from . import preload
from .cases import Case, Row, start_rows
from .families import family_of, imports, providers
from .measure import measure_again, measure_time
from .memory import measure_memory

# What mallopt(3) calls M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MALLOC = {
    "kept": {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1},
    # Between the blocks of the eager backend, which fit a cache, and a whole tensor.
    "fresh": {_MMAP_THRESHOLD: 4 << 20},
    "default": {},
    # Everything goes back at once, so that no provider lives on what another one freed.
    "memory": {_MMAP_THRESHOLD: 1 << 16},
}


def run_case(case: Case, device: torch.device, budget: float, left_out: frozenset[str] = frozenset()) -> list[Row]:
    """The rows of a case, without the providers whose name or kind is left out."""
    if device.type != "cpu":
        return _measure(case, device, budget, left_out)
    try:
        return _in_a_process(left_out, _run_alone, case, budget, left_out)
    except BrokenProcessPool:  # the system's, when memory is out
        rows = start_rows(case, providers(case, left_out), device)
        for row in rows:
            row.status, row.note = "failed", "its process was ended"
        return rows


def run_again(rows: Sequence[Row], budget: float, left_out: frozenset[str] = frozenset()) -> bool:
    """Time a case's rows in a second process, and take its times if it was quicker; whether it was."""
    timed = [row for row in rows if row.seconds is not None]
    if not timed:
        return False
    try:
        return _take_quicker(timed, _in_a_process(left_out, _run_again, timed, budget, left_out))
    except BrokenProcessPool:  # what the first one measured stands
        return False


def _in_a_process(left_out: frozenset[str], function: Callable[..., list[Row]], *args: Any) -> list[Row]:
    with ProcessPoolExecutor(1, mp_context=_context(left_out)) as pool:
        return pool.submit(function, *args).result()


def _take_quicker(rows: Sequence[Row], again: Sequence[Row]) -> bool:
    """The times of the process that was quicker on the whole, in which all took turns."""
    pairs = list(zip(rows, again, strict=True))
    if math.prod(new.seconds.median / row.seconds.median for row, new in pairs if row.seconds and new.seconds) >= 1:
        return False
    for row, new in pairs:
        row.seconds, row.samples = new.seconds, new.samples
    return True


def _context(left_out: frozenset[str]) -> BaseContext:
    """Processes forked off one that has imported what they need, and has run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    os.environ[preload.VARIABLE] = " ".join(["bench.single", *imports(left_out)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload.__name__])
    return context


def _run_alone(case: Case, budget: float, left_out: frozenset[str]) -> list[Row]:
    _prepare_process(case)
    return _measure(case, torch.device("cpu"), budget, left_out)


def _run_again(rows: Sequence[Row], budget: float, left_out: frozenset[str]) -> list[Row]:
    _prepare_process(rows[0].case)
    return measure_again(rows, providers(rows[0].case, left_out), torch.device("cpu"), budget)


def _prepare_process(case: Case) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for option, value in _MALLOC["memory" if case.suite == "memory" else case.pages].items():
        _mallopt(option, value)
    if case.suite == "small":
        # Two threads gain nothing on 3200 elements, and wait milliseconds for each other on a busy machine.
        torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A run that is killed leaves no case behind, which would slow the next one."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _mallopt(option: int, value: int) -> None:
    """glibc's own; elsewhere there is none, and malloc is what it is."""
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is not None:
        function(option, value)


def _measure(case: Case, device: torch.device, budget: float, left_out: frozenset[str]) -> list[Row]:
    chosen = providers(case, left_out)
    if case.suite == "memory":
        return measure_memory(case, chosen, device)
    return measure_time(case, chosen, family_of(case).oracle, device, budget)
