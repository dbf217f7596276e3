"""Peak memory of a loss beyond its inputs: a GPU's from torch's allocator, a CPU's from the process's resident set."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case, Provider, Row, Targets, as_tensor, describe, leaves, make_data, start_rows, step

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def measure_memory(case: Case, providers: Sequence[Provider], device: torch.device) -> list[Row]:
    """Extra peak memory of a forward and backward pass; the gradient of the logits, which is the result, counts."""
    inputs, targets = make_data(case, device)
    dense = as_tensor(targets)
    losses = {p.name: p.losses[case.loss][1] for p in providers if case.loss in p.losses}
    rows = start_rows(case, providers, device)
    for row in rows:
        if row.status != "ok":
            continue
        one_pass = partial(step, case, losses[row.provider], inputs, targets if row.ours else dense)
        try:
            one_pass()  # makes whatever lasts: compiled code, thread pools
            _forget(inputs, targets)
            row.peak_bytes = extra_peak_bytes(one_pass, device)
        except Exception as error:  # out of memory, or no /proc: the others go on
            row.status, row.note = "failed", describe(error)
        _forget(inputs, targets)
    return rows


def _forget(inputs: Tensor, targets: Targets) -> None:
    for leaf in leaves(inputs, targets):
        leaf.grad = None


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
    _CLEAR_REFS.write_text("5")  # sets the peak back to what is resident now
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
