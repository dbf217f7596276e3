"""What modules expect of the upstream gradient: exact whatever comes, and at the floor when the expected comes."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DOUBLE, TOLERANCE, logits, uniform
from processes import data_parallel_alone
from public import call, from_labels
from test_modules import MODULES
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton has no wheels outside Linux")

from bertloss_fast.kernels import (
    combine,
    listwise,
    listwise_pairs,
    pairs,
    parts,
    passes,
    pointwise,
    rows,
    rowwise,
    sigmoid,
    softmax,
)
from bertloss_fast.kernels.upstream import Upstream

import bertloss_fast as bf
from bertloss_fast import ops

# GHM's value depends on the calls before. Two-way and the ranking losses scale what forward has left.
EXPECTING = [name for name in MODULES if not name.startswith("ghm")]


@pytest.fixture(params=EXPECTING)
def make(request: pytest.FixtureRequest, device: torch.device, backend: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = MODULES[request.param]().to(device)
        module.backend = backend
        return module

    return make


def batch(device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return logits(5, 6, device=device, seed=seed, dtype=dtype), uniform(5, 6, device=device, seed=seed + 1) < 0.4


def gradient(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a module that has seen nothing."""
    loss = call(make(), x, y)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


UPSTREAMS = (1.0, 0.25, 0.25, 0.3, 0.3, 65536.0, 65536.0, 0.0, 0.0, -2.0, math.inf, 1.0, math.nan, 1.0, 1.0)


def test_an_upstream_that_changes(make: Callable[[], nn.Module], device: torch.device) -> None:
    """Step after step: the first of a kind is not expected, the second is."""
    module = make()
    for step, factor in enumerate(UPSTREAMS):
        x, y = batch(device, seed=step)
        value, grad = gradient(make, x, y)
        loss = call(module, x, y)
        upstream = torch.tensor(factor, dtype=loss.dtype, device=device)
        torch.testing.assert_close(loss.detach(), value, rtol=0, atol=0)
        found = torch.autograd.grad(loss, x, upstream)[0]
        if math.isinf(factor):  # where a gradient is a difference, infinity times it is one of infinities
            assert torch.equal(found.isfinite(), (grad * factor).isfinite())
        else:
            torch.testing.assert_close(found, grad * factor, **DOUBLE, equal_nan=True)


def test_steps_that_are_skipped_and_losses_without_backward(
    make: Callable[[], nn.Module], device: torch.device
) -> None:
    module = make()
    for step in range(4):
        x, y = batch(device, seed=step)
        (0.5 * call(module, x, y)).backward()
        call(module, x, y)
        with torch.no_grad():
            call(module, x, y)
        torch.testing.assert_close(x.grad, 0.5 * gradient(make, x, y)[1], **DOUBLE)


def test_used_twice_in_a_step_and_interleaved(make: Callable[[], nn.Module], device: torch.device) -> None:
    module = make()
    for _ in range(3):
        (x, y), (z, w) = batch(device), batch(device, seed=7)
        first, second = call(module, x, y), call(module, z, w)
        (2 * second).backward()
        third = call(module, x, y)
        (3 * first).backward()
        (0.5 * third + call(module, z, w)).backward()
        torch.testing.assert_close(x.grad, 3.5 * gradient(make, x, y)[1], **DOUBLE)
        torch.testing.assert_close(z.grad, 3 * gradient(make, z, w)[1], **DOUBLE)


def test_retained_accumulated_and_hooked(make: Callable[[], nn.Module], device: torch.device) -> None:
    module = make()
    x, y = batch(device)
    (0.25 * call(module, x, y)).backward()
    x.grad = None
    loss = call(module, x, y)
    loss.register_hook(lambda grad: 2 * grad)
    (0.25 * loss).backward(retain_graph=True)
    x.grad.mul_(1)  # who was handed a gradient may write to it
    (0.25 * loss).backward()
    torch.testing.assert_close(x.grad, gradient(make, x, y)[1], **DOUBLE)
    z, w = batch(device, seed=3)
    grads = torch.autograd.grad([call(module, x, y), 2 * call(module, z, w)], [x, z])
    torch.testing.assert_close(grads, (gradient(make, x, y)[1], 2 * gradient(make, z, w)[1]), **DOUBLE)


