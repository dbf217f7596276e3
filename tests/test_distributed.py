"""A head whose labels are split over processes, against one head; distributed_checks.py has what each process does.

Processes take seconds to start, so all checks of a number of processes run in one start, one after another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKS = [
    "ten_labels",
    "same_rows",
    "rows_of_rows",
    "no_rows_at_all",
    "topk_and_predict",
    "begins_with_the_first_ones_weights",
    "rounding_differs",
    "beside_data_parallel",
    "errors",
]
OF_FOUR = [*CHECKS, "a_process_without_labels", "several_dimensions", "saves"]
OF_TWO = [*CHECKS, "float32", "kernels", "loads", "one_hangs", "one_is_killed"]  # the last one leaves no group
OF_ONE_GPU = [*CHECKS[:7], "float32", "saves", "loads"]


class Ended:
    """Processes that are over: what each did, and what went wrong."""

    def __init__(self, folder: Path, device: str, world: int, checks: list[str]) -> None:
        self._folder, self._world, self._checks = folder, world, checks
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(root / "tests" / "distributed_checks.py"), device, str(world)]
        processes = [
            subprocess.Popen([*command, str(rank), str(folder), *checks], env=environment) for rank in range(world)
        ]
        deadline = time.monotonic() + 300
        try:
            self.codes = [process.wait(deadline - time.monotonic()) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def assert_did(self, check: str) -> None:
        """A check, in every process."""
        for rank in range(self._world):
            report = self._folder / f"{self._world} {rank}"
            if check not in (report.read_text().split() if report.exists() else ()):
                error = report.with_suffix(".error")
                pytest.fail(f"rank {rank}: {error.read_text() if error.exists() else 'ended early'}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def four(folder: Path) -> Ended:
    return Ended(folder, "cpu", 4, OF_FOUR)


@pytest.fixture(scope="module")
def two(folder: Path, four: Ended) -> Ended:
    return Ended(folder, "cpu", 2, OF_TWO)  # they load what the four saved


@pytest.mark.parametrize("check", OF_FOUR)
def test_four_processes(check: str, four: Ended) -> None:
    four.assert_did(check)


@pytest.mark.parametrize("check", OF_TWO[:-1])
def test_two_processes(check: str, two: Ended) -> None:
    two.assert_did(check)


def test_a_process_that_is_killed_makes_the_other_raise(two: Ended) -> None:
    assert two.codes == [0, -9]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return Ended(tmp_path_factory.mktemp("gpu"), "cuda", 1, OF_ONE_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("check", OF_ONE_GPU)
def test_one_gpu(check: str, gpu: Ended) -> None:
    """With NCCL, which wants a GPU for each process: that every collective is one that it has."""
    gpu.assert_did(check)
