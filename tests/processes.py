"""Groups of gloo: two processes that train together, how a test starts them and how they begin, and a group of one.

A DistributedDataParallel that is the last to let go of its group may wait for ever (torch 2.13): it joins the group's
threads while it holds Python's lock, for which one of them waits. So none outlives its group here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")

PROCESSES = 2


def outputs_of(program: str, folder: Path) -> list[str]:
    """What each of the processes of a program beside this file said when all were over."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    files = [folder / f"output of {rank}" for rank in range(PROCESSES)]
    processes = []
    for rank, file in enumerate(files):
        with file.open("w") as output:
            command = [sys.executable, str(root / "tests" / program), str(rank), str(folder)]
            environment = os.environ | {"PYTHONPATH": path}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 300
    try:
        for process in processes:
            process.wait(deadline - time.monotonic())
    finally:
        for process in processes:
            process.kill()
    return [file.read_text() for file in files]


def do_each(names: Iterable[str], check: Callable[[str, Path], None]) -> None:
    """In a process that was given RANK FOLDER: checks in turn, and the name of each that is passed."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    world = str(PROCESSES)
    os.environ |= {"WORLD_SIZE": world, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "localhost"}  # accelerate wants it, and finds the group that is here already
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    try:
        for name in names:
            check(name, folder)
            print(name, flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def data_parallel_alone(model: nn.Module, folder: Path, run: Callable[[nn.Module], T]) -> T:
    """What ``run`` makes of a model that is wrapped in a group of this process alone."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        return run(nn.parallel.DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()