def test_an_upstream_that_its_owner_writes_to(make: Callable[[], nn.Module], device: torch.device) -> None:
    module = make()
    upstream: Tensor | None = None
    for step in range(4):
        x, y = batch(device, seed=step)
        loss = call(module, x, y)
        upstream = torch.full_like(loss, 0.5) if upstream is None else upstream.mul_(3)
        (grad,) = torch.autograd.grad(loss, x, upstream)
        torch.testing.assert_close(grad, gradient(make, x, y)[1] * 0.5 * 3**step, **DOUBLE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(make: Callable[[], nn.Module], use_reentrant: bool, device: torch.device) -> None:
    module = make()
    x, y = batch(device)
    for factor in (0.5, 0.5, 2.0):
        x.grad = None
        loss = checkpoint(partial(call, module), 1 * x, y, use_reentrant=use_reentrant)
        (factor * loss).backward()
        torch.testing.assert_close(x.grad, factor * gradient(make, x, y)[1], **DOUBLE)


def test_threads_share_a_module(make: Callable[[], nn.Module], device: torch.device) -> None:
    module = make()
    failures: list[str] = []

    def work(seed: int) -> None:
        for step in range(3):
            x, y = batch(device, seed=seed)
            factor = (1.0, 0.5, 0.25)[(seed + step) % 3]
            (factor * call(module, x, y)).backward()
            if not torch.allclose(x.grad, factor * gradient(make, x, y)[1]):
                failures.append(f"seed {seed}, step {step}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_remember_nothing(make: Callable[[], nn.Module], device: torch.device) -> None:
    module = make()
    x, y = batch(device)
    (0.25 * call(module, x, y)).backward()
    assert "upstream" not in str(list(module.state_dict()))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        if hasattr(module, "_upstream_memory"):
            assert not other._upstream_memory._expected
        torch.testing.assert_close(call(other, x, y), gradient(make, x, y)[0])


def test_a_mean_over_a_hundred_million_elements_in_fp16(device: torch.device) -> None:
    """1 / N is below all that fp16 has; the scaler's factor is folded in before anything is rounded."""
    shape, scale = (1024, 100_000), 2.0**24
    x = torch.linspace(-6, 6, shape[1], dtype=torch.float16, device=device).repeat(shape[0], 1).requires_grad_()
    y = torch.zeros(shape, dtype=torch.bool, device=device)
    y[:, ::1000] = True
    backend = "eager" if device.type == "cpu" else "triton"  # the interpreter would take minutes
    module = bf.SigmoidFocalLoss(None, reduction="mean", backend=backend)
    exact = x[:1].detach().double().requires_grad_()
    (true,) = torch.autograd.grad(module(exact, y[:1]), exact)
    for _ in range(2):
        (grad,) = torch.autograd.grad(scale * module(x, y), x)
        torch.testing.assert_close(grad[-1], (scale / shape[0] * true[0]).half(), rtol=2**-10, atol=2**-24)
    assert grad[-1].count_nonzero() > 0.4 * shape[1]  # the others are as small as 1e-12 without the scale


def test_inside_distributed_data_parallel(device: torch.device, backend: str, tmp_path: Path) -> None:
    """What a module remembers is no buffer, so that nothing of it is sent."""
    model = Trained(bf.SigmoidFocalLoss(reduction="mean", backend=backend)).to(device)
    plain = copy.deepcopy(model)
    features, y = uniform(5, 8, device=device).float(), uniform(5, 6, device=device, seed=4) < 0.4

    def train(one: nn.Module) -> None:
        for factor in (1.0, 0.25, 0.25):
            (factor * one(features, y)).backward()

    data_parallel_alone(model, tmp_path, train)
    train(plain)
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)
    assert not list(model.loss.buffers())


class Trained(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(8, 6), loss

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.head(features), targets)
        return loss


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_16_bit_gradients_are_rounded_once(upstream: float, backend: str, device: torch.device) -> None:
    """In fp16, a hundred thousand labels leave a mean's gradient nothing but the scaler's factor."""
    module = bf.SigmoidFocalLoss(None, reduction="mean", backend=backend)
    x, y = logits(2, 50_000, device=device, dtype=torch.float16), uniform(2, 50_000, device=device) < 0.1
    exact = x.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(module(exact, y), exact)
    scale = 2.0**16 * upstream
    for _ in range(2):
        x.grad = None
        (scale * module(x, y)).backward()
        torch.testing.assert_close(x.grad, (scale * true).half(), **TOLERANCE[torch.float16])
    assert x.grad.count_nonzero() > 0.9 * x.numel()


SHAPE = (40, 50)


class Launch(NamedTuple):
    kernel: str
    traffic: int  # bytes of the matrices that it reads and writes; 0 where it returns at once


class Recorder:
    """Stands for a kernel."""

    def __init__(self, kernel: Any, name: str, launches: list[Launch]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
            traffic = sum(tensor.nbytes for tensor in tensors if tensor.shape == SHAPE)
            [upstream] = [a for a in arguments if isinstance(a, Upstream)] or [Upstream()]
            written = options.get("WRITTEN", options.get("LAUNCH") and getattr(options["LAUNCH"], "written", False))
            if written and upstream.value == (1 if upstream.note is None else upstream.note):
                traffic = 0
            self.launches.append(Launch(self.name, traffic))
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    found: list[Launch] = []
    for module in (sigmoid, rowwise, parts, combine, passes, rows, softmax, pairs, pointwise, listwise, listwise_pairs):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, found))
    return found


