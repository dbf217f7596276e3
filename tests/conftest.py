"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The interpreter's speed depends on the machine: no deadline for one example, and the same examples on every run.
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("repeatable", max_examples=60, derandomize=True, **QUIET)
settings.register_profile("full", max_examples=2000, **QUIET)  # make test-full
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "eager", "eager in blocks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the CPU the eager backend cuts large tensors into blocks; here it does so with small ones too."""
    if request.param == "eager in blocks":
        monkeypatch.setattr("bertloss_fast.ops.sigmoid._SMALL", 0)
        monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    return request.param.split()[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; make gpu runs it"))
