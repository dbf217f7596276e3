"""The families of losses: each file has its cases, who computes them, and what we claim about them."""

from __future__ import annotations

from types import ModuleType

import torch

from . import bench_head, bench_listwise, bench_sigmoid, bench_softmax
from .cases import Case, Provider
from .claims import Claim

FAMILIES = (bench_sigmoid, bench_softmax, bench_listwise, bench_head)


def family_of(case: Case) -> ModuleType:
    return next(family for family in FAMILIES if case.loss in family.LOSSES)


def cases(device: torch.device) -> list[Case]:
    return [case for family in FAMILIES for case in family.cases(device)]


def claims(device: torch.device) -> list[Claim]:
    return [claim for family in FAMILIES for claim in family.claims(device)]


def peers() -> list[str]:
    """The names of all who are not ours, as a command line has them."""
    return list(dict.fromkeys(p.name for family in FAMILIES for p in family.PROVIDERS if not p.ours))


def providers(case: Case, left_out: frozenset[str] = frozenset()) -> list[Provider]:
    """Who can compute a case's loss, without those whose name or kind is left out."""
    return [p for p in family_of(case).PROVIDERS if not left_out & {p.name, p.kind}]


def imports(left_out: frozenset[str] = frozenset()) -> list[str]:
    """The modules that are slow to import, of all who take part."""
    taking_part = (p for family in FAMILIES for p in family.PROVIDERS if not left_out & {p.name, p.kind})
    return sorted({p.imports for p in taking_part if p.imports})
