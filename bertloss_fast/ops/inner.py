"""Autograd within a loss, of which the autograd around it knows nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
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
    with apart, dispatched, _without_hooks(), torch.enable_grad():
        yield


@contextmanager
def _without_hooks() -> Iterator[None]:
    """None at all: torch.func refuses to run under any, one that does nothing included."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
