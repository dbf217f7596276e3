"""The multi-label family: its cases, who computes them, and what we claim about them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .cases import Case, MeanLoss, Provider, Targets
from .claims import Claim
from .measure import COPY
from .providers import compiled, why_not_compile, why_not_triton

LOSSES = ("focal", "bce")
ALPHA, GAMMA = 0.25, 2.0
# Neither a power of two nor small: what gradient accumulation over three batches passes back.
UPSTREAM = 1 / 3


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Every element's loss in float64, from torch's own logsigmoid and none of our algebra."""
    ce = -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    if loss == "bce":
        return ce
    wrong = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)
    return (ALPHA * y + (1 - ALPHA) * (1 - y)) * wrong**GAMMA * ce


def _ours(backend: str) -> dict[str, tuple[str, MeanLoss]]:
    def focal(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.sigmoid_focal_loss(x, y, ALPHA, GAMMA, "mean", backend=backend)

    def bce(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.binary_cross_entropy_with_logits(x, y, backend=backend)

    return {"focal": (f"bertloss-fast, {backend}", focal), "bce": (f"bertloss-fast, {backend}", bce)}


def torchvision_focal(x: Tensor, y: Tensor) -> Tensor:
    """The operations of torchvision.ops.sigmoid_focal_loss, and the conversion of integer targets that they need."""
    y = y.to(x.dtype)
    probability = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    p_t = probability * y + (1 - probability) * (1 - y)
    alpha_t = ALPHA * y + (1 - ALPHA) * (1 - y)
    return (alpha_t * (ce * (1 - p_t) ** GAMMA)).mean()


def torch_bce(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y.to(x.dtype))


PROVIDERS = (
    Provider("triton", _ours("triton"), why_not_triton, ours=True),
    Provider("eager", _ours("eager"), ours=True),
    Provider(
        "pytorch",
        {
            "focal": ("torchvision's formula", torchvision_focal),
            "bce": ("F.binary_cross_entropy_with_logits", torch_bce),
        },
    ),
    Provider(
        "compile",
        {
            "focal": ("torch.compile of torchvision's formula", compiled(torchvision_focal)),
            "bce": ("torch.compile of F.binary_cross_entropy_with_logits", compiled(torch_bce)),
        },
        why_not_compile,
    ),
)

_FP32, _BF16, _UINT8 = torch.float32, torch.bfloat16, torch.uint8
_WIDE, _SMALL = (256, 20000), (32, 100)
_FOCAL_FP32 = Case("sigmoid", "focal", _WIDE, _FP32, _FP32)
_FOCAL_BF16 = Case("sigmoid", "focal", _WIDE, _BF16, _BF16)
_FRESH_FP32 = replace(_FOCAL_FP32, pages="fresh")
_FRESH_BF16 = replace(_FOCAL_BF16, pages="fresh")
_SMALL_FOCAL = Case("small", "focal", _SMALL, _FP32, _FP32)
_SMALL_BCE = Case("small", "bce", _SMALL, _FP32, _FP32)
_MEMORY_FP32 = Case("memory", "focal", _WIDE, _FP32, _FP32)
_MEMORY_BF16 = Case("memory", "focal", _WIDE, _BF16, _BF16)
# Five labels a row, as in extreme classification: dense targets beside SparseLabels.
_MEMORY_SPARSE = Case("memory", "focal", (512, 100000), _BF16, None, labels_per_row=5)
_GPU_SPARSE = Case("sigmoid", "focal", (4096, 131072), _BF16, None, labels_per_row=5)

_CPU_CASES = (
    _FOCAL_FP32,
    _FRESH_FP32,
    _FOCAL_BF16,
    _FRESH_BF16,
    Case("sigmoid", "focal", _WIDE, _FP32, _UINT8),
    Case("sigmoid", "focal", _WIDE, _BF16, _UINT8),
    Case("sigmoid", "focal", _WIDE, _FP32, _FP32, UPSTREAM),
    Case("sigmoid", "bce", _WIDE, _FP32, _FP32),
    *(
        Case("sigmoid", "focal", _WIDE, dtype, targets, labels_per_row=5)
        for dtype in (_FP32, _BF16)
        for targets in (_UINT8, dtype, None)
    ),
    _SMALL_FOCAL,
    Case("small", "focal", _SMALL, _FP32, _FP32, UPSTREAM),
    _SMALL_BCE,
    _MEMORY_FP32,
    _MEMORY_BF16,
    Case("memory", "bce", _WIDE, _FP32, _FP32),
    _MEMORY_SPARSE,
)
# A classifier's head, a long-tailed one, and one with more labels than a token vocabulary; bf16 with bytes is the
# floor's best case, fp32 with floats what most training scripts hand over.
_GPU_CASES = (
    Case("sigmoid", "focal", (4096, 1000), _BF16, _UINT8),
    Case("sigmoid", "focal", (4096, 1000), _FP32, _FP32),
    Case("sigmoid", "focal", (1024, 100000), _BF16, _UINT8),
    Case("sigmoid", "focal", (1024, 100000), _BF16, _UINT8, UPSTREAM),
    Case("sigmoid", "focal", (1024, 100000), _FP32, _FP32),
    Case("sigmoid", "bce", (1024, 100000), _BF16, _UINT8),
    Case("sigmoid", "focal", (4096, 131072), _BF16, _UINT8),
    replace(_GPU_SPARSE, target_dtype=_UINT8),
    _GPU_SPARSE,
    _SMALL_FOCAL,
    Case("small", "focal", _SMALL, _FP32, _FP32, UPSTREAM),
    _SMALL_BCE,
    Case("memory", "focal", (4096, 131072), _BF16, _UINT8),
    Case("memory", "bce", (4096, 131072), _BF16, _UINT8),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_SPEED = "{}, times as fast as torchvision's formula"
_MEMORY = "{}, extra peak memory in logits tensors"
_OVERHEAD = "{}, extra peak memory beyond one gradient, MiB"
_CPU_CLAIMS = (
    *(Claim(_SPEED, case, "eager", "pytorch", at_least=4) for case in (_FOCAL_FP32, _FRESH_FP32)),
    *(Claim(_SPEED, case, "eager", "pytorch", at_least=2.5) for case in (_FOCAL_BF16, _FRESH_BF16)),
    *(Claim(_MEMORY, case, "eager", at_most=2) for case in (_MEMORY_FP32, _MEMORY_BF16)),
    Claim(_OVERHEAD, _MEMORY_SPARSE, "eager", at_most=64, over_gradient=True),
    Claim("{}, times the time of F.binary_cross_entropy_with_logits", _SMALL_BCE, "eager", "pytorch", at_most=1.5),
    Claim(_SPEED, _SMALL_FOCAL, "eager", "pytorch", at_least=1),
)
_GPU_CLAIMS = (
    Claim("{}, share of a copy's bandwidth at 4 bytes an element", _GPU_SPARSE, "triton", COPY, at_least=0.8),
    Claim(
        "{}, times as fast as torch.compile of torchvision's formula", _GPU_SPARSE, "triton", "compile", at_least=2.5
    ),
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else _GPU_CLAIMS
