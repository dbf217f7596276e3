"""transformers' Trainer, ended by the clock."""

from __future__ import annotations

import time
from typing import Any

import transformers

WARMUP = 0.1
"""Share of the training in which the learning rate rises."""


class FollowsTheClock(transformers.TrainerCallback):
    """Ends a training when its seconds are over; the learning rate rises and falls with them, and not with steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started, self.steps = seconds, time.monotonic(), 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.monotonic()

    def progress(self) -> float:
        return min((time.monotonic() - self.started) / self.seconds, 1.0)

    def factor(self, step: int) -> float:
        """Of the learning rate, now."""
        return min(self.progress() / WARMUP, 1.0) * (1 - self.progress())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = state.global_step
        control.should_training_stop = self.progress() >= 1
