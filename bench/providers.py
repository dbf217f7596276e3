"""What the families' tables of providers share."""

from __future__ import annotations

import os
import shutil
from functools import cache

import torch

from bertloss_fast.ops import dispatch

from .cases import MeanLoss


def compiled(loss: MeanLoss) -> MeanLoss:
    """torch.compile of a loss, at its first call: the import alone takes seconds."""

    @cache
    def first_call() -> MeanLoss:
        return torch.compile(loss, dynamic=False, fullgraph=True)  # fullgraph: fail rather than run eagerly

    return lambda x, y: first_call()(x, y)


def why_not_triton(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "interpreter only: not timed"
    return dispatch.why_not("triton", device)


def why_not_compile(device: torch.device) -> str | None:
    compilers = (os.environ.get("CXX", "g++"), "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    return None if any(map(shutil.which, compilers)) else "missing: torch.compile finds no C++ compiler"
