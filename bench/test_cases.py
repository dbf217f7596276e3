"""The same cases under pytest-benchmark: ``pytest bench --benchmark-json out.json``, with -k to choose.

In this process, so with malloc as it is; who would be wrong fails, and who cannot run is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from . import families
from .cases import Case, start_rows
from .check import Expected, check
from .data import as_tensor, make_data, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = dict.fromkeys(replace(case, pages="default") for case in families.cases(DEVICE) if case.suite != "memory")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, row.provider, id=f"{case.suite}: {case.title}: {row.provider}")
        for case in CASES
        for row in start_rows(case, families.providers(case), DEVICE)
    ],
)
def test_case(case: Case, name: str, benchmark: Callable[..., object]) -> None:
    provider = next(provider for provider in families.providers(case) if provider.name == name)
    (row,) = start_rows(case, [provider], DEVICE)
    if row.status != "ok":
        pytest.skip(row.note)
    inputs, targets = make_data(case, DEVICE)
    if not provider.sparse:
        targets = as_tensor(targets)
    loss = provider.losses[case.loss][1]
    check(row, loss, Expected(case, families.family_of(case).oracle, inputs, targets), inputs, targets)
    if row.status == "skipped":
        pytest.skip(row.note)
    assert row.status == "ok", row.note

    num_threads = torch.get_num_threads()
    if case.suite == "small":
        torch.set_num_threads(1)  # as single.py does

    def one_pass() -> None:
        step(case, loss, inputs, targets)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.title  # type: ignore[attr-defined]
    try:
        benchmark(one_pass)
    finally:
        torch.set_num_threads(num_threads)
