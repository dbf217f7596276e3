"""What modules show of themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def shown(values: dict[str, Any]) -> str:
    """``extra_repr`` of options by name, without those that are None; of a tensor its shape."""
    return ", ".join(
        f"{name}=tensor{tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
        for name, value in values.items()
        if value is not None
    )
