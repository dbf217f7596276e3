"""What the elementwise losses share: their options, checked and made operands."""

from __future__ import annotations

from typing import Literal, TypedDict, cast

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.blocks import NotProbabilitiesError, has_soft_labels, is_one_block
from ..ops.few_labels import find_few
from ..ops.sigmoid import sigmoid_loss
from ..ops.upstream import UpstreamMemory
from ..reference.sigmoid import Operands, Spec
from ..targets import SparseLabels
from .checks import (
    as_normalizer,
    as_targets,
    as_vector,
    check_alpha,
    check_fraction,
    check_mask,
    check_probabilities,
    check_reduction,
    check_sample_weight,
    check_upstream_memory,
    check_weight,
)


class Options(TypedDict, total=False):
    """What every elementwise loss takes; :func:`sigmoid_focal_loss` tells what they mean."""

    weight: Tensor | None
    pos_weight: float | Tensor | None
    sample_weight: Tensor | None
    mask: Tensor | None
    ignore_index: int | None
    label_smoothing: float
    normalizer: float | Tensor | None
    backend: str | None
    upstream_memory: UpstreamMemory | None


_OPTIONS = frozenset(Options.__annotations__)
_OF_THE_LOSS = _OPTIONS - {"label_smoothing", "backend", "upstream_memory"}
Look = Literal["early", "late", "chunks"]
# The backends that look at labels while they compute.
_LOOKING = ("eager", "inductor")


def are_plain(options: Options) -> bool:
    """Whether they leave the loss as its formula has it, and are valid but for the backend."""
    if not _OPTIONS.issuperset(options) or not isinstance(options.get("upstream_memory"), UpstreamMemory | None):
        return False
    smoothing = options.get("label_smoothing", 0.0)
    return smoothing.__class__ is float and not smoothing and all(options.get(name) is None for name in _OF_THE_LOSS)


def elementwise_loss(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    reduction: str,
    options: Options,
    *,
    alpha: float | Tensor | None = None,
    as_torch: bool = False,
) -> Tensor:
    """A loss of one logit and one label, on inputs and params that are checked."""
    names = ("input", "target") if as_torch else ("inputs", "targets")
    spec, operands = prepare(
        formula, params, inputs, targets, reduction, options, alpha=alpha, names=names, as_torch=as_torch, look="late"
    )
    try:
        return compute(spec, operands, options)
    except NotProbabilitiesError:
        check_probabilities(names[1], cast(Tensor, operands.targets))
        raise


def compute(spec: Spec, operands: Operands, options: Options) -> Tensor:
    """The loss of what is prepared."""
    backend = dispatch.resolve(options.get("backend"), operands.inputs.device)
    if backend != "eager" and operands.places is not None:
        operands = operands._replace(places=None)
    return sigmoid_loss(spec, operands, backend, options.get("upstream_memory"))


def prepare(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor | SparseLabels,
    reduction: str,
    options: Options,
    *,
    alpha: float | Tensor | None = None,
    names: tuple[str, str] = ("inputs", "targets"),
    as_torch: bool = False,
    look: Look = "early",
) -> tuple[Spec, Operands]:
    """A call's arguments, checked; ``as_torch`` has broadcast weights and dtypes of torch's losses.

    Labels are looked at: whether they are 0 and 1, or else probabilities. ``early`` is here, and where they are few it
    is found out where. ``chunks`` of the call will not need to know. A ``late`` look leaves it to the operation, where
    that has blocks and every label counts: it raises :class:`NotProbabilitiesError`.
    """
    if not _OPTIONS.issuperset(options):
        unknown = next(name for name in options if name not in _OPTIONS)
        raise TypeError(f"{unknown}: expected no such argument; the options are {', '.join(Options.__annotations__)}")
    ignore_index, mask = options.get("ignore_index"), options.get("mask")
    weight, sample_weight = options.get("weight"), options.get("sample_weight")
    inputs_name, targets_name = names
    check_mask(mask, inputs_name, inputs)
    dense, crow, col = as_targets(targets_name, targets, inputs_name, inputs, ignore_index, mask)
    soft, places = None, None
    if dense is not None and dispatch.can_check_values(dense.device):
        if look == "chunks" or is_one_block(dense):
            soft = has_soft_labels(dense)
        else:
            later = look == "late" and ignore_index is None and mask is None
            later = later and dispatch.resolve(options.get("backend"), dense.device) in _LOOKING
            soft, places = find_few(dense, later=later)
        if soft and not as_torch:
            check_probabilities(targets_name, dense, ignore_index, mask)
    check_reduction(reduction)
    check_upstream_memory(options.get("upstream_memory"))
    alpha_number, alpha_tensor = _alpha(alpha, inputs)
    check_weight(weight, inputs_name, inputs, broadcast=as_torch)
    check_sample_weight(sample_weight, inputs_name, inputs)
    spec = Spec(
        formula=formula,
        params=params,
        alpha=alpha_number,
        smoothing=check_fraction("label_smoothing", options.get("label_smoothing", 0.0)),
        ignored=ignore_index,
        reduction=reduction,
        compute_dtype=torch.float64 if _has_dtype(torch.float64, inputs, dense) else torch.float32,
        loss_dtype=_loss_dtype(inputs, dense, reduction, as_torch),
        soft=soft,
    )
    operands = Operands(
        inputs,
        dense,
        crow,
        col,
        alpha=alpha_tensor,
        weight=weight,
        pos_weight=as_vector("pos_weight", options.get("pos_weight"), inputs_name, inputs),
        sample_weight=sample_weight,
        mask=mask,
        normalizer=as_normalizer(options.get("normalizer"), reduction, inputs_name, inputs),
        places=places,
    )
    return spec, operands


def _alpha(alpha: float | Tensor | None, inputs: Tensor) -> tuple[float | None, Tensor | None]:
    """alpha as a number or as a tensor; neither for no class weight."""
    if alpha is None:
        return None, None
    if not isinstance(alpha, Tensor):
        return check_alpha(alpha), None
    as_vector("alpha", alpha, "inputs", inputs)
    check_probabilities("alpha", alpha)
    return None, alpha


def _has_dtype(dtype: torch.dtype, inputs: Tensor, targets: Tensor | None) -> bool:
    return inputs.dtype == dtype or (targets is not None and targets.dtype == dtype)


def _loss_dtype(inputs: Tensor, targets: Tensor | None, reduction: str, as_torch: bool) -> torch.dtype:
    soft = targets is not None and targets.is_floating_point()
    autocast = inputs.device.type != "meta" and torch.is_autocast_enabled(inputs.device.type)
    if as_torch:
        dtype = targets.dtype if soft and targets is not None else inputs.dtype
        return torch.float32 if dtype.itemsize == 2 and autocast else dtype
    dtype = torch.promote_types(inputs.dtype, targets.dtype) if soft and targets is not None else inputs.dtype
    return torch.promote_types(dtype, torch.float32) if reduction != "none" or autocast else dtype
