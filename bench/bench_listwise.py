"""The ranking family: its cases, who computes them, and what we claim about them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bertloss_fast

from .cases import ALONE, UNCOMPILED, Case, MeanLoss, Provider
from .claims import Claim
from .data import Targets
from .peers import library
from .providers import Losses, ours

LOSSES = ("LambdaLoss", "ADR-MSE")
_LISTS, _LISTS_OF_A_CPU = 64, 8
_MU, _EPS = 10.0, 1e-10


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Every list's share of the mean, all pairs of a list at a time. Scores are distinct, so that ranks are certain."""
    assert len(x) in (_LISTS, _LISTS_OF_A_CPU), "the count of the mean is that of all lists"
    losses, counts = zip(*(_of_list(loss, scores, labels) for scores, labels in zip(x, y, strict=True)), strict=True)
    return torch.stack(losses) * (len(x) / sum(counts))


def _of_list(loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """In the terms of the papers, and what the mean counts of it."""
    if loss == "ADR-MSE":
        return checkpoint(_adr_mse, x, y, use_reentrant=False), len(x)
    return checkpoint(_lambda_loss, x, y, use_reentrant=False), int((y.unsqueeze(1) > y).sum())


def _lambda_loss(x: Tensor, y: Tensor) -> Tensor:
    ranks = 1.0 + x.detach().argsort(descending=True).argsort()
    gains, positions = 2**y - 1, 1 + torch.arange(len(y), dtype=y.dtype, device=y.device)
    best = ((2 ** y.sort(descending=True).values - 1) / (1 + positions).log2()).sum().clamp_min(_EPS)
    gaps = (ranks.unsqueeze(1) - ranks).abs()
    of_gaps = torch.where(gaps > 0, 1 / (1 + gaps).clamp_min(1.5).log2() - 1 / (2 + gaps).log2(), 0.0)
    of_ranks = (1 / (1 + ranks.unsqueeze(1)).log2() - 1 / (1 + ranks).log2()).abs()
    weights = (_MU * of_gaps + of_ranks) * (gains.unsqueeze(1) - gains).abs() / best
    losses = -weights * F.logsigmoid(x.unsqueeze(1) - x) / math.log(2)
    return torch.where(y.unsqueeze(1) > y, losses, 0.0).sum()


def _adr_mse(x: Tensor, y: Tensor) -> Tensor:
    higher, equal = (y > y.unsqueeze(1)).sum(1), (y == y.unsqueeze(1)).sum(1)
    ranks = higher + (equal + 1) / 2
    approximate = 0.5 + torch.sigmoid(x - x.unsqueeze(1)).sum(1)
    return ((ranks - approximate) ** 2 / (1 + ranks).log2()).sum()


def _ours(backend: str) -> Losses:
    def lambda_loss(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.lambda_loss(x, y, backend=backend)  # type: ignore[arg-type]

    def adr_mse(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.adr_mse_loss(x, y, backend=backend)  # type: ignore[arg-type]

    label = f"bertloss-fast, {backend}"
    return {"LambdaLoss": (label, lambda_loss), "ADR-MSE": (label, adr_mse)}


class _GivenScores(nn.Module):
    """Stands for a cross-encoder, whose scores are given."""

    num_labels = 1

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.empty(0)

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def preprocess(self, pairs: list[Any], **options: Any) -> dict[str, Tensor]:
        return {}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.scores.reshape(-1)}


def _theirs(name: str) -> MeanLoss:
    @cache
    def made() -> tuple[_GivenScores, Any]:
        from sentence_transformers.cross_encoder import losses

        model = _GivenScores()
        return model, getattr(losses, name)(model, mini_batch_size=-1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        model, criterion = made()
        model.scores = x
        texts = [[""] * len(x), [[""] * x.shape[1]] * len(x)]
        value: Tensor = criterion(texts, list(y))
        return value

    return loss


PROVIDERS: tuple[Provider, ...] = (
    *(p for p in ours(_ours) if p.name != "inductor"),  # which makes tensors of pairs
    library(
        "sentence-transformers",
        {
            "LambdaLoss": ("sentence-transformers", _theirs("LambdaLoss")),
            "ADR-MSE": ("sentence-transformers", _theirs("ADRMSELoss")),
        },
        "sentence_transformers",
    ),
)


def _case(loss: str, documents: int, targets: str = "graded", kinds: tuple[str, ...] = UNCOMPILED) -> Case:
    return Case("listwise", loss, (_LISTS, documents), torch.float32, torch.int64, targets=targets, kinds=kinds)


_SHORT = [_case("LambdaLoss", 200, targets) for targets in ("relevant", "graded")]
_LONG = [_case("LambdaLoss", 1000, targets) for targets in ("relevant", "graded")]
_CASES = (*_SHORT, *_LONG, _case("ADR-MSE", 200))
_LONGEST = _case("LambdaLoss", 4096, kinds=ALONE)


def _on(device: torch.device, case: Case) -> Case:
    return replace(case, pages="kept") if device.type == "cpu" else case


def cases(device: torch.device) -> tuple[Case, ...]:
    # A CPU's check of 64 such lists, pair by pair in float64, would take two minutes.
    longest = replace(_LONGEST, shape=(_LISTS_OF_A_CPU, _LONGEST.shape[1])) if device.type == "cpu" else _LONGEST
    return tuple(dict.fromkeys((*_LONG, *(_on(device, case) for case in (*_CASES, longest)))))


_SPEED = "times as fast as sentence-transformers"


def claims(device: torch.device) -> tuple[Claim, ...]:
    provider = "eager" if device.type == "cpu" else "triton"
    bounds = {_on(device, case): 3.0 for case in _SHORT} | dict.fromkeys(_LONG, 8.0)
    bounds |= {_on(device, case): 8.0 for case in _LONG}
    as_it_is = {case: ", malloc as it is" for case in _LONG if device.type == "cpu"}
    return tuple(
        Claim(f"{{}}{as_it_is.get(case, '')}, {_SPEED}", case, provider, "sentence-transformers", at_least=bound)
        for case, bound in bounds.items()
    )
