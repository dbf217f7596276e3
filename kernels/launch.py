"""What every launch needs around it."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from .device import INTERPRETED

_INTERPRETER_LOCK = threading.Lock()


@contextmanager
def _interpreter() -> Iterator[None]:
    """The interpreter is not thread-safe, and warns of infinities that a select then drops."""
    with _INTERPRETER_LOCK, np.errstate(all="ignore"):
        yield


def launch_scope(tensor: Tensor) -> AbstractContextManager[None]:
    """What a launch needs around it: on a GPU, the tensor's device made the current one."""
    if INTERPRETED.value:
        return _interpreter()
    return torch.get_device_module(tensor.device).device_of(tensor)
