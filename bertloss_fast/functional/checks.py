"""What public functions ask of their arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import _reduction

from ..ops import dispatch
from ..ops.upstream import UpstreamMemory
from ..targets import SparseLabels

REDUCTIONS = ("none", "sum", "mean", "batchmean", "mean_positive")
LARGEST = 1e30  # of a number that has no bound of its own: fp32 computes with it
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(name: str, inputs: Tensor) -> None:
    """Logits: a dense tensor of a floating dtype that has kernels."""
    check_tensor(name, inputs)
    check_floating(name, inputs)


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {_short(tensor.dtype)}")


def as_targets(
    name: str,
    targets: Tensor | SparseLabels,
    inputs_name: str,
    inputs: Tensor,
    ignore_index: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Labels of the inputs' shape and device: dense, or else where rows begin and which labels they have."""
    if isinstance(targets, Tensor) and targets.layout == torch.sparse_csr:
        targets = SparseLabels.from_sparse_csr(targets)
    if not isinstance(targets, SparseLabels):
        _check_targets(name, targets, inputs_name, inputs, ignore_index, mask)
        return targets, None, None
    if ignore_index is not None:
        raise ValueError(f"ignore_index: expected None, since sparse labels have no place for one; got {ignore_index}")
    rows = inputs.shape[:-1].numel()
    if targets.shape != (rows, *inputs.shape[-1:]):
        raise ValueError(
            f"{name}: expected shape {(rows, *inputs.shape[-1:])}, the rows and labels of {inputs_name}, "
            f"got {tuple(targets.shape)}"
        )
    check_device(name, targets.crow_indices, inputs_name, inputs)
    return None, targets.crow_indices, targets.col_indices


def _check_targets(
    name: str, targets: Tensor, inputs_name: str, inputs: Tensor, ignore_index: int | None, mask: Tensor | None
) -> None:
    """Labels: of the inputs' shape and device; integers only 0 and 1, where they count and a look at them is free."""
    check_tensor(name, targets)
    if targets.is_complex():
        raise TypeError(f"{name}: expected bool, an integer or a floating dtype, got {_short(targets.dtype)}")
    if targets.shape != inputs.shape:
        raise ValueError(f"{name}: expected shape {tuple(inputs.shape)} like {inputs_name}, got {tuple(targets.shape)}")
    check_device(name, targets, inputs_name, inputs)
    if ignore_index is not None:
        _check_room_for_ignore_index(name, targets, ignore_index)
    if targets.is_floating_point():
        check_floating(name, targets)
    elif targets.dtype != torch.bool and targets.numel() and dispatch.can_check_values(targets.device):
        _check_binary(name, targets, ignore_index, mask)


def check_ignore_index(ignore_index: int | None) -> None:
    """The target of what does not count: any integer but a label."""
    if ignore_index is None:
        return
    check_index("ignore_index", ignore_index, "an integer or None")
    if 0 <= ignore_index <= 1:
        raise ValueError(f"ignore_index: expected an integer that is no label, got {ignore_index}")


def check_index(name: str, value: int, expected: str = "an integer") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    return int(value)


def _check_room_for_ignore_index(name: str, targets: Tensor, ignore_index: int) -> None:
    check_ignore_index(ignore_index)
    dtype = targets.dtype
    if not (dtype.is_signed or targets.is_floating_point()):
        raise TypeError(f"ignore_index: expected {name} of a signed or floating dtype to hold it, got {_short(dtype)}")
    # A floating dtype holds every integer up to the one after which it skips some.
    limit = int(2 / torch.finfo(dtype).eps) if targets.is_floating_point() else torch.iinfo(dtype).max
    if abs(ignore_index) > limit:
        raise ValueError(f"ignore_index: expected an integer that {_short(dtype)} holds, got {ignore_index}")


