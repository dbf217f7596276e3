"""The examples as a user starts them: each in a process of its own, and no wait for one without an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

PATIENCE = 240
"""Seconds for each wait. The slowest example takes 20 on two idle cores; a busy machine has needed 60."""


class Ended(NamedTuple):
    status: int
    output: str
    errors: str


class Program:
    """Writes to files, since a pipe that nobody empties fills and stops it. One that does not do what a test waits for
    is killed, and each of its threads says where it stood.

    It computes as a user's does, compiled or on the CPU, not in the interpreter that the other tests use.
    """

    def __init__(self, script: Path, *arguments: str, folder: Path) -> None:
        self._files = [folder / name for name in ("output.txt", "errors.txt")]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with self._files[0].open("w") as output, self._files[1].open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(script), *arguments],
                env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_for(self, beginning: str) -> None:
        """Until it prints a line that begins so, or draws such a bar."""
        deadline = time.monotonic() + PATIENCE
        while not any(line.startswith(beginning) for text in self._text() for line in text.splitlines()):
            if self._process.poll() is not None:
                self._fail(f"ended before it printed {beginning!r}")
            if time.monotonic() > deadline:
                self._fail(f"did not print {beginning!r} in {PATIENCE} s")
            time.sleep(0.05)

    def press_ctrl_c(self) -> None:
        """As a terminal does, for it and all its children."""
        os.killpg(self._process.pid, signal.SIGINT)

    def wait(self) -> Ended:
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._fail(f"did not end in {PATIENCE} s")
        return Ended(status, *self._text())

    def _fail(self, reason: str) -> NoReturn:
        self._process.send_signal(signal.SIGABRT)
        self._process.wait()
        pytest.fail("\n".join([f"the program {reason}", *self._text()]))

    def _text(self) -> list[str]:
        return [file.read_text(encoding="utf-8", errors="replace") for file in self._files]


def run(script: Path, *arguments: str, folder: Path) -> Ended:
    with Program(script, *arguments, folder=folder) as program:
        return program.wait()
