"""The multi-label family: its cases, who computes them, and what we claim about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast

from .cases import ALONE, NO_LIBRARY, UNCOMPILED, Case, Provider
from .claims import Claim
from .data import Targets
from .measure import COPY
from .peers import file_alone, library
from .providers import Losses, at_first_call, compiled, ours, twins

LOSSES = ("focal", "bce", "asl", "focal module", "bce module")
ALPHA, GAMMA = 0.25, 2.0
GAMMA_NEG, GAMMA_POS, CLIP = 4.0, 1.0, 0.05
# Neither a power of two nor small: what gradient accumulation over three batches passes back.
UPSTREAM = 1 / 3


def oracle(loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Every element's loss in float64, from torch's own logsigmoid and none of our algebra."""
    loss = loss.removesuffix(" module")
    if loss == "asl":
        shifted = (torch.sigmoid(x) - CLIP).clamp(min=0)
        positive = torch.sigmoid(-x) ** GAMMA_POS * F.logsigmoid(x)
        return -(y * positive + (1 - y) * shifted**GAMMA_NEG * torch.log1p(-shifted))
    ce = -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    if loss == "bce":
        return ce
    wrong = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)
    return (ALPHA * y + (1 - ALPHA) * (1 - y)) * wrong**GAMMA * ce


