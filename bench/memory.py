"""Peak memory of a loss beyond its inputs: a GPU's from torch's allocator, a CPU's from the process's resident set."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from .cap import capped
from .cases import Case, Provider, Row, describe, start_rows
from .check import FIRST_CALL_SECONDS
from .data import as_tensor, forget, make_data, step

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def measure_memory(case: Case, providers: Sequence[Provider], device: torch.device) -> list[Row]:
    """Extra peak memory of a forward and backward pass; the gradient of the logits, which is the result, counts."""
    inputs, targets = make_data(case, device)
    dense = as_tensor(targets)
    by_name = {provider.name: provider for provider in providers}
    rows = start_rows(case, providers, device)
    for row in rows:
        if row.status != "ok":
            continue
        provider = by_name[row.provider]
        one_pass = partial(step, case, provider.losses[case.loss][1], inputs, targets if provider.sparse else dense)
        try:
            with capped(FIRST_CALL_SECONDS):
                one_pass()  # makes whatever lasts: compiled code, thread pools
            forget(inputs, targets)
            row.peak_bytes = extra_peak_bytes(one_pass, device)
        except TimeoutError as error:
            row.status, row.note = "skipped", f"first call: {error}"
        except Exception as error:  # out of memory, or no /proc: the others go on
            row.status, row.note = "failed", describe(error)
        forget(inputs, targets)
    return rows


def extra_peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """How far memory rises during a call above where it stood before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    give_back_what_is_free()
    before = resident_bytes()
    return step_peak_bytes(call) - before


def give_back_what_is_free() -> None:
    """To the system, where the C library can (glibc): else a call is served from pages that are resident already, and
    seems to take none."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Of this process, now."""
    return _status_bytes("VmRSS")


def step_peak_bytes(call: Callable[[], object]) -> int:
    """The most that is resident during a call."""
    _CLEAR_REFS.write_text("5")  # sets the peak back to what is resident now
    call()
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
