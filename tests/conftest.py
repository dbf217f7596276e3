"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from itertools import compress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import bertloss_fast

# The interpreter's speed depends on the machine: no deadline for one example, and the same examples on every run.
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("repeatable", max_examples=60, derandomize=True, **QUIET)
settings.register_profile("full", max_examples=2000, **QUIET)  # make test-full
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


NEVER = 10**9
# The backend; whether small tensors are cut into blocks as large ones are, and go no shorter way; and of how many
# elements one may be no 0 for the labels to be few.
WAYS = {
    "triton": ("triton", False, NEVER),
    "eager": ("eager", False, NEVER),
    "eager in blocks": ("eager", True, NEVER),
    "eager with few labels": ("eager", True, 1),
}


LOSSES_OF_LABELS = {"test_autograd", "test_imbalance", "test_sigmoid", "test_tails", "test_upstream"}


@pytest.fixture(params=WAYS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, in_blocks, few = WAYS[request.param]
    monkeypatch.setattr("bertloss_fast.ops.few_labels._FEW", few)
    if in_blocks:
        for module in ("small", "sigmoid", "softmax"):
            monkeypatch.setattr(f"bertloss_fast.ops.{module}._SMALL", 0)
        monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    return name


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other; Trainer collects garbage after each training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def eager() -> Iterator[None]:
    """For what is not about the kernels, which have tests of their own."""
    bertloss_fast.set_backend("eager")
    yield
    bertloss_fast.set_backend(None)


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports one of the examples' modules. What that sets in the environment goes again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        patch.setattr(os, "environ", os.environ.copy())
        yield importlib.import_module


def _is_left_out(item: pytest.Item) -> bool:
    """Sweeps, but for `make test-full`; and few labels where the loss has none, which is what blocks show."""
    if "few labels" in item.name and item.path.stem not in LOSSES_OF_LABELS:
        return True
    return "sweep" in item.keywords and os.environ.get("HYPOTHESIS_PROFILE") != "full"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [_is_left_out(item) for item in items]
    config.hook.pytest_deselected(items=list(compress(items, left_out)))
    items[:] = [item for item, is_out in zip(items, left_out, strict=True) if not is_out]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; make gpu runs it"))
