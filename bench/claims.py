"""Figures that we stand by, each held against the rows of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cases import Case, Row


@dataclass(frozen=True)
class Claim:
    """A bound on a provider's speed, time or memory relative to a peer's; without one, on memory in logits tensors.

    ``at_least`` bounds how many times as fast as the peer it is, ``at_most`` how many times the peer's time, or memory,
    it takes.
    With ``over_gradient`` memory is what comes on top of one gradient of the logits, in MiB.
    """

    text: str
    case: Case
    provider: str
    peer: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    over_gradient: bool = False

    def measured(self, rows: Iterable[Row]) -> float | None:
        """The figure of a run; None where the run does not hold it."""
        found = {row.provider: row for row in rows if row.case == self.case}
        own = found.get(self.provider)
        if own is None:
            return None
        if self.peer is None:
            return None if own.peak_bytes is None else self._memory(own.peak_bytes)
        peer = found.get(self.peer)
        if own.peak_bytes is not None and peer is not None and peer.peak_bytes is not None:
            return own.peak_bytes / peer.peak_bytes
        if own.seconds is None or peer is None or peer.seconds is None:
            return None
        time = own.seconds.median / peer.seconds.median
        return time if self.at_least is None else 1 / time

    def _memory(self, peak_bytes: int) -> float:
        if self.over_gradient:
            return (peak_bytes - self.case.logits_bytes) / 2**20
        return peak_bytes / self.case.logits_bytes

    def verdict(self, rows: Iterable[Row]) -> dict[str, Any] | None:
        """What the report says about it; None where the run does not hold it."""
        measured = self.measured(rows)
        if measured is None:
            return None
        low, high = self.at_least or 0.0, self.at_most or math.inf
        bound = f"at least {low:g}" if self.at_most is None else f"at most {high:g}"
        met = low <= measured <= high
        return {
            "claim": f"{self.provider}: {self.text.format(self.case.title)}",
            "measured": round(measured, 3),
            "bound": bound,
            "met": met,
        }
