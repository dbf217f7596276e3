"""A limit on the time of a call that cannot be asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 2.0
"""Seconds from one raise to the next: Python drops what is raised in a finalizer, or while it collects garbage."""


@contextmanager
def capped(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; only in the main thread, and where signals have timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    expired = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError(_after(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    except Exception as error:
        if expired:  # torch.compile wraps what is raised inside it
            raise TimeoutError(_after(seconds)) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _after(seconds: float) -> str:
    return f"stopped after {seconds:g} s"