def _check_binary(name: str, targets: Tensor, ignore_index: int | None, mask: Tensor | None) -> None:
    # Unsigned types of 16 bits and more have no min and max; as signed ones, too large is negative.
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(targets.dtype)
    values = targets if signed is None else targets.view(signed)
    low, high = (value.item() for value in values.aminmax())
    if low < 0 or high > 1:
        wrong = (values < 0) | (values > 1)
        if ignore_index is not None:
            wrong &= values != ignore_index
        if mask is not None:
            wrong &= mask
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"{name}: expected 0 or 1, got {targets[at].item()} at {at}")


def check_probabilities(name: str, values: Tensor, ignore_index: int | None = None, mask: Tensor | None = None) -> None:
    """Floating values from 0 to 1, where they count and a look at them is free."""
    if values.is_floating_point() and values.numel() and dispatch.can_check_values(values.device):
        if ignore_index is not None:
            values = torch.where(values == ignore_index, 0, values)
        if mask is not None:
            values = torch.where(mask, values, 0)
        low, high = (value.item() for value in values.detach().aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"{name}: expected values from 0 to 1, got {low if low < 0 else high:g}")


def check_values(name: str, values: Tensor, inputs_name: str, inputs: Tensor, *, integers: bool) -> None:
    """Numbers, one for each input, that may require a gradient; ``integers`` and bool among them, or not."""
    check_tensor(name, values)
    whole = not values.is_floating_point() and not values.is_complex()
    if values.dtype not in _FLOATING and not (integers and whole):
        expected = "float16, bfloat16, float32 or float64"
        expected = f"bool, an integer dtype, {expected}" if integers else expected
        raise TypeError(f"{name}: expected {expected}, got {_short(values.dtype)}")
    if values.shape != inputs.shape:
        raise ValueError(f"{name}: expected shape {tuple(inputs.shape)} like {inputs_name}, got {tuple(values.shape)}")
    check_device(name, values, inputs_name, inputs)


def check_mask(mask: Tensor | None, inputs_name: str, inputs: Tensor) -> None:
    """True for the elements that count."""
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {_short(mask.dtype)}")
    if mask.shape != inputs.shape:
        raise ValueError(f"mask: expected shape {tuple(inputs.shape)} like {inputs_name}, got {tuple(mask.shape)}")
    check_device("mask", mask, inputs_name, inputs)


def check_sample_weight(sample_weight: Tensor | None, inputs_name: str, inputs: Tensor) -> None:
    """One value a row."""
    if sample_weight is None:
        return
    check_constant("sample_weight", sample_weight, inputs_name, inputs)
    if not inputs.dim() or sample_weight.shape != inputs.shape[:-1]:
        raise ValueError(
            f"sample_weight: expected shape {tuple(inputs.shape[:-1])}, one value a row of {inputs_name}, "
            f"got {tuple(sample_weight.shape)}"
        )


def as_normalizer(normalizer: float | Tensor | None, reduction: str, inputs_name: str, inputs: Tensor) -> Tensor | None:
    """What takes the denominator's place: a positive number, or a tensor [] that nobody looks into."""
    if normalizer is None:
        return None
    if reduction == "none":
        raise ValueError("normalizer: expected None with reduction 'none', which divides by nothing")
    if not isinstance(normalizer, Tensor):
        value = check_positive("normalizer", normalizer)
        return torch.full((), value, dtype=torch.float64 if inputs.device.type != "mps" else None, device=inputs.device)
    check_constant("normalizer", normalizer, inputs_name, inputs)
    if normalizer.dim():
        raise ValueError(f"normalizer: expected a number or a tensor of shape (), got {tuple(normalizer.shape)}")
    return normalizer


def check_fraction(name: str, value: float) -> float:
    """A number from 0, and less than 1."""
    value = check_number(name, value, 0, 1)
    if value == 1:
        raise ValueError(f"{name}: expected a number from 0 to less than 1, got 1")
    return value


def check_positive(name: str, value: float, low: float = 1 / LARGEST, high: float = LARGEST) -> float:
    """A number above 0, and not beyond what fp32 computes with."""
    if check_number(name, value, 0) == 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return check_number(name, value, low, high)


