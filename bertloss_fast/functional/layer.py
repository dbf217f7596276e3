"""A linear layer before a loss: its arguments checked, and the loss's with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.chunks import Layer
from ..ops.linear import Call, linear_loss
from ..targets import SparseLabels
from .checks import check_device, check_index, check_inputs, check_tensor
from .elementwise import Options, prepare
from .rows import ClassOptions
from .softmax import prepare_classes, times_alpha

_LOGITS = "the logits"


def call_of_labels(
    formula: str,
    params: tuple[float, ...],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | SparseLabels,
    linear_bias: Tensor | None,
    reduction: str,
    chunk_size: int | None,
    options: Options,
    *,
    alpha: float | Tensor | None = None,
) -> Call:
    """A call, checked, of a loss whose labels stand for themselves."""
    layer, logits = as_layer(input, linear_weight, linear_bias, chunk_size)
    spec, operands = prepare(
        formula, params, logits, target, reduction, options, alpha=alpha, names=(_LOGITS, "target"), look="chunks"
    )
    backend = dispatch.resolve(options.get("backend"), input.device)
    return Call("sigmoid", spec, operands, layer, backend, options.get("upstream_memory"))


def loss_of_classes(
    formula: str,
    params: tuple[float, ...],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    reduction: str,
    chunk_size: int | None,
    options: ClassOptions,
    *,
    alpha: Tensor | None = None,
    **of_loss: Any,
) -> Tensor:
    """A loss of one class a row."""
    layer, logits = as_layer(input, linear_weight, linear_bias, chunk_size)
    check_tensor("target", target)
    wanted = tuple(logits.shape) if target.is_floating_point() else tuple(logits.shape[:-1])
    if tuple(target.shape) != wanted:
        kind = "class probabilities" if target.is_floating_point() else "classes"
        raise ValueError(f"target: expected {kind} of shape {wanted}, got {tuple(target.shape)}")
    sample_weight = options.get("sample_weight")
    if isinstance(sample_weight, Tensor) and sample_weight.shape != logits.shape[:-1]:
        raise ValueError(
            f"sample_weight: expected shape {tuple(logits.shape[:-1])}, one value a row of input, "
            f"got {tuple(sample_weight.shape)}"
        )
    # Rows: a loss of rows would look for the classes in the second dimension.
    rows = logits.shape[:-1].numel()
    options = {**options, "sample_weight": None if sample_weight is None else sample_weight.reshape(rows)}
    target = target.reshape(rows, *target.shape[logits.dim() - 1 :])
    spec, operands = prepare_classes(
        formula,
        params,
        logits.reshape(rows, logits.shape[-1]),
        target,
        reduction,
        options,
        names=(_LOGITS, "target"),
        **of_loss,
    )
    operands = times_alpha(alpha, spec, operands)
    layer = layer._replace(inputs=layer.inputs.reshape(rows, layer.inputs.shape[-1]))
    backend = dispatch.resolve(options.get("backend"), input.device)
    loss = linear_loss(Call("softmax", spec, operands, layer, backend, options.get("upstream_memory")))
    return loss.reshape(logits.shape[:-1]) if reduction == "none" else loss


def as_layer(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk_size: int | None = None
) -> tuple[Layer, Tensor]:
    """A layer, checked, and a tensor of the logits' shape and dtype that takes no memory."""
    _check_local("input", input)
    _check_local("linear_weight", linear_weight)
    if not input.dim():
        raise ValueError("input: expected shape (..., D), got ()")
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight: expected shape (L, D), got {tuple(linear_weight.shape)}")
    num_labels, num_features = linear_weight.shape
    if input.shape[-1] != num_features:
        raise ValueError(
            f"linear_weight: expected shape (L, {input.shape[-1]}), as long as the rows of input, "
            f"got {tuple(linear_weight.shape)}"
        )
    check_device("linear_weight", linear_weight, "input", input)
    autocast = _is_autocast(input) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(input.device.type) if autocast else input.dtype
    check_dtypes("linear_weight", linear_weight, "input", input)
    if linear_bias is not None:
        _check_local("linear_bias", linear_bias)
        if linear_bias.shape != (num_labels,):
            raise ValueError(
                f"linear_bias: expected shape ({num_labels},), one value a row of linear_weight, "
                f"got {tuple(linear_bias.shape)}"
            )
        check_device("linear_bias", linear_bias, "input", input)
        check_dtypes("linear_bias", linear_bias, "input", input)
    check_chunk_size(chunk_size)
    logits = input.detach().new_empty((), dtype=dtype).expand(*input.shape[:-1], num_labels)
    return Layer(input, linear_weight, linear_bias, dtype, chunk_size or 0), logits


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and check_index("chunk_size", chunk_size, "an integer > 0 or None") <= 0:
        raise ValueError(f"chunk_size: expected an integer > 0 or None, got {chunk_size}")


def check_dtypes(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Of one dtype; or such as autocast makes one of, which leaves float64 as it is."""
    if tensor.dtype != like.dtype and not (_is_autocast(like) and torch.float64 not in (tensor.dtype, like.dtype)):
        expected, got = (str(dtype).removeprefix("torch.") for dtype in (like.dtype, tensor.dtype))
        raise TypeError(f"{name}: expected {expected} like {like_name}, got {got}")


def _is_autocast(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def _check_local(name: str, tensor: Tensor) -> None:
    """Logits, features or weights that this process has as a whole."""
    if type(tensor).__name__ == "DTensor":  # the class takes half a second to import
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; bertloss_fast.distributed.shard_head splits a head"
        )
    check_inputs(name, tensor)