TRAFFIC = {
    "a module": (bf.SigmoidFocalLoss(reduction="mean"), (1, 1, 0.25, 0.25, 1), (5, 5, 10, 5, 10)),
    "a module of rows": (bf.ZlprLoss(), (1, 0.25, 0.25), (5, 10, 5)),
    "a function": (partial(bf.sigmoid_focal_loss, reduction="mean"), (1, 0.25, 0.25), (5, 10, 10)),
    # Its own loss and the upstream gradient, which are bf16 too, beside the 3s + 2t of logits, labels and gradient.
    "a compiled module": (torch.compile(bf.SigmoidFocalLoss(reduction="mean"), backend="aot_eager"), (1, 0.25), (8, 8)),
    "unreduced": (bf.SigmoidFocalLoss(), (1,), (8 + 2 + 2,)),
    "a module of classes": (bf.CrossEntropyLoss(), (1, 0.25, 0.25), (4, 8, 4)),
    "two logits": (bf.RDropLoss(), (1, 0.25, 0.25), (8, 16, 8)),
    "a teacher": (bf.DistillationLoss(), (1, 0.25, 0.25), (6, 12, 6)),
    "numbers": (bf.MSELoss(), (1, 0.25, 0.25), (6, 12, 6)),
    # Forward writes the gradient in fp32, and backward scales it; the labels are int32 here.
    "lists": (bf.ListNetLoss(), (1, 0.25), (10, 10)),
    # Scores and gains in fp32, sorted by torch, and where the documents stood.
    "pairs of documents": (bf.LambdaLoss(), (1, 0.25), (20, 20)),
    "rows and columns": (bf.TwoWayLoss(), (1, 0.5), (8, 8)),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic(case: str, launches: list[Launch], device: torch.device) -> None:
    """In bytes an element: s = 2 of a bf16 logit and of its gradient, t = 1 of a uint8 label."""
    loss, factors, expected = TRAFFIC[case]
    x, y = logits(*SHAPE, device=device, dtype=torch.bfloat16), (uniform(*SHAPE, device=device) < 0.1).byte()
    module = getattr(loss, "_orig_mod", loss)
    given = from_labels(type(module), y) if isinstance(module, nn.Module) else (y,)
    others = [tensor.bfloat16() if tensor.dtype == torch.float64 else tensor for tensor in given]
    others[0].requires_grad_(case == "two logits")
    found = []
    for factor in factors:
        launches.clear()
        if isinstance(loss, nn.Module):
            module.backend = "triton"
            value = loss(x, *others)
        else:
            value = loss(x, y, backend="triton")
        (factor * value).sum().backward()
        counted = any(launch.kernel == "_count_kernel" for launch in launches)
        assert len(launches) <= 3 + counted or case == "rows and columns"
        found.append(sum(launch.traffic for launch in launches) // x.numel())
    assert tuple(found) == expected


@pytest.mark.parametrize("name", ["focal", "zlpr"])
def test_the_expected_upstream_finds_its_gradient_written(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Backward leaves the gradient alone: what a test writes into it comes back."""
    module = MODULES[name]().to(device)
    module.backend = "triton"
    family = ops.sigmoid if name == "focal" else ops.rowwise
    forward = family.FAMILY.forward
    written: list[Tensor] = []

    def spy(*arguments: Any) -> Any:
        loss, saved = forward(*arguments)
        saved.grads.inputs.fill_(7)
        written.append(saved.grads.inputs)
        return loss, saved

    monkeypatch.setattr(family, "FAMILY", family.FAMILY._replace(forward=spy))
    found = []
    for factor in (1.0, 0.25, 0.25, 1.0, 1.0):
        x, y = batch(device)
        (grad,) = torch.autograd.grad(factor * module(x, y), x)
        found.append(bool((grad == 7).all()))
    assert found == [True, False, True, False, True]