def one_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """torch's deprecated arguments override the one that took their place."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


def check_reduction(reduction: str, known: Sequence[str] = REDUCTIONS) -> None:
    if not isinstance(reduction, str) or reduction not in known:
        raise ValueError(f"reduction: expected one of {', '.join(known)}, got {reduction!r}")


def check_backend(backend: str | None) -> None:
    dispatch.check_name("backend", backend)


def check_upstream_memory(memory: UpstreamMemory | None) -> None:
    if memory is not None and not isinstance(memory, UpstreamMemory):
        raise TypeError(f"upstream_memory: expected an UpstreamMemory or None, got {type(memory).__name__}")


def check_number(name: str, value: float, low: float, high: float = LARGEST) -> float:
    """A number in [low, high]."""
    if type(value) is float and low <= value <= high:  # the common case costs a loss of 32 x 100 no microsecond
        return value
    unbounded = high == LARGEST and not (isinstance(value, Real) and value > high)
    expected = f"a number >= {low:g}" if unbounded else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return float(value)


def check_alpha(alpha: float) -> float | None:
    """A class weight from 0 to 1; a negative number stands for none."""
    if isinstance(alpha, float | int) and alpha < 0:
        return None
    return check_number("alpha", alpha, 0, 1)


def as_vector(name: str, vector: float | Tensor | None, inputs_name: str, inputs: Tensor) -> Tensor | None:
    """One value a label, or one for all."""
    if vector is None:
        return None
    if not isinstance(vector, Tensor):
        return torch.full((), check_number(name, vector, 0), device=inputs.device)
    check_constant(name, vector, inputs_name, inputs)
    num_labels = inputs.shape[-1] if inputs.dim() else 1
    if vector.dim() > min(inputs.dim(), 1) or vector.numel() not in (1, num_labels):
        raise ValueError(
            f"{name}: expected shape ({num_labels},), one value a label of {inputs_name}, or a scalar, "
            f"got {tuple(vector.shape)}"
        )
    return vector


def check_weight(weight: Tensor | None, inputs_name: str, inputs: Tensor, *, broadcast: bool = False) -> None:
    """A weight for each label or each element; torch's own functions also let it broadcast."""
    if weight is None:
        return
    check_constant("weight", weight, inputs_name, inputs)
    shape, wanted = tuple(weight.shape), tuple(inputs.shape)
    if broadcast:
        tail = wanted[len(wanted) - len(shape) :] if len(shape) <= len(wanted) else None
        if tail is None or any(got not in (1, want) for got, want in zip(shape, tail, strict=True)):
            raise ValueError(f"weight: expected a shape that broadcasts to {wanted} of {inputs_name}, got {shape}")
    elif shape not in (wanted[-1:], wanted):
        raise ValueError(
            f"weight: expected shape {wanted[-1:]}, one value a label, or {wanted} like {inputs_name}, got {shape}"
        )


def check_class_weight(name: str, weight: Tensor | None) -> None:
    """Of a module, whose inputs are still to come."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor (C,), one value a class, or None; got {type(weight).__name__}")
    if weight.dim() != 1:
        raise ValueError(f"{name}: expected shape (C,), one value a class, got {tuple(weight.shape)}")
    check_no_gradient(name, weight)


def check_no_gradient(name: str, tensor: Tensor | None) -> None:
    """An operand that has no gradient in this loss."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, since none flows to it; got requires_grad=True")


def check_constant(name: str, tensor: Tensor, inputs_name: str, inputs: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATING):
        raise TypeError(f"{name}: expected a real dtype of at least 16 bits, got {_short(tensor.dtype)}")
    check_no_gradient(name, tensor)
    check_device(name, tensor, inputs_name, inputs)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {_short(value.layout)}")


def check_device(name: str, tensor: Tensor, inputs_name: str, inputs: Tensor) -> None:
    if tensor.device != inputs.device:
        raise ValueError(f"{name}: expected device '{inputs.device}' like {inputs_name}, got '{tensor.device}'")


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")
