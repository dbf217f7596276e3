"""The losses of rows under test, each beside its oracle, and the arguments that they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import row_oracles as oracles
import torch
from cases import logits, uniform
from torch import Tensor

import bertloss_fast as bf

OF_ROWS = ("sample_weight", "normalizer")
OF_LABELS = (*OF_ROWS, "ignore_index")
OF_CLASSES = (*OF_LABELS, "weight", "label_smoothing")


def cut_rows(
    patch: pytest.MonkeyPatch, longest: int | None = None, tile: int | None = None, rows: int | None = None
) -> None:
    """How the kernels of one row and of two cut: the longest row in one piece, the tile of a longer one, and how many
    short rows share a tile; all less where more is kept of each logit."""
    from bertloss_fast.kernels import pairs, softmax

    plain = softmax._CUTS[1]
    wanted = {"longest": longest, "tile": tile, "rows": rows}
    scales = {name: value / getattr(plain, name) for name, value in wanted.items() if value is not None}
    cuts = {
        kept: cut._replace(**{name: int(scale * getattr(cut, name)) for name, scale in scales.items()})
        for kept, cut in softmax._CUTS.items()
    }
    patch.setattr(softmax, "_CUTS", cuts)
    for name, value in (("_LONGEST", longest), ("_TILE_OF_LONG", tile), ("_MOST_ROWS", rows)):
        if value is not None:
            patch.setattr(pairs, name, value)


class RowLoss(NamedTuple):
    """A public loss beside its oracle."""

    function: Callable[..., Any]
    oracle: oracles.Oracle
    takes: tuple[str, ...]
    second: Callable[[int, int, torch.device], tuple[Any, ...]]
    """What comes after the logits, of so many rows and classes."""
    options: dict[str, Any] | Callable[[int], dict[str, Any]] | None = None
    """The same for all, or made of the number of classes."""
    both: bool = False
    """Whether a gradient flows to the second argument too."""

    def options_of(self, classes: int) -> dict[str, Any]:
        return self.options(classes) if callable(self.options) else self.options or {}


def labels(rows: int, classes: int, device: torch.device) -> tuple[Tensor]:
    """The second row does not count; the last class and the first are there."""
    made = (uniform(rows, device=device, seed=5) * classes).long().clamp_max(classes - 1)
    made[0], made[-1] = classes - 1, 0
    if rows > 2:
        made[1] = -100
    return (made,)


def probabilities(rows: int, classes: int, device: torch.device) -> tuple[Tensor]:
    return (logits(rows, classes, device=device, seed=6).detach().softmax(-1),)


def other(rows: int, classes: int, device: torch.device) -> tuple[Tensor]:
    return (logits(rows, classes, device=device, seed=7).detach(),)


def other_and_labels(rows: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return *other(rows, classes, device), *labels(rows, classes, device)


def by_class(name: str) -> Callable[[int], dict[str, Any]]:
    return lambda classes: {name: torch.linspace(0.2, 3, classes, dtype=torch.float64)}


CE, FOCAL, POLY = bf.cross_entropy, bf.softmax_focal_loss, bf.poly_cross_entropy
CAPPED = {"z_loss": 0.1, "logit_softcap": 3.0}
ROW_LOSSES = {
    "ce": RowLoss(CE, oracles.cross_entropy, OF_CLASSES, labels),
    "ce-probabilities": RowLoss(
        CE, oracles.cross_entropy, (*OF_ROWS, "weight", "label_smoothing"), probabilities, both=True
    ),
    "ce-z": RowLoss(CE, oracles.cross_entropy, OF_CLASSES, labels, CAPPED),
    "ce-z-probabilities": RowLoss(CE, oracles.cross_entropy, OF_ROWS, probabilities, CAPPED),
    **{
        f"focal-{gamma}": RowLoss(FOCAL, oracles.softmax_focal, OF_CLASSES, labels, {"gamma": gamma})
        for gamma in (0.0, 0.5, 1.0, 2.0, 3.7)
    },
    "focal-alpha": RowLoss(FOCAL, oracles.softmax_focal, OF_CLASSES, labels, by_class("alpha")),
    "poly": RowLoss(POLY, oracles.poly, OF_CLASSES, labels),
    "poly-probabilities": RowLoss(
        POLY, oracles.poly, (*OF_ROWS, "weight", "label_smoothing"), probabilities, {"epsilon": -0.7}, both=True
    ),
    "ldam": RowLoss(
        bf.ldam_loss,
        oracles.ldam,
        OF_CLASSES,
        labels,
        lambda classes: {"counts": torch.arange(classes, 0, -1) ** 2, "scale": 3.0},
    ),
    "distillation": RowLoss(bf.distillation_loss, oracles.distillation, OF_LABELS, other_and_labels),
    "distillation-1": RowLoss(
        bf.distillation_loss, oracles.distillation, OF_LABELS, other_and_labels, {"temperature": 1.0, "alpha": 0.9}
    ),
    "distillation-alone": RowLoss(bf.distillation_loss, oracles.distillation, OF_ROWS, other, {"temperature": 3.0}),
    "r-drop": RowLoss(bf.r_drop_loss, oracles.r_drop, OF_LABELS, other_and_labels, {"alpha": 1.5}, both=True),
    "js": RowLoss(bf.js_div_loss, oracles.js, OF_ROWS, other, both=True),
    "margin-mse": RowLoss(bf.margin_mse_loss, oracles.margin_mse, OF_ROWS, other, both=True),
    "margin-mse-margins": RowLoss(
        bf.margin_mse_loss, oracles.margin_mse, OF_ROWS, lambda n, c, d: other(n, c - 1, d), both=True
    ),
}
