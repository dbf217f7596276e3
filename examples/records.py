"""A file of finished trainings, which an interrupted comparison goes on from, and what their seeds spread over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs of the same command left, or a new record."""
    from experiment import OptionError

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"settings": settings, "runs": []}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"] != settings:
        raise OptionError(f"--out {path}: its trainings had other settings: {record['settings']}")
    return record


def save(path: Path, record: dict[str, Any]) -> None:
    """Written beside its place and then moved there: an interrupt leaves the earlier record whole."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def spreads(
    runs: Iterable[dict[str, Any]], key: str, names: Sequence[str], seeds: int, columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """For each name that has a run, `[3, columns]`: mean, lowest and highest over the seeds below `seeds`."""
    found = {}
    for name in names:
        figures = [run["figures"] for run in runs if run[key] == name and run["seed"] < seeds]
        if figures:
            values = np.array([[of_seed[column] for column in columns] for of_seed in figures], dtype=float)
            found[name] = np.stack([values.mean(0), values.min(0), values.max(0)])
    return found


def shown(spread: np.ndarray) -> str:
    mean, low, high = spread
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
