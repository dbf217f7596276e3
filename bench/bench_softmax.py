"""The single-label family: its cases, who computes them, and what we claim about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .cases import ALONE, EVERYONE, NO_LIBRARY, UNCOMPILED, Case, Provider
from .claims import Claim
from .data import Targets
from .measure import COPY
from .peers import library
from .providers import Losses, compiled, ours

LOSSES = ("cross-entropy", "softmax focal", "distillation")
GAMMA, TEMPERATURE = 2.0, 2.0
UPSTREAM = 1 / 3


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Every row's loss in float64, from torch's own functions and none of our algebra."""
    if loss == "distillation":
        p, log_p = (y / TEMPERATURE).softmax(-1), (x / TEMPERATURE).log_softmax(-1)
        return TEMPERATURE**2 * F.kl_div(log_p, p, reduction="none").sum(-1)
    # The log odds of all other classes: log_softmax has no digits of a row that is sure from a margin of 37 on.
    target = F.one_hot(y, x.shape[1]).bool()
    against = (x.masked_fill(target, -torch.inf) - x.gather(1, y[:, None])).logsumexp(1)
    nll = F.softplus(against)
    return nll if loss == "cross-entropy" else torch.sigmoid(against).pow(GAMMA) * nll


def _ours(backend: str) -> Losses:
    def ce(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.cross_entropy(x, y, backend=backend)  # type: ignore[arg-type, return-value]

    def focal(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.softmax_focal_loss(x, y, GAMMA, backend=backend)  # type: ignore[arg-type]

    def distillation(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.distillation_loss(x, y, temperature=TEMPERATURE, backend=backend)  # type: ignore[arg-type]

    return {name: (f"bertloss-fast, {backend}", f) for name, f in zip(LOSSES, (ce, focal, distillation), strict=True)}


def formula_of_focal(x: Tensor, y: Tensor) -> Tensor:
    """As focal losses for single labels are written."""
    nll = F.cross_entropy(x, y, reduction="none")
    return ((1 - torch.exp(-nll)) ** GAMMA * nll).mean()


def formula_of_distillation(x: Tensor, y: Tensor) -> Tensor:
    """As PyTorch's tutorial and most training scripts have it."""
    log_p = F.log_softmax(x / TEMPERATURE, -1)
    return F.kl_div(log_p, F.softmax(y / TEMPERATURE, -1), reduction="batchmean") * TEMPERATURE**2


def _liger(x: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    # It writes the gradient over its input.
    loss: Tensor = LigerCrossEntropyLoss()(1 * x, y)
    return loss


def _kornia_focal(x: Tensor, y: Tensor) -> Tensor:
    """Its mean is over rows and classes."""
    from kornia.losses import focal_loss

    return focal_loss(x, y, None, GAMMA, "mean", ignore_index=None) * x.shape[1]


def _monai_focal(x: Tensor, y: Tensor) -> Tensor:
    """Its mean is over rows and classes, and its classes are one-hot."""
    from monai.losses import FocalLoss

    loss: Tensor = FocalLoss(to_onehot_y=True, gamma=GAMMA, use_softmax=True)(x, y[:, None]) * x.shape[1]
    return loss


_EAGER: Losses = {
    "cross-entropy": ("F.cross_entropy", F.cross_entropy),
    "softmax focal": ("the formula in PyTorch", formula_of_focal),
    "distillation": ("the formula in PyTorch", formula_of_distillation),
}
PROVIDERS = (
    *ours(_ours),
    Provider("pytorch", _EAGER),
    compiled(_EAGER),
    library("kornia", {"softmax focal": ("kornia", _kornia_focal)}, "kornia.losses"),
    library("monai", {"softmax focal": ("MONAI", _monai_focal)}, "monai.losses"),
    library("liger", {"cross-entropy": ("Liger-Kernel", _liger)}, "liger_kernel.transformers", needs_gpu=True),
)

_FP32, _BF16, _INT64 = torch.float32, torch.bfloat16, torch.int64


def _case(loss: str, shape: tuple[int, int], dtype: torch.dtype, suite: str = "softmax", **others: Any) -> Case:
    if loss == "distillation":
        return Case(suite, loss, shape, dtype, dtype, targets="teacher", **others)
    return Case(suite, loss, shape, dtype, _INT64, targets="classes", **others)


def _kept(loss: str, shape: tuple[int, int], dtype: torch.dtype = _FP32, **others: Any) -> Case:
    return _case(loss, shape, dtype, pages="kept", **({"kinds": ALONE} | others))


_CE, _FOCAL, _DISTILLATION = LOSSES
_SMALL = (32, 20)
_MLM = (128, 30522)
_MLM_CE = _kept(_CE, _MLM, kinds=EVERYONE)
# About four million logits, from two classes to a million.
_CPU_SHAPES = ((1 << 21, 2), (1 << 18, 20), (4096, 1000), (32, 131072), (4, 1000003))
_SMALL_CE = _case(_CE, _SMALL, _FP32, "small", kinds=NO_LIBRARY)
_CPU_CASES = (
    _MLM_CE,
    _SMALL_CE,
    *(_kept(_CE, shape) for shape in _CPU_SHAPES),
    _kept(_CE, _MLM, _BF16),
    _kept(_CE, _MLM, backward=False),
    *(_kept(_FOCAL, shape) for shape in ((1 << 18, 20), (4096, 1000))),
    _kept(_FOCAL, _MLM, kinds=EVERYONE),
    _kept(_FOCAL, _MLM, _BF16),
    _kept(_DISTILLATION, (4096, 1000)),
    _kept(_DISTILLATION, _MLM),
    *(_case(loss, _SMALL, _FP32, "small", kinds=ALONE) for loss in (_FOCAL, _DISTILLATION)),
    *(_case(loss, _MLM, _FP32, "memory", kinds=NO_LIBRARY if loss == _CE else ALONE) for loss in LOSSES),
)
# At least 2^28 logits, whatever the number of classes.
_GPU_SHAPES = {C: (-(-(1 << 28) // C), C) for C in (2, 20, 1000, 4096, 30522, 32768, 131072, 1000003)}
_GPU_CE = {
    C: _case(_CE, shape, _BF16, kinds=EVERYONE if C in (1000, 30522, 131072) else UNCOMPILED)
    for C, shape in _GPU_SHAPES.items()
}
_GPU_SCALED = {C: replace(_GPU_CE[C], upstream=UPSTREAM, kinds=UNCOMPILED) for C in (30522, 32768, 131072)}
_GPU_CASES = (
    *_GPU_CE.values(),
    *_GPU_SCALED.values(),
    *(_case(_FOCAL, _GPU_SHAPES[C], _BF16) for C in (1000, 30522, 131072)),
    *(_case(_DISTILLATION, _GPU_SHAPES[C], _BF16) for C in (1000, 30522)),
    *(_case(loss, _SMALL, _FP32, "small") for loss in LOSSES),
    *(_case(loss, _GPU_SHAPES[30522], _BF16, "memory") for loss in LOSSES),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_COPY_SHARE = "{}, share of a copy's bandwidth at 4 bytes an element"
_LIGER = "{}, times as fast as Liger-Kernel"
_GPU_CLAIMS = (
    *(Claim(_COPY_SHARE, _GPU_CE[C], "triton", COPY, at_least=0.85) for C in (4096, 30522, 32768)),
    Claim(_COPY_SHARE, _GPU_CE[131072], "triton", COPY, at_least=0.6),
    Claim(_LIGER, _GPU_CE[30522], "triton", "liger", at_least=1),
    Claim(_LIGER, _GPU_SCALED[30522], "triton", "liger", at_least=1.5),
)
_CPU_CLAIMS = tuple(
    Claim("{}, times the time of F.cross_entropy", case, "eager", "pytorch", at_most=bound)
    for case, bound in ((_MLM_CE, 1.1), (_SMALL_CE, 1.5))
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else _GPU_CLAIMS
