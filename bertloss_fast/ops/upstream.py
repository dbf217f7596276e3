"""The upstream gradient that a module expects: the last one that came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Expected:
    """A number in []: a kernel writes into it, plain PyTorch puts another tensor in its place."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class UpstreamMemory:
    """The last upstream gradient of a loss, by device and stream, for the next forward to expect.

    Gradient accumulation divides a loss and GradScaler multiplies it, the same way step after step. A forward that
    knows the factor writes the gradient with it; one that is wrong costs a second pass, and no accuracy: each forward
    notes what it wrote for, and backward compares. So a memory may be shared, late, or lost.

    It is no buffer: ``half()`` would make 65536 infinite, and DistributedDataParallel would broadcast it at every step.
    Copies and pickles of it are empty. Every module of this package has one; to a function it is handed.

    Example::

        >>> import torch
        >>> from bertloss_fast import UpstreamMemory, sigmoid_focal_loss
        >>> memory, logits = UpstreamMemory(), torch.zeros(4, 5, requires_grad=True)
        >>> for _ in range(8):  # from the second on, forward writes what backward needs
        ...     loss = sigmoid_focal_loss(logits, logits > 1, reduction="mean", upstream_memory=memory)
        ...     (loss / 8).backward()
    """

    def __init__(self) -> None:
        self._expected: dict[tuple[Any, ...], Expected] = {}

    def expected(self, backend: str, inputs: Tensor, dtype: torch.dtype) -> Expected | None:
        """What came last where ``inputs`` are, at first 1; None while a graph is captured that has no memory yet."""
        device = inputs.device
        stream = None if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
        key = backend, device, stream, dtype
        found = self._expected.get(key)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # a replay would set it to 1 again
            found = self._expected[key] = Expected(torch.ones((), dtype=dtype, device=device))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> UpstreamMemory:
        return UpstreamMemory()

    def __reduce__(self) -> tuple[Any, ...]:
        return UpstreamMemory, ()


def number_that_came(upstream: Tensor, expected: Expected | None) -> float | None:
    """An upstream gradient of a scalar loss on the CPU, where a look is free; and the next forward expects it."""
    if upstream.device.type != "cpu" or upstream.dim():
        return None
    number = upstream.item()
    if expected is not None and number != expected.value.item():
        expected.value = upstream.to(expected.value.dtype, copy=True)  # whose it is may write to it
    return number
