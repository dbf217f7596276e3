"""The single-label family: its cases, who computes them, and what we claim about them."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .cases import Case, MeanLoss, Provider, Targets
from .claims import Claim
from .measure import COPY
from .providers import compiled, why_not_compile, why_not_triton

LOSSES = ("cross-entropy", "softmax focal", "distillation")
GAMMA, TEMPERATURE = 2.0, 2.0
UPSTREAM = 1 / 3


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Every row's loss in float64, from torch's own log_softmax and none of our algebra."""
    if loss == "distillation":
        p, log_p = (y / TEMPERATURE).softmax(-1), (x / TEMPERATURE).log_softmax(-1)
        return TEMPERATURE**2 * F.kl_div(log_p, p, reduction="none").sum(-1)
    nll = F.cross_entropy(x, y, reduction="none")
    return nll if loss == "cross-entropy" else (-torch.expm1(-nll)).pow(GAMMA) * nll


def _ours(backend: str) -> dict[str, tuple[str, MeanLoss]]:
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
    from liger_kernel.transformers import LigerCrossEntropyLoss  # type: ignore[import-not-found]

    # It writes the gradient over its input.
    loss: Tensor = LigerCrossEntropyLoss()(1 * x, y)
    return loss


def _why_not_liger(device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "missing: liger-kernel is not installed"
    return "needs a GPU" if device.type == "cpu" else None


_EAGER: dict[str, tuple[str, MeanLoss]] = {
    "cross-entropy": ("F.cross_entropy", F.cross_entropy),
    "softmax focal": ("the formula in PyTorch", formula_of_focal),
    "distillation": ("the formula in PyTorch", formula_of_distillation),
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
    Provider("liger", {"cross-entropy": ("Liger-Kernel", _liger)}, _why_not_liger),
)

_FP32, _BF16, _INT64 = torch.float32, torch.bfloat16, torch.int64


def _case(loss: str, shape: tuple[int, int], dtype: torch.dtype, suite: str = "softmax", upstream: float = 1.0) -> Case:
    if loss == "distillation":
        return Case(suite, loss, shape, dtype, dtype, upstream, targets="teacher")
    return Case(suite, loss, shape, dtype, _INT64, upstream, targets="classes")


_CE, _FOCAL, _DISTILLATION = LOSSES
_SMALL = (32, 20)
_MLM = (128, 30522)
# About four million logits, from two classes to a million.
_CPU_SHAPES = ((1 << 21, 2), (1 << 18, 20), (4096, 1000), _MLM, (32, 131072), (4, 1000003))
_CPU_CASES = (
    *(_case(_CE, shape, _FP32) for shape in _CPU_SHAPES),
    _case(_CE, _MLM, _BF16),
    *(_case(_FOCAL, shape, _FP32) for shape in ((1 << 18, 20), (4096, 1000), _MLM)),
    _case(_FOCAL, _MLM, _BF16),
    _case(_DISTILLATION, (4096, 1000), _FP32),
    _case(_DISTILLATION, _MLM, _FP32),
    *(_case(loss, _SMALL, _FP32, "small") for loss in LOSSES),
    *(_case(loss, _MLM, _FP32, "memory") for loss in LOSSES),
)
# At least 2^28 logits, whatever the number of classes.
_GPU_SHAPES = {C: (-(-(1 << 28) // C), C) for C in (2, 20, 1000, 4096, 30522, 32768, 131072, 1000003)}
_GPU_CASES = (
    *(_case(_CE, shape, _BF16) for shape in _GPU_SHAPES.values()),
    *(_case(_CE, _GPU_SHAPES[C], _BF16, upstream=UPSTREAM) for C in (30522, 32768, 131072)),
    *(_case(_FOCAL, _GPU_SHAPES[C], _BF16) for C in (1000, 30522, 131072)),
    *(_case(_DISTILLATION, _GPU_SHAPES[C], _BF16) for C in (1000, 30522)),
    *(_case(loss, _SMALL, _FP32, "small") for loss in LOSSES),
    *(_case(loss, _GPU_SHAPES[30522], _BF16, "memory") for loss in LOSSES),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_COPY_SHARE = "{}, share of a copy's bandwidth at 4 bytes an element"
_GPU_CLAIMS = (
    *(
        Claim(_COPY_SHARE, _case(_CE, _GPU_SHAPES[C], _BF16), "triton", COPY, at_least=0.85)
        for C in (4096, 30522, 32768)
    ),
    Claim(_COPY_SHARE, _case(_CE, _GPU_SHAPES[131072], _BF16), "triton", COPY, at_least=0.6),
    *(
        Claim(
            "{}, times as fast as Liger-Kernel",
            _case(_CE, _GPU_SHAPES[30522], _BF16, upstream=upstream),
            "triton",
            "liger",
            at_least=at_least,
        )
        for upstream, at_least in ((1.0, 1.0), (UPSTREAM, 1.5))
    ),
)
_CPU_CLAIMS = (
    Claim("{}, times the time of F.cross_entropy", _case(_CE, _MLM, _FP32), "eager", "pytorch", at_most=1.1),
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else _GPU_CLAIMS
