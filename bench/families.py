"""The families of losses: each file has its cases, who computes them, and what we claim about them."""

from __future__ import annotations

from types import ModuleType

import torch

from . import bench_head, bench_sigmoid, bench_softmax
from .cases import Case
from .claims import Claim

FAMILIES = (bench_sigmoid, bench_softmax, bench_head)


def family_of(case: Case) -> ModuleType:
    return next(family for family in FAMILIES if case.loss in family.LOSSES)


def cases(device: torch.device) -> list[Case]:
    return [case for family in FAMILIES for case in family.cases(device)]


def claims(device: torch.device) -> list[Claim]:
    return [claim for family in FAMILIES for claim in family.claims(device)]