def _ours(backend: str) -> Losses:
    def focal(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.sigmoid_focal_loss(x, y, ALPHA, GAMMA, "mean", backend=backend)

    def bce(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.binary_cross_entropy_with_logits(x, y, backend=backend)

    def asl(x: Tensor, y: Targets) -> Tensor:
        return bertloss_fast.asymmetric_loss(x, y, GAMMA_NEG, GAMMA_POS, CLIP, "mean", backend=backend)

    modules = (
        at_first_call(lambda: bertloss_fast.SigmoidFocalLoss(ALPHA, GAMMA, "mean", backend=backend)),
        at_first_call(lambda: bertloss_fast.BCEWithLogitsLoss(backend=backend)),
    )
    losses = zip(LOSSES, (focal, bce, asl, *modules), strict=True)
    return {name: (f"bertloss-fast, {backend}", loss) for name, loss in losses}


def formula_of_focal(x: Tensor, y: Tensor) -> Tensor:
    """The operations of torchvision.ops.sigmoid_focal_loss, and the conversion of integer targets that they need."""
    y = y.to(x.dtype)
    probability = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    p_t = probability * y + (1 - probability) * (1 - y)
    alpha_t = ALPHA * y + (1 - ALPHA) * (1 - y)
    return (alpha_t * (ce * (1 - p_t) ** GAMMA)).mean()


def torch_bce(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y.to(x.dtype))


def _torchvision_focal() -> Losses:
    module = file_alone("torchvision", "ops/focal_loss.py")
    if module is None:
        return {"focal": ("torchvision's formula", formula_of_focal)}
    function = module.sigmoid_focal_loss
    return {"focal": ("torchvision's focal loss", lambda x, y: function(x, y.to(x.dtype), ALPHA, GAMMA, "mean"))}


def _fvcore_focal(x: Tensor, y: Tensor) -> Tensor:
    from fvcore.nn import sigmoid_focal_loss  # type: ignore[import-not-found, import-untyped, unused-ignore]

    loss: Tensor = sigmoid_focal_loss(x, y, ALPHA, GAMMA, "mean")
    return loss


def _kornia_focal(x: Tensor, y: Tensor) -> Tensor:
    from kornia.losses import binary_focal_loss_with_logits

    return binary_focal_loss_with_logits(x, y.to(x.dtype), ALPHA, GAMMA, "mean", ignore_index=None)


def _monai_focal(x: Tensor, y: Tensor) -> Tensor:
    from monai.losses import FocalLoss

    loss: Tensor = FocalLoss(gamma=GAMMA, alpha=ALPHA)(x, y)
    return loss


def _timm_asl(x: Tensor, y: Tensor) -> Tensor:
    module = file_alone("timm", "loss/asymmetric_loss.py")
    assert module is not None
    loss: Tensor = module.AsymmetricLossMultiLabel(GAMMA_NEG, GAMMA_POS, CLIP, reduction="mean")(x, y)
    return loss


_OURS = ours(_ours)
_FOCAL = _torchvision_focal()
_EAGER: Losses = {
    **_FOCAL,
    "focal module": _FOCAL["focal"],  # torchvision has none
    "bce": ("F.binary_cross_entropy_with_logits", torch_bce),
    "bce module": ("torch.nn.BCEWithLogitsLoss", at_first_call(torch.nn.BCEWithLogitsLoss)),
}
PROVIDERS = (
    *_OURS,
    *twins(_OURS),
    Provider("pytorch", _EAGER),
    compiled(_EAGER),
    library("fvcore", {"focal": ("fvcore", _fvcore_focal)}, "fvcore.nn"),
    library("kornia", {"focal": ("kornia", _kornia_focal)}, "kornia.losses"),
    library("monai", {"focal": ("MONAI", _monai_focal)}, "monai.losses"),
    library("timm", {"asl": ("timm", _timm_asl)}),
)

_FP32, _BF16, _UINT8 = torch.float32, torch.bfloat16, torch.uint8
_WIDE, _WIDER, _SMALL = (256, 20000), (64, 131073), (32, 100)


def _focal(
    shape: tuple[int, int],
    dtype: torch.dtype,
    targets: torch.dtype | None,
    *,
    suite: str = "sigmoid",
    loss: str = "focal",
    upstream: float = 1.0,
    **others: Any,
) -> Case:
    return Case(suite, loss, shape, dtype, targets, upstream, **others)


# Libraries as a user's process has them; what compiles where the allocator does the same in every run.
_KINDS = {"default": UNCOMPILED, "kept": NO_LIBRARY, "fresh": ALONE}
_BY_PAGES = {
    (shape, dtype, pages): _focal(shape, dtype, dtype, pages=pages, kinds=kinds)
    for shape in (_WIDE, _WIDER)
    for dtype in (_FP32, _BF16)
    for pages, kinds in _KINDS.items()
    if (shape, pages) != (_WIDER, "fresh")
}
_SPARSE = tuple(
    _focal(shape, dtype, None, labels_per_row=5, pages="kept", kinds=ALONE)
    for shape in (_WIDE, _WIDER)
    for dtype in (_FP32, _BF16)
)
_SMALL_FOCAL = _focal(_SMALL, _FP32, _FP32, suite="small")
_SMALL_BCE = _focal(_SMALL, _FP32, _FP32, suite="small", loss="bce", kinds=NO_LIBRARY)
_SMALL_FOCAL_MODULE = replace(_SMALL_FOCAL, loss="focal module", kinds=ALONE)
_SMALL_BCE_MODULE = replace(_SMALL_BCE, loss="bce module", kinds=ALONE)
_SMALL_CASES = (
    _SMALL_FOCAL,
    replace(_SMALL_FOCAL, upstream=UPSTREAM, kinds=ALONE),
    _SMALL_BCE,
    _SMALL_FOCAL_MODULE,
    _SMALL_BCE_MODULE,
)
_MEMORY_FP32 = _focal(_WIDE, _FP32, _FP32, suite="memory")
_MEMORY_BF16 = _focal(_WIDE, _BF16, _BF16, suite="memory", kinds=ALONE)
# Five labels a row, as in extreme classification: dense targets beside SparseLabels.
_MEMORY_SPARSE = _focal((512, 100000), _BF16, None, suite="memory", labels_per_row=5, kinds=ALONE)
_CPU_CASES = (
    _focal((256, 2000), _FP32, _FP32, pages="kept", kinds=NO_LIBRARY),  # for the chart of time against size
    *_BY_PAGES.values(),
    *_SPARSE,
    *(_focal(_WIDE, dtype, _UINT8, pages="kept", kinds=ALONE) for dtype in (_FP32, _BF16)),
    _focal(_WIDE, _FP32, _FP32, upstream=UPSTREAM, pages="kept", kinds=ALONE),
    _focal(_WIDE, _FP32, _FP32, backward=False, pages="kept", kinds=ALONE),
    _focal(_WIDE, _FP32, _FP32, loss="bce", pages="kept", kinds=NO_LIBRARY),
    _focal(_WIDE, _FP32, _FP32, loss="asl", pages="kept", kinds=UNCOMPILED),
    *_SMALL_CASES,
    _MEMORY_FP32,
    _MEMORY_BF16,
    replace(_MEMORY_FP32, loss="bce", kinds=ALONE),
    _MEMORY_SPARSE,
)
# A classifier's head, a long-tailed one, and one with more labels than a token vocabulary; bf16 with bytes is the
# floor's best case, fp32 with floats what most training scripts hand over.
_GPU_FOCAL = _focal((4096, 32768), _BF16, _UINT8)
_GPU_SPARSE = _focal((4096, 131072), _BF16, None, labels_per_row=5)
_GPU_CASES = (
    *(_focal(shape, _BF16, _UINT8) for shape in ((4096, 1000), (4096, 32768), (1024, 100000), (4096, 131072))),
    *(_focal(shape, _FP32, _FP32) for shape in ((4096, 1000), (1024, 100000))),
    _focal((1024, 100000), _BF16, _UINT8, upstream=UPSTREAM, kinds=UNCOMPILED),
    _focal((1024, 100000), _BF16, _UINT8, backward=False),
    _focal((1024, 100000), _BF16, _UINT8, loss="bce"),
    _focal((1024, 100000), _BF16, _UINT8, loss="asl"),
    _GPU_SPARSE,
    *_SMALL_CASES,
    *(_focal((4096, 131072), _BF16, _UINT8, suite="memory", loss=loss) for loss in ("focal", "bce")),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return _CPU_CASES if device.type == "cpu" else _GPU_CASES


_FORMULA = "torchvision's formula"
_SHARE = "{}, share of a copy's bandwidth at {} bytes an element"
_MEMORY = "{}, extra peak memory in logits tensors"


def _speed(case: Case, provider: str, at_least: float, peer: str = "pytorch") -> Claim:
    """How much faster than the formula; the condition on the allocator is part of the claim."""
    of_formula = _FORMULA if peer == "pytorch" else f"torch.compile of {_FORMULA}"
    as_it_is = ", malloc as it is" if provider != "triton" and case.pages == "default" else ""
    return Claim(f"{{}}{as_it_is}, times as fast as {of_formula}", case, provider, peer, at_least=at_least)


_CPU_CLAIMS = (
    *(_speed(case, "eager", 4 if case.dtype == _FP32 else 2.5) for case in _BY_PAGES.values()),
    *(_speed(case, "inductor", 1.6, "compile") for case in _BY_PAGES.values() if case.pages == "kept"),
    *(
        # Medians of one code path differ by as much.
        Claim("{}, times the time of the same labels as dense bytes", case, "eager", "eager, dense", at_most=1.05)
        for case in _SPARSE
    ),
    *(Claim(_MEMORY, case, "eager", at_most=2) for case in (_MEMORY_FP32, _MEMORY_BF16)),
    Claim("{}, extra peak memory beyond one gradient, MiB", _MEMORY_SPARSE, "eager", at_most=64, over_gradient=True),
    *(
        Claim(f"{{}}, times the time of {peer}", case, "eager", "pytorch", at_most=1.5)
        for case, peer in ((_SMALL_BCE, "F.binary_cross_entropy_with_logits"), (_SMALL_BCE_MODULE, "torch's module"))
    ),
    *(
        Claim(f"{{}}, times as fast as {_FORMULA}", case, "eager", "pytorch", at_least=1)
        for case in (_SMALL_FOCAL, _SMALL_FOCAL_MODULE)
    ),
)
_GPU_CLAIMS = (
    Claim(_SHARE.format("{}", 5), _GPU_FOCAL, "triton", COPY, at_least=0.85),
    _speed(_GPU_FOCAL, "triton", 1.5, "compile"),
    _speed(_GPU_FOCAL, "triton", 8),
    Claim(_SHARE.format("{}", 4), _GPU_SPARSE, "triton", COPY, at_least=0.8),
    _speed(_GPU_SPARSE, "triton", 2.5, "compile"),
)


def claims(device: torch.device) -> tuple[Claim, ...]:
    return _CPU_CLAIMS if device.type == "cpu" else _GPU_CLAIMS
