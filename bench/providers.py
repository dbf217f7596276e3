"""What the families' tables of providers share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache, partial

import torch

from bertloss_fast.ops import dispatch

from .cases import COMPILED, PLAIN, MeanLoss, Provider

INDUCTOR = "torch._inductor.compile_fx"
Losses = dict[str, tuple[str, MeanLoss]]


def ours(losses: Callable[[str], Losses]) -> tuple[Provider, ...]:
    """A provider for each of our backends, of the losses as a backend has them."""
    return tuple(
        Provider(backend, losses(backend), partial(_why_not_ours, backend), True, kind, sparse=True, imports=imports)
        for backend, kind, imports in (("triton", PLAIN, ""), ("eager", PLAIN, ""), ("inductor", COMPILED, INDUCTOR))
    )


def twins(providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
    """The same losses once more in cases of SparseLabels, given the same labels as a dense tensor."""
    return tuple(p._replace(name=f"{p.name}, dense", sparse=False, twin=True) for p in providers if p.kind == PLAIN)


def compiled(losses: Losses) -> Provider:
    """torch.compile of each."""
    return Provider(
        "compile",
        {name: (f"torch.compile of {label}", _compiled(loss)) for name, (label, loss) in losses.items()},
        _why_not_compile,
        kind=COMPILED,
        imports=INDUCTOR,
    )


def at_first_call(make: Callable[[], MeanLoss]) -> MeanLoss:
    """The loss that is made when it is asked for: who asks for another does not wait for it, nor for its error."""
    made = cache(make)
    return lambda x, y: made()(x, y)


def _compiled(loss: MeanLoss) -> MeanLoss:
    # fullgraph: fail rather than run eagerly. The import alone takes seconds.
    return at_first_call(lambda: torch.compile(loss, dynamic=False, fullgraph=True))


def _why_not_ours(backend: str, device: torch.device) -> str | None:
    if backend not in dispatch.BACKENDS:
        return "this version has no such backend"
    if backend == "triton" and device.type == "cpu":
        return "interpreter only: not timed"
    return dispatch.why_not(backend, device)


def _why_not_compile(device: torch.device) -> str | None:
    compilers = (os.environ.get("CXX", "g++"), "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    return None if any(map(shutil.which, compilers)) else "torch.compile finds no C++ compiler"
