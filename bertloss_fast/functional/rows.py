"""What the single-label losses share: their options, checked and made operands."""

from __future__ import annotations

from typing import TypedDict, cast

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.upstream import UpstreamMemory
from ..reference.softmax import Operands, Spec
from .checks import (
    as_normalizer,
    check_constant,
    check_device,
    check_floating,
    check_fraction,
    check_index,
    check_inputs,
    check_reduction,
    check_sample_weight,
    check_tensor,
    check_upstream_memory,
)

REDUCTIONS = ("none", "sum", "mean", "batchmean")
IGNORED = -100


class RowOptions(TypedDict, total=False):
    """What every loss of rows takes; :func:`softmax_focal_loss` tells what they mean."""

    sample_weight: Tensor | None
    normalizer: float | Tensor | None
    backend: str | None
    upstream_memory: UpstreamMemory | None


class LabelOptions(RowOptions, total=False):
    """And those that have classes."""

    ignore_index: int


class ClassOptions(LabelOptions, total=False):
    """And those that are made of cross-entropy."""

    weight: Tensor | None
    label_smoothing: float


def check_options(options: RowOptions, known: type) -> None:
    names = known.__annotations__
    if not options.keys() <= names.keys():
        unknown = next(name for name in options if name not in names)
        raise TypeError(f"{unknown}: expected no such argument; the options are {', '.join(names)}")


def are_plain(options: ClassOptions) -> bool:
    """Whether they leave the loss as its formula has it, if no class is negative, and are valid but for the backend."""
    if options.get("sample_weight") is not None or options.get("normalizer") is not None:
        return False
    if options.get("weight") is not None or not isinstance(options.get("upstream_memory"), UpstreamMemory | None):
        return False
    ignored, smoothing = options.get("ignore_index", IGNORED), options.get("label_smoothing", 0.0)
    return ignored.__class__ is int and ignored < 0 and smoothing.__class__ is float and not smoothing


def prepare_rows(
    formula: str,
    params: tuple[float, ...],
    inputs: Tensor,
    targets: Tensor | None,
    labels: Tensor | None,
    reduction: str,
    options: RowOptions,
    *,
    names: tuple[str, str] = ("inputs", "targets"),
    smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    as_torch: bool = False,
) -> tuple[Spec, Operands]:
    """A call on ``[..., C]``; ``targets`` and ``labels`` are checked."""
    inputs_name, targets_name = names
    check_reduction(reduction, REDUCTIONS)
    check_upstream_memory(options.get("upstream_memory"))
    ignored = check_index("ignore_index", cast(LabelOptions, options).get("ignore_index", IGNORED))
    sample_weight = options.get("sample_weight")
    check_sample_weight(sample_weight, inputs_name, inputs)
    if labels is not None:
        check_labels(targets_name, labels, inputs, inputs_name, ignored)
        if labels.dtype not in (torch.int32, torch.int64):
            labels = labels.long()  # a small dtype may not hold what stands for no class
    dtype = inputs.dtype if targets is None else torch.promote_types(inputs.dtype, targets.dtype)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    autocast = inputs.device.type != "meta" and torch.is_autocast_enabled(inputs.device.type)
    reduced = reduction != "none" and not as_torch
    at_least = torch.float32 if reduced or autocast else dtype
    spec = Spec(
        formula=formula,
        params=params,
        smoothing=smoothing,
        ignored=ignored,
        softcap=softcap,
        z_loss=z_loss,
        reduction=reduction,
        compute_dtype=compute_dtype,
        loss_dtype=torch.promote_types(inputs.dtype if as_torch else dtype, at_least),
    )
    operands = Operands(
        inputs,
        targets,
        labels,
        weight=weight,
        sample_weight=sample_weight,
        normalizer=as_normalizer(options.get("normalizer"), reduction, inputs_name, inputs),
    )
    return spec, operands


def classes_last(name: str, inputs: Tensor) -> Tensor:
    """[C], [N, C] or [N, C, d1, ...] as torch's cross-entropy has it, with the classes in the last dimension."""
    check_inputs(name, inputs)
    if not inputs.dim():
        raise ValueError(f"{name}: expected shape (C,), (N, C) or (N, C, d1, ...), got ()")
    inputs = inputs if inputs.dim() < 3 else inputs.movedim(1, -1)
    return check_classes(name, inputs)


def check_classes(name: str, inputs: Tensor) -> Tensor:
    if not inputs.dim() or not inputs.shape[-1]:
        raise ValueError(f"{name}: expected at least one class, got shape {tuple(inputs.shape)}")
    return inputs


def check_labels(name: str, labels: Tensor, inputs: Tensor, inputs_name: str, ignored: int) -> None:
    """Classes, of any integer dtype; those out of range are found where a look is free."""
    check_tensor(name, labels)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: expected classes of an integer dtype, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.shape != inputs.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(inputs.shape[:-1])}, one class a row of {inputs_name}, "
            f"got {tuple(labels.shape)}"
        )
    check_device(name, labels, inputs_name, inputs)
    num_classes = inputs.shape[-1]
    if labels.numel() and dispatch.can_check_values(labels.device):
        values = labels.long()
        low, high = (value.item() for value in values.aminmax())
        if low < 0 or high >= num_classes:
            wrong = ((values < 0) | (values >= num_classes)) & (values != ignored)
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                raise ValueError(
                    f"{name}: expected classes from 0 to {num_classes - 1}, or {ignored} for none, "
                    f"got {values[at].item()} at {at}"
                )


def as_class_vector(name: str, vector: Tensor | None, inputs_name: str, inputs: Tensor) -> Tensor | None:
    """One value a class."""
    if vector is None:
        return None
    check_constant(name, vector, inputs_name, inputs)
    if vector.shape != inputs.shape[-1:]:
        raise ValueError(
            f"{name}: expected shape {tuple(inputs.shape[-1:])}, one value a class of {inputs_name}, "
            f"got {tuple(vector.shape)}"
        )
    return vector


def split_targets(targets: Tensor, inputs: Tensor, names: tuple[str, str]) -> tuple[Tensor | None, Tensor | None]:
    """Class probabilities, with the classes where torch has them and then last, or else classes."""
    inputs_name, targets_name = names
    check_tensor(targets_name, targets)
    if not targets.is_floating_point():
        return None, targets
    check_floating(targets_name, targets)
    if targets.shape != inputs.shape:
        raise ValueError(
            f"{targets_name}: expected class probabilities of shape {tuple(inputs.shape)} like {inputs_name}, "
            f"or classes of an integer dtype, got {tuple(targets.shape)} in floats"
        )
    check_device(targets_name, targets, inputs_name, inputs)
    return targets if targets.dim() < 3 else targets.movedim(1, -1), None


def check_smoothing(smoothing: float) -> float:
    """From 0 to 1, as torch has it."""
    return 1.0 if smoothing == 1 else check_fraction("label_smoothing", smoothing)
