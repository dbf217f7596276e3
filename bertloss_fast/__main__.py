"""``python -m bertloss_fast``: what runs on this machine, and whether it gives the right numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch
from torch import Tensor

from . import __version__, binary_cross_entropy_with_logits, sigmoid_focal_loss
from .ops import dispatch

# Relative to the largest gradient: 16-bit results are rounded once, the others hold more digits than asked for here.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def main() -> int:
    for name in ("torch", "triton", "numpy"):
        print(f"{name:<14} {_version(name)}")
    print(f"{'bertloss-fast':<14} {__version__}, Python {platform.python_version()}")
    wrong = 0
    for device in _devices():
        print(f"\n{device} ({_describe(device)})")
        for backend in dispatch.BACKENDS:
            reason = dispatch.why_not(backend, device)
            if reason is not None:
                print(f"  {backend:<9} does not run: {reason}")
                continue
            for dtype in _TOLERANCE:
                if device.type == "mps" and dtype == torch.float64:
                    continue  # Apple's GPUs have no float64
                right, report = _check(backend, device, dtype)
                wrong += not right
                print(f"  {backend:<9} {str(dtype).removeprefix('torch.'):<9} {report}")
        try:
            print(f"  backend=None picks {dispatch.resolve(None, device)}")
        except ValueError as error:
            wrong += 1
            print(f"  backend=None is an error: {error}")
    return int(wrong > 0)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    kinds = [kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available()]
    counts = {kind: torch.get_device_module(kind).device_count() for kind in kinds}
    return [torch.device("cpu"), *(torch.device(kind, index) for kind in kinds for index in range(counts[kind]))]


def _describe(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads" + (", Triton's interpreter" if dispatch.INTERPRETED else "")
    return device.type


def _check(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    try:
        error = _largest_error(backend, device, dtype)
    except Exception as failure:  # a broken driver or compiler is what this command is here to tell
        return False, f"FAILED, {type(failure).__name__}: {failure}"
    if error > _TOLERANCE[dtype]:
        return False, f"WRONG, error {error:.1e} where {_TOLERANCE[dtype]:.1e} is allowed"
    return True, f"right, error {error:.1e}"


def _largest_error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    """Of loss and gradient of each loss, against the definition under float64 autograd."""
    generator = torch.Generator().manual_seed(0)
    inputs = (4 * torch.randn(33, 129, generator=generator)).to(dtype)
    targets = torch.rand(33, 129, generator=generator) < 0.2
    exact = inputs.double().requires_grad_()
    p = torch.where(targets, exact.sigmoid(), (-exact).sigmoid())
    alpha = torch.where(targets, 0.25, 0.75).double()
    expected = {"bce": (-p.log()).mean(), "focal": (-alpha * (1 - p) ** 2 * p.log()).mean()}
    leaf = inputs.to(device).requires_grad_()
    on_device = targets.to(device)
    ours = {
        "bce": binary_cross_entropy_with_logits(leaf, on_device, backend=backend),
        "focal": sigmoid_focal_loss(leaf, on_device, reduction="mean", backend=backend),
    }
    errors = []
    for name, loss in ours.items():
        errors.append(_relative(loss.detach(), expected[name].detach()))
        (true_grad,) = torch.autograd.grad(expected[name], exact, retain_graph=True)
        (grad,) = torch.autograd.grad(loss, leaf)
        errors.append(_relative(grad, true_grad))
    return max(errors)


def _relative(ours: Tensor, true: Tensor) -> float:
    error = (ours.cpu().double() - true).abs().max() / true.abs().max()
    return float(error.nan_to_num(nan=torch.inf))


if __name__ == "__main__":
    sys.exit(main())
