"""Autograd within a loss, of which the autograd around it knows nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._C import DispatchKey

# In an operator's code, as a compiled graph calls it, the dispatcher is past these.
_AUTOGRAD = (DispatchKey.AutogradFunctionality, DispatchKey.ADInplaceOrView)


@contextmanager
def inner_autograd() -> Iterator[None]:
    """Grad mode, without the saved-tensor hooks of activation checkpointing and the like, and not compiled."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    apart = compiled._disable() if compiled is not None and compiled.compiled_autograd_enabled else nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    dispatched = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    hooks = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    with apart, dispatched, hooks, torch.enable_grad():
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
