"""Lists of documents: as ranking losses take them, checked, and padded from lists of different lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops import dispatch
from ..reference.listwise import Operands
from .checks import (
    LARGEST,
    check_constant,
    check_device,
    check_inputs,
    check_mask,
    check_no_gradient,
    check_tensor,
    check_values,
)

LONGEST = 4096  # documents of a list: one tile of a kernel


def pad_lists(
    values: Tensor | Sequence[Tensor], lengths: Tensor | Sequence[int] | None = None, padding: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lists of different lengths as one tensor ``[Q, n]``, and their lengths ``[Q]``, which ranking losses take.

    Args:
        values: a tensor ``[n_q]`` for each query; or the documents of all queries one after another, ``[sum of n_q]``,
            as a cross-encoder scores them. Gradients flow back to them.
        lengths: of values in one tensor, how many documents each query has.
        padding: what stands where there is no document.

    Returns:
        The padded tensor, and the lengths in int64 on its device.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    Example::

        >>> import torch
        >>> from bertloss_fast import list_net_loss, pad_lists
        >>> scores, lengths = pad_lists(torch.randn(5, requires_grad=True), [3, 2])
        >>> labels, _ = pad_lists([torch.tensor([2.0, 0.0, 1.0]), torch.tensor([0.0, 1.0])])
        >>> list_net_loss(scores, labels, lengths=lengths).backward()
    """
    if isinstance(values, Tensor):
        check_tensor("values", values)
        if values.dim() != 1:
            raise ValueError(f"values: expected shape (documents of all queries,), got {tuple(values.shape)}")
        sizes = _sizes(lengths)
        if sum(sizes) != len(values) or min(sizes, default=0) < 0:
            raise ValueError(
                f"lengths: expected numbers that sum to {len(values)}, the documents of values, got {sizes}"
            )
        lists = list(torch.split(values, sizes)) if sizes else [values]
    else:
        if lengths is not None:
            raise ValueError("lengths: expected None, since lists have their own lengths")
        lists = _checked(values)
        sizes = [len(one) for one in lists]
    dtype = functools.reduce(torch.promote_types, (one.dtype for one in lists))
    if not dtype.is_floating_point and padding != int(padding):
        raise ValueError(f"padding: expected an integer beside values of {dtype}, got {padding}")
    padded = pad_sequence([one.to(dtype) for one in lists], batch_first=True, padding_value=padding)
    return padded[: len(sizes)], torch.tensor(sizes, dtype=torch.int64, device=padded.device)


def _sizes(lengths: Tensor | Sequence[int] | None) -> list[int]:
    """The lengths of lists in one tensor, which tells them not."""
    if lengths is None:
        raise ValueError("lengths: expected the number of documents of each query, got None beside one tensor")
    sizes = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if not isinstance(sizes, list | tuple) or any(type(size) is not int for size in sizes):
        raise TypeError(f"lengths: expected integers, one for each query, got {sizes!r}")
    return list(sizes)


def _checked(values: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"values: expected a tensor, or a list of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError("values: expected at least one list, got none")
    for at, one in enumerate(values):
        check_tensor(f"values[{at}]", one)
        if one.dim() != 1:
            raise ValueError(f"values[{at}]: expected shape (n,), got {tuple(one.shape)}")
        check_device(f"values[{at}]", one, "values[0]", values[0])
    return list(values)


def as_lists(
    scores: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    highest: float | None = None,
    *,
    optional: bool = False,
) -> Operands:
    """What every ranking loss is called with, checked; no label is above the ``highest``."""
    check_inputs("scores", scores)
    if not scores.dim():
        raise ValueError("scores: expected shape (..., n), got ()")
    if scores.shape[-1] > LONGEST:
        raise ValueError(f"scores: expected lists of at most {LONGEST} documents, got {scores.shape[-1]}")
    if mask is not None and lengths is not None:
        raise ValueError("lengths: expected None beside a mask, which says the same")
    if lengths is not None:
        mask = _mask_of(lengths, scores)
    check_mask(mask, "scores", scores)
    if labels is not None or not optional:
        check_tensor("labels", labels)
        assert labels is not None
        check_values("labels", labels, "scores", scores, integers=True)
        check_no_gradient("labels", labels)
        _check_labels(labels, mask, highest)
    return Operands(scores, labels, mask)


def _mask_of(lengths: Tensor, scores: Tensor) -> Tensor:
    check_tensor("lengths", lengths)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths: expected an integer dtype, got {str(lengths.dtype).removeprefix('torch.')}")
    if lengths.shape != scores.shape[:-1]:
        expected = tuple(scores.shape[:-1])
        raise ValueError(f"lengths: expected shape {expected}, one value a list of scores, got {tuple(lengths.shape)}")
    check_device("lengths", lengths, "scores", scores)
    lengths, length = lengths.long(), scores.shape[-1]
    if lengths.numel() and dispatch.can_check_values(lengths.device):
        low, high = (value.item() for value in lengths.aminmax())
        if low < 0 or high > length:
            wrong = low if low < 0 else high
            raise ValueError(f"lengths: expected numbers from 0 to {length}, the documents of scores; got {wrong}")
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)


def _check_labels(labels: Tensor, mask: Tensor | None, highest: float | None) -> None:
    if not labels.numel() or not dispatch.can_check_values(labels.device):
        return
    values = labels.double() if mask is None else torch.where(mask, labels.double(), 0.0)
    greatest, least = values.max().item(), values.min().item()
    if not math.isfinite(greatest) or not math.isfinite(least):
        raise ValueError("labels: expected finite numbers, got an infinite one or NaN")
    if highest is not None and greatest > highest:
        raise ValueError(f"labels: expected at most {highest:g}, since a document gains 2^label - 1; got {greatest:g}")


def check_position_weight(weight: Tensor, scores: Tensor) -> None:
    check_constant("lambda_weight", weight, "scores", scores)
    if weight.shape not in (scores.shape[-1:], scores.shape):
        raise ValueError(
            f"lambda_weight: expected shape {tuple(scores.shape[-1:])}, one value a position, or "
            f"{tuple(scores.shape)} like scores, got {tuple(weight.shape)}"
        )
    check_weights(weight)


def check_weights(weight: Tensor) -> None:
    """Of positions: none below 0, and a sum that fp32 holds."""
    if weight.numel() and dispatch.can_check_values(weight.device):
        low, high = (value.item() for value in weight.double().aminmax())
        if not (low >= 0 and high <= LARGEST):
            wrong = low if not low >= 0 else high
            raise ValueError(f"lambda_weight: expected numbers from 0 to {LARGEST:g}, got {wrong:g}")
