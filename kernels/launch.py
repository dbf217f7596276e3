"""What every launch needs around it."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from .device import INTERPRETED

_INTERPRETER_LOCK = threading.Lock()


@contextmanager
def _interpreter() -> Iterator[None]:
    """The interpreter is not thread-safe, and warns of infinities that a select then drops."""
    with _INTERPRETER_LOCK, np.errstate(all="ignore"), _patching_once():
        yield


@contextmanager
def _patching_once() -> Iterator[None]:
    """The interpreter patches triton.language anew at every call of a device function; once a launch is enough."""
    patch = interpreter._patch_lang
    scopes: dict[tuple[bool, ...], Any] = {}

    def patch_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()}
        key = tuple(id(module) in seen for module in (tl, tl.core))  # what it looks for, and patches
        if key not in scopes:
            scopes[key] = patch(function)
        return scopes[key]

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


def launch_scope(tensor: Tensor) -> AbstractContextManager[None]:
    """What a launch needs around it: on a GPU, the tensor's device made the current one."""
    if INTERPRETED.value:
        return _interpreter()
    return torch.get_device_module(tensor.device).device_of(tensor)
