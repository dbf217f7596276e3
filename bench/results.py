"""A run as it is kept: a JSON file in bench/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bertloss_fast
from bertloss_fast.ops import dispatch

from .cases import Row


@dataclass
class Results:
    """The rows of a run, the verdicts on our claims, and what the figures depend on."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        device = re.sub(r"[^a-z0-9]+", "-", self.environment["name"].lower()).strip("-")
        return f"{device}-{self.environment['date']}"

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}.json"
        content = {
            "environment": self.environment,
            "claims": self.claims,
            "rows": [row.to_json() for row in self.rows],
        }
        new = path.with_suffix(".part")  # a run that is killed meanwhile leaves what was there
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """
        Raises:
            OSError, ValueError: if it cannot be read, or is not what :meth:`save` writes.
        """
        try:
            content = json.loads(path.read_text())
            return cls(dict(content["environment"]), list(map(Row.from_json, content["rows"])), content["claims"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected a file that python -m bench has written, got {error!r}") from error


def environment(device: torch.device, quick: bool) -> dict[str, Any]:
    """What the figures depend on; nothing that names a host, a user or a path."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": datetime.date.today().isoformat(),
        "bertloss_fast": bertloss_fast.__version__,
        "torch": torch.__version__,
        "triton": None if dispatch.TRITON_ERROR else metadata.version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "quick": quick,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.machine()
