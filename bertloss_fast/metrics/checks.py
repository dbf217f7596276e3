"""What the metrics ask of their arguments, in whatever form these come."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_count(name: str, value: int, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")
    return int(value)


def as_array(name: str, value: Any) -> NDArray[Any]:
    """On the CPU, in numpy, in a dtype that torch has; floats are float32 or float64."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str)):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name}: expected rows of one length, got {type(value).__name__}") from error
        if array.dtype.kind in "biu":
            return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        if array.dtype.kind == "f":
            return np.ascontiguousarray(array, np.float32 if array.dtype.itemsize <= 4 else np.float64)
    got = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(f"{name}: expected an array or a tensor of numbers, got {got}")


def as_shares(name: str, value: Any) -> NDArray[np.float64]:
    """A number from 0 to 1, or one for each label."""
    if hasattr(value, "per_label"):
        raise TypeError(
            f"{name}: expected a number or [L], got {type(value).__name__}; take its .overall or .per_label"
        )
    try:
        shares = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number or [L], got {type(value).__name__}") from error
    if shares.ndim > 1:
        raise ValueError(f"{name}: expected a number or [L], got shape {shares.shape}")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"{name}: expected 0 to 1, got {shares.min():g} to {shares.max():g}")
    return shares


def logits_of(name: str, output: Any) -> Tensor:
    """What a model returns: a tensor ``[N, L]``, a tuple or list that begins with it, or an output with ``.logits``."""
    output = getattr(output, "logits", output)
    logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        of_tensor = isinstance(logits, Tensor)
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if of_tensor else type(logits).__name__
        raise ValueError(f"{name}: expected logits [N, L], got {got}")
    return logits
