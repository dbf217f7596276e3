"""Other libraries: whether they are installed, and their losses, imported at the first call."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .cases import LIBRARY, Provider
from .providers import Losses


def library(name: str, losses: Losses, imports: str = "", needs_gpu: bool = False) -> Provider:
    """A library's losses; without it, or its device, a row that says so."""

    def why_not(device: torch.device) -> str | None:
        if importlib.util.find_spec((imports or name).partition(".")[0]) is None:
            return "not installed"
        return "it has no CPU path" if needs_gpu and device.type == "cpu" else None

    return Provider(name, losses, why_not, kind=LIBRARY, imports="" if needs_gpu else imports)


@cache
def file_alone(package: str, path: str) -> ModuleType | None:
    """One file of a package that need not be importable as a whole; None where the package is not installed.

    timm asks for torchvision, and torchvision's operators for the very build of torch that it was made with.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0], path)
    root = f"{__name__}.{package}"
    # What torchvision's file takes from its package: a note of its use.
    utils = ModuleType(f"{root}.utils")
    utils._log_api_usage_once = lambda function: None  # type: ignore[attr-defined]
    sys.modules[utils.__name__] = utils
    name = ".".join((root, *Path(path).with_suffix("").parts))
    file_spec = importlib.util.spec_from_file_location(name, file)
    assert file_spec is not None
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[name] = module  # where torch.compile looks for the globals of a function
    file_spec.loader.exec_module(module)
    return module
