"""What is installed: the wheel's contents, and an import from outside the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools would leave its build folder in the tree.
    source = folder / "source"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source], check=True
    )
    return next(folder.glob("*.whl"))


def test_no_top_level_module_but_ours(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"bertloss_fast"}
    assert {"bertloss_fast/kernels/sigmoid.py", "bertloss_fast/py.typed"} <= set(names)


def test_the_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    program = """
import importlib.util, bertloss_fast, torch
print(bertloss_fast.__file__)
assert importlib.util.find_spec("kernels") is None
logits = torch.zeros(2, 3, requires_grad=True)
bertloss_fast.SigmoidFocalLoss(reduction="mean")(logits, torch.zeros(2, 3)).backward()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip().startswith(str(tmp_path))


def test_import_without_triton(tmp_path: Path) -> None:
    """Outside Linux there are no Triton wheels: the losses run in eager, and a call that insists on Triton says why."""
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel for this platform')")
    program = """
import torch, bertloss_fast as bf
x = torch.zeros(2, 3, requires_grad=True)
bf.sigmoid_focal_loss(x, torch.zeros(2, 3), reduction="mean").backward()
try:
    bf.sigmoid_focal_loss(x, torch.zeros(2, 3), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "backend: 'triton' cannot run on device 'cpu': Triton cannot be imported (no wheel" in result.stdout


@pytest.mark.parametrize(
    ("backend", "status", "shown"),
    [("", 0, "backend=None picks eager"), ("triton", 1, "backend=None is an error: BERTLOSS_FAST_BACKEND")],
)
def test_self_check(backend: str, status: int, shown: str) -> None:
    environment = {**os.environ, "BERTLOSS_FAST_BACKEND": backend, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"CXX": "none"} if backend else {}  # to compile takes seconds
    result = subprocess.run([sys.executable, "-m", "bertloss_fast"], env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    assert shown in result.stdout
    assert "Triton compiles for GPUs only" in result.stdout


def test_the_self_check_finds_a_wrong_loss() -> None:
    program = """
import sys, bertloss_fast, bertloss_fast.__main__ as check
right = check.sigmoid_focal_loss
check.sigmoid_focal_loss = lambda *args, **kwargs: right(*args, **kwargs) * 1.001
sys.exit(check.main())
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CXX": "none"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "WRONG, error 1.0e-03" in result.stdout
