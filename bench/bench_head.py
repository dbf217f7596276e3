"""A linear layer and its loss in one: the cases, who computes them, and what we claim about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .bench_sigmoid import ALPHA, GAMMA, torchvision_focal
from .bench_sigmoid import oracle as sigmoid_oracle
from .cases import Case, MeanLoss, OfLayer, Provider, Targets
from .claims import Claim
from .providers import compiled, why_not_compile, why_not_triton

LOSSES = ("linear focal", "linear cross-entropy")


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Of the logits."""
    return sigmoid_oracle("focal", x, y) if loss == "linear focal" else F.cross_entropy(x, y, reduction="none")


def _ours(backend: str) -> dict[str, tuple[str, MeanLoss]]:
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
    return None if hasattr(F, "linear_cross_entropy") else "missing: this torch has no linear_cross_entropy"


_EAGER: dict[str, tuple[str, MeanLoss]] = {
    "linear focal": ("F.linear and torchvision's formula", _behind_linear(torchvision_focal)),
    "linear cross-entropy": ("F.linear and F.cross_entropy", _behind_linear(F.cross_entropy)),
}
PROVIDERS = (
    Provider("triton", _ours("triton"), why_not_triton, ours=True),
    Provider("eager", _ours("eager"), ours=True),
    Provider("pytorch", _EAGER),
    Provider(
        "compile",
        {name: (f"torch.compile of {label}", compiled(loss)) for name, (label, loss) in _EAGER.items()},
        why_not_compile,
    ),
    Provider("chunked", {"linear cross-entropy": ("F.linear_cross_entropy, in chunks", _chunked)}, _why_not_chunked),
)

_FP32, _BF16 = torch.float32, torch.bfloat16


def _focal(rows: int, labels: int, dtype: torch.dtype = _FP32, features: int = 384, suite: str = "head") -> Case:
    return Case(suite, "linear focal", (rows, labels), dtype, None, labels_per_row=5, features=features)


def _ce(rows: int, classes: int, dtype: torch.dtype = _FP32, features: int = 384, suite: str = "head") -> Case:
    shape = rows, classes
    return Case(suite, "linear cross-entropy", shape, dtype, torch.int64, targets="classes", features=features)


_XMC, _MLM = _focal(256, 131072), _ce(512, 30522)
_ALONE = replace(_XMC, pages="default")  # of tensors this large glibc, left alone, always does the same
_CPU_CASES = (
    _ALONE,
    _XMC,
    _MLM,
    *(replace(case, suite="memory") for case in (_XMC, _MLM)),
    *(_focal(rows, labels, features=64, suite="memory") for labels in (10**4, 10**5, 10**6) for rows in (64, 512)),
)
# The datasets of extreme classification with 670,091 and 2,812,281 labels, and a vocabulary, behind BERT-base.
_GPU_SHAPES = ((256, 131072), (256, 670091), (128, 2812281))
_GPU_CASES = tuple(
    case
    for suite in ("head", "memory")
    for case in (
        *(_focal(*shape, _BF16, 768, suite) for shape in _GPU_SHAPES),
        _ce(8192, 30522, _BF16, 768, suite),
    )
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_CPU_CLAIMS = (
    *(
        Claim("{}, times as fast as F.linear and torchvision's formula", case, "eager", "pytorch", at_least=2.5)
        for case in (_ALONE, _XMC)
    ),
    Claim(
        "{}, extra peak memory, of that of F.linear and torchvision's formula",
        replace(_XMC, suite="memory"),
        "eager",
        "pytorch",
        at_most=0.25,
    ),
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else ()
