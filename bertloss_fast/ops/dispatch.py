"""Which code runs a call: the choice of backend, and of the route through autograd."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache

import torch
from torch.autograd import forward_ad

try:
    from ..kernels.device import INTERPRETED as _INTERPRETED

    INTERPRETED: bool = _INTERPRETED.value
    TRITON_ERROR: str | None = None
except ImportError as error:  # Triton has no wheels outside Linux
    INTERPRETED = False
    TRITON_ERROR = f"Triton cannot be imported ({error})"

BACKENDS = ("triton", "eager", "inductor")
_TRITON_DEVICES = ("cuda", "xpu")


def set_backend(backend: str | None) -> None:
    """Choose the backend of every call that names none: "triton", "eager", "inductor", or None.

    None is "triton" where it runs and "eager" elsewhere. "inductor" is chosen by name only: ``torch.compile`` takes
    seconds at the first call with each set of options.

    Takes the place of the environment variable ``BERTLOSS_FAST_BACKEND``, which is read at import.

    Raises:
        ValueError: if there is no such backend. One that cannot run is told at the call, which knows the device.

    Example::

        >>> import bertloss_fast
        >>> bertloss_fast.set_backend("eager")
        >>> bertloss_fast.set_backend(None)
    """
    global _chosen, _source
    check_name("backend", backend)
    _chosen, _source = backend, "set_backend"


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None when it can."""
    if backend == "eager" or (backend == "inductor" and torch.compiler.is_compiling()):
        return None
    if backend == "inductor":
        reason = _why_not_compile(os.environ.get("CXX"), os.environ.get("PATH"))
        if reason is not None or device.type == "cpu":
            return reason
    if TRITON_ERROR is not None:
        return TRITON_ERROR
    if device.type in _TRITON_DEVICES or (device.type == "cpu" and INTERPRETED):
        return None
    if device.type == "cpu":
        return "Triton compiles for GPUs only; TRITON_INTERPRET=1, set before the first import, runs its interpreter"
    return f"Triton has no target for device type '{device.type}'"


@cache
def _why_not_compile(cxx: str | None, path: str | None) -> str | None:
    """Why torch.compile would not compile a loss, where the environment is this."""
    from torch._dynamo.eval_frame import check_if_dynamo_supported  # its import takes a second

    try:
        check_if_dynamo_supported()
    except RuntimeError as error:
        return str(error)
    if torch._dynamo.config.disable:
        return "torch.compile is disabled (TORCH_COMPILE_DISABLE)"
    # Those that torch looks for.
    compiler = cxx or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler, path=path) is None:
        return f"torch.compile finds no C++ compiler '{compiler}'; CXX names another"
    return None


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend of a call: its argument, else `set_backend`'s, else the environment's, else the best that runs."""
    source = "backend"
    if backend is None:
        if _chosen is None:
            return "eager" if why_not("triton", device) else "triton"
        backend, source = _chosen, _source
    check_name(source, backend)
    reason = why_not(backend, device)
    if reason is not None:
        raise ValueError(f"{source}: '{backend}' cannot run on device '{device}': {reason}")
    return backend


def is_eager_on_cpu(backend: str | None) -> bool:
    """Whether `resolve` says "eager" for the CPU, told in a tenth of its time."""
    backend = _chosen if backend is None else backend
    if backend is None:
        return not INTERPRETED
    return isinstance(backend, str) and backend == "eager"  # the comparison of an array would be one


def check_name(source: str, backend: str | None) -> None:
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")


_chosen, _source = os.environ.get("BERTLOSS_FAST_BACKEND") or None, "BERTLOSS_FAST_BACKEND"


def needs_plain_operations() -> bool:
    """Whether torch must see through the loss: in torch.func, torch.compile, forward-mode autograd, traces and modes.

    A `torch.autograd.Function` would be refused there, or return wrong derivatives without a word; and a look at values
    would be refused, or its answer kept for other values.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def can_keep_operators() -> bool:
    """Whether a graph is being compiled that nothing but backward differentiates: there an operator can stand whole."""
    return (
        torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_batched(upstream: torch.Tensor) -> bool:
    """Whether a gradient stands for many at once, as `torch.autograd.grad(..., is_grads_batched=True)` makes them."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(upstream))


def can_check_values(device: torch.device) -> bool:
    """Whether looking at a tensor's values costs no hidden synchronisation, or was asked for."""
    if needs_plain_operations():
        return False
    return device.type == "cpu" or os.environ.get("BERTLOSS_FAST_DEBUG") == "1"
