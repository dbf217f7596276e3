"""A linear layer and its loss in one: the cases, who computes them, and what we claim about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .bench_sigmoid import ALPHA, GAMMA, formula_of_focal
from .bench_sigmoid import oracle as sigmoid_oracle
from .cases import ALONE, UNCOMPILED, Case, MeanLoss, Provider
from .claims import Claim
from .data import OfLayer, Targets
from .peers import library
from .providers import Losses, compiled, ours

LOSSES = ("linear focal", "linear cross-entropy")


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Of the logits."""
    return sigmoid_oracle("focal", x, y) if loss == "linear focal" else F.cross_entropy(x, y, reduction="none")


def _ours(backend: str) -> Losses:
    def focal(x: Tensor, y: Targets) -> Tensor:
        assert isinstance(y, OfLayer)
        return bertloss_fast.linear_sigmoid_focal_loss(
            x, y.weight, y.targets, alpha=ALPHA, gamma=GAMMA, reduction="mean", backend=backend
        )

    def ce(x: Tensor, y: Targets) -> Tensor:
        assert isinstance(y, OfLayer)
        return bertloss_fast.linear_cross_entropy(x, y.weight, y.targets, backend=backend)  # type: ignore[arg-type]

    return {name: (f"bertloss-fast, {backend}", f) for name, f in zip(LOSSES, (focal, ce), strict=True)}


def _behind_linear(loss: Callable[[Tensor, Tensor], Tensor]) -> MeanLoss:
    return lambda x, y: loss(F.linear(x, y.weight), y.targets)


def _chunked(x: Tensor, y: Targets) -> Tensor:
    assert isinstance(y, OfLayer)
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    loss: Tensor = F.linear_cross_entropy(x, y.weight, y.targets, options=options)  # type: ignore[attr-defined]
    return loss


def _why_not_chunked(device: torch.device) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "this torch has no linear_cross_entropy"


def _liger(x: Tensor, y: Targets) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    assert isinstance(y, OfLayer)
    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(y.weight, x, y.targets)
    return loss


_EAGER: Losses = {
    "linear focal": ("F.linear and torchvision's formula", _behind_linear(formula_of_focal)),
    "linear cross-entropy": ("F.linear and F.cross_entropy", _behind_linear(F.cross_entropy)),
}
PROVIDERS = (
    *ours(_ours),
    Provider("pytorch", _EAGER),
    compiled(_EAGER),
    Provider("chunked", {"linear cross-entropy": ("F.linear_cross_entropy, in chunks", _chunked)}, _why_not_chunked),
    library("liger", {"linear cross-entropy": ("Liger-Kernel", _liger)}, "liger_kernel.transformers", needs_gpu=True),
)

_FP32, _BF16 = torch.float32, torch.bfloat16


def _focal(rows: int, labels: int, dtype: torch.dtype = _FP32, features: int = 384, suite: str = "head") -> Case:
    return Case(suite, "linear focal", (rows, labels), dtype, None, labels_per_row=5, features=features)


def _ce(rows: int, classes: int, dtype: torch.dtype = _FP32, features: int = 384) -> Case:
    return Case(
        "head", "linear cross-entropy", (rows, classes), dtype, torch.int64, targets="classes", features=features
    )


# Of tensors this large glibc, left alone, always does the same.
_XMC, _MLM = _focal(256, 131072), _ce(512, 30522)
_XMC_KEPT = replace(_XMC, pages="kept", kinds=ALONE)
_XMC_MEMORY = replace(_XMC, suite="memory")
_CPU_CASES = (
    _XMC,
    _XMC_KEPT,
    _MLM,
    _XMC_MEMORY,
    replace(_MLM, suite="memory", kinds=UNCOMPILED),
    *(
        replace(_focal(rows, labels, features=64, suite="memory"), kinds=ALONE)
        for labels in (10**4, 10**5, 10**6)
        for rows in (64, 512)
    ),
)
# The datasets of extreme classification with 670,091 and 2,812,281 labels, and a vocabulary, behind BERT-base.
_GPU_SHAPES = ((256, 131072), (256, 670091), (128, 2812281))
_GPU_TIMED = (*(_focal(*shape, _BF16, 768) for shape in _GPU_SHAPES), _ce(8192, 30522, _BF16, 768))
_GPU_CASES = (*_GPU_TIMED, *(replace(case, suite="memory", kinds=UNCOMPILED) for case in _GPU_TIMED))


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_FASTER = "{}, times as fast as F.linear and torchvision's formula"
_CPU_CLAIMS = (
    Claim(_FASTER.format("{}, malloc as it is"), _XMC, "eager", "pytorch", at_least=2.5),
    Claim(_FASTER, _XMC_KEPT, "eager", "pytorch", at_least=2.5),
    Claim(
        "{}, extra peak memory, of that of F.linear and torchvision's formula",
        _XMC_MEMORY,
        "eager",
        "pytorch",
        at_most=0.25,
    ),
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else ()
