"""Every public loss inside what PyTorch offers. A new loss is in the table when it is public: it needs no line here.

What is asked is that a feature gives what plain eager autograd gives; that this is right, the other tests ask.
"""

from __future__ import annotations

import inspect
import multiprocessing
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DOUBLE, logits, uniform
from public import FUNCTIONS, MODULES, SHAPE, forms, needed, one_of_each
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.amp import GradScaler
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import bertloss_fast as bf
from bertloss_fast.ops.compiled import OPERATORS as REGISTERED
from bertloss_fast.ops.families import Family

Call = Callable[[Tensor], Tensor]


def upstreams(value: Tensor) -> Tensor:
    return torch.full_like(value, 0.5)


def value_and_grad(f: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = f(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, upstreams(value))[0]


def second_derivative(f: Call, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad((grad * x.cos()).sum() + 0 * leaf.sum(), leaf)[0]  # of kl_div it does not depend on x


def compiled(f: Call, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    return value_and_grad(torch.compile(f, fullgraph=True, backend="aot_eager", **options), x)


def compiled_backward(f: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    leaf = x.detach().requires_grad_()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        value = f(leaf)
        value.backward(upstreams(value))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def forward_mode(f: Call, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x.detach(), x.cos()))).tangent


def batched_gradients(f: Call, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    value = f(leaf)
    return torch.autograd.grad(value, leaf, torch.stack([value.detach(), -value.detach()]), is_grads_batched=True)[0]


def checkpointed(f: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_grad(lambda z: checkpoint(f, 1 * z, use_reentrant=False), x)


def in_threads(f: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(value_and_grad(f, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1]) for value, grad in found)
    return found[0]


def deterministic(f: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    torch.use_deterministic_algorithms(True)
    try:
        runs = [value_and_grad(f, x) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    return runs[0]


def jvp(f: Call, x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x.detach(),), (x.detach().cos(),))[1]


# What each does with a loss, and with the same loss in plain eager autograd.
FEATURES: dict[str, tuple[Callable[[Call, Tensor], Any], Callable[[Call, Tensor], Any]]] = {
    "torch.compile": (compiled, value_and_grad),
    "torch.compile, dynamic shapes": (lambda f, x: compiled(f, x, dynamic=True), value_and_grad),
    "compiled autograd": (compiled_backward, value_and_grad),
    "torch.func.grad": (lambda f, x: torch.func.grad(f)(x.detach()), lambda f, x: 2 * value_and_grad(f, x)[1]),
    "torch.func.vmap": (
        lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        lambda f, x: torch.stack([f(x), f(2 * x)]),
    ),
    "vmap of grad": (
        lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
        lambda f, x: 2 * torch.stack([value_and_grad(f, x)[1], value_and_grad(f, 2 * x)[1]]),
    ),
    "torch.func.jvp": (jvp, lambda f, x: 2 * (value_and_grad(f, x)[1] * x.cos()).sum()),
    "torch.func.jacrev": (lambda f, x: torch.func.jacrev(f)(x.detach()), lambda f, x: 2 * value_and_grad(f, x)[1]),
    "torch.func.hessian": (
        lambda f, x: torch.einsum("abcd,ab->cd", torch.func.hessian(f)(x.detach()), x.detach().cos()),
        second_derivative,
    ),
    "grad of grad": (
        lambda f, x: torch.func.grad(lambda z: (torch.func.grad(f)(z) * x.detach().cos()).sum())(x.detach()),
        second_derivative,
    ),
    "torch.func inside torch.compile": (
        lambda f, x: torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x.detach()),
        lambda f, x: 2 * value_and_grad(f, x)[1],
    ),
    "forward mode": (forward_mode, lambda f, x: 2 * (value_and_grad(f, x)[1] * x.cos()).sum()),
    "double backward": (second_derivative, lambda f, x: second_derivative(lambda z: f(z.clone()), x)),
    "batched gradients": (
        batched_gradients,
        lambda f, x: torch.stack([2 * f(x) * value_and_grad(f, x)[1], -2 * f(x) * value_and_grad(f, x)[1]]),
    ),
    "activation checkpointing": (checkpointed, value_and_grad),
    "4 threads": (in_threads, value_and_grad),
    "deterministic algorithms": (deterministic, value_and_grad),
}


# torch.func takes the same plain operations whatever the backend; where a graph is compiled, every form is another one.
WAYS = [(feature, "triton", "dense") for feature in FEATURES]
WAYS += [(feature, "triton", "sparse") for feature in FEATURES if "compile" not in feature]
WAYS += [("torch.compile", "triton", "sparse"), ("torch.compile", "eager", "dense")]
WAYS += [
    (feature, "eager", "dense") for feature in FEATURES if re.search("autograd|double|check|threads|determ", feature)
]


def is_swept(name: str, *way: str) -> bool:
    """Every loss is compiled once; in the other ways to compile, which take seconds, one of each family."""
    compiles = "compile" in way[0]
    return compiles and way != ("torch.compile", "triton", "dense") and name not in one_of_each(FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "feature", "backend", "form"),
    [
        pytest.param(name, *way, marks=[pytest.mark.sweep] if is_swept(name, *way) else [])
        for name, function in FUNCTIONS.items()
        for way in WAYS
        if way[2] in forms(function)
    ],
)
def test_features(name: str, feature: str, backend: str, form: str, device: torch.device) -> None:
    function, fixed = FUNCTIONS[name], needed(FUNCTIONS[name])
    x = logits(*SHAPE, device=device).detach()
    dense = forms(function)["dense"](SHAPE[0], device)
    given = forms(function)[form](SHAPE[0], device)
    indices = (given[-1].crow_indices, given[-1].col_indices) if form == "sparse" else None

    def ours(z: Tensor) -> Tensor:
        targets = given if indices is None else (*given[:-1], bf.SparseLabels(*indices, SHAPE))
        loss: Tensor = function(z, *targets, backend=backend, **fixed)
        return loss

    def plain(z: Tensor) -> Tensor:
        loss: Tensor = function(z, *dense, backend="eager", **fixed)
        return loss

    run, expected = FEATURES[feature]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Dynamo's way to say that it does not trust what it sees
        warnings.filterwarnings("ignore", message=".*(lru_cache|jit.script|not a leaf).*")
        torch.testing.assert_close(run(ours, x.clone()), expected(plain, x), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_autocast_and_grad_scaler(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The scaled loss gives the scaled gradient, rounded once; the loss itself stays float32."""
    torch.manual_seed(0)
    module = MODULES[name](**needed(MODULES[name])).to(device).eval()
    module.backend = backend
    features, made = torch.randn(SHAPE[0], 8, device=device), forms(MODULES[name])["dense"](SHAPE[0], device)
    given = [tensor.float() if tensor.is_floating_point() else tensor for tensor in made]
    head = nn.Linear(8, SHAPE[1], device=device)
    scaler = GradScaler(device.type, init_scale=2.0**10)
    for _ in range(2):
        head.zero_grad()
        with torch.autocast(device.type, dtype):
            logits_of_batch = head(features)
            logits_of_batch.retain_grad()
            loss = module(logits_of_batch, *given)
        assert logits_of_batch.dtype == dtype
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        exact = logits_of_batch.detach().double().requires_grad_()
        (true,) = torch.autograd.grad(module(exact, *given), exact)
        step = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        torch.testing.assert_close(logits_of_batch.grad.double(), 2.0**10 * true, rtol=step, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_strict_export(name: str, device: torch.device) -> None:
    module = MODULES[name](**needed(MODULES[name])).to(device).eval()
    given = (logits(*SHAPE, device=device).detach(), *forms(MODULES[name])["dense"](SHAPE[0], device))
    exported = torch.export.export(module, given, strict=True)
    torch.testing.assert_close(exported.module()(*given), module(*given), **DOUBLE)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "triton") for name in MODULES]
    + [
        pytest.param(name, "eager", marks=[] if name in one_of_each(MODULES) else [pytest.mark.sweep])
        for name in MODULES
    ],
)
def test_a_compiled_module(name: str, backend: str, device: torch.device) -> None:
    """Static first, then a shape that Dynamo has not seen; and without a word of distrust."""
    torch._dynamo.reset()
    kinds = MODULES[name], needed(MODULES[name])
    module, plain = kinds[0](**kinds[1]).to(device).eval(), kinds[0](**kinds[1]).to(device).eval()
    module.backend = backend
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (4, 7):
        x, dense = logits(rows, SHAPE[1], device=device), forms(MODULES[name])["dense"](rows, device)
        for form in forms(MODULES[name]).values():
            given = form(rows, device)
            found = value_and_grad(lambda z, given=given: run(z, *given), x)
            torch.testing.assert_close(found, value_and_grad(lambda z, dense=dense: plain(z, *dense), x), **DOUBLE)


OPERATORS = [
    (name, reduction, form)
    for name in (
        "sigmoid_focal_loss",
        "zlpr_loss",
        "two_way_loss",
        "cross_entropy",
        "r_drop_loss",
        "mse_loss",
        "linear_sigmoid_focal_loss",
        "linear_cross_entropy",
        "lambda_loss",
        "adr_mse_loss",
        "p_list_mle_loss",
    )
    for reduction in ("none", "mean", "mean_positive")
    for form in (*forms(FUNCTIONS[name]), "masked")
    if reduction == "mean" or (name != "two_way_loss" and (reduction == "none" or "sparse" in forms(FUNCTIONS[name])))
    if form != "masked" or "mask" in inspect.signature(FUNCTIONS[name]).parameters or name == "sigmoid_focal_loss"
]


@pytest.mark.parametrize(("name", "reduction", "form"), OPERATORS)
def test_operators_keep_torch_s_rules(
    name: str, reduction: str, form: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """torch.library.opcheck on what the compiler is handed."""
    x = logits(*SHAPE, device=device)
    calls: list[tuple[Any, ...]] = []
    families: list[Family] = []

    def keep(family: Family, spec: Any, operands: Any, backend: str) -> Tensor:
        families.append(family)
        calls.append((backend, *operands, *spec._replace(params=tuple(map(float, spec.params)))))
        return operands.inputs.new_zeros(family.loss_shape(spec, operands))

    with monkeypatch.context() as patch:
        patch.setattr("bertloss_fast.ops.autograd.compiled_loss", keep)
        patch.setattr("bertloss_fast.ops.dispatch.needs_plain_operations", lambda: True)
        patch.setattr("bertloss_fast.ops.dispatch.can_keep_operators", lambda: True)
        options: dict[str, Any] = {"mask": uniform(*SHAPE, device=device) < 0.7} if form == "masked" else {}
        given = forms(FUNCTIONS[name])["dense" if form == "masked" else form](SHAPE[0], device)
        FUNCTIONS[name](x, *given, reduction=reduction, backend="triton", **options)
    [call], operators = calls, REGISTERED[families[0].name]
    torch.library.opcheck(operators.loss, call)
    loss, *saved = operators.loss(*call)
    kept = [tensor.detach() if tensor.numel() else None for tensor in saved]
    upstream = torch.ones_like(loss).detach()
    given_sources = call[1 : 1 + len(families[0].sources)]
    wanted = [source is not None and source.is_floating_point() for source in given_sources]
    wanted[1] = families[0].grads_of_targets
    torch.library.opcheck(operators.backward, (upstream, *kept, "triton", *wanted, x.detach(), *call[2:]))


class Rows(torch.utils.data.Dataset[tuple[Tensor, list[int]]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, list[int]]:
        x = torch.linspace(-3, 3, SHAPE[1]).add(index).sin()
        losses = [bf.sigmoid_focal_loss(x, x > 0, reduction="sum"), bf.zlpr_loss(x, x > 0)]
        return torch.stack([*losses, *x]), [index % SHAPE[1]]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_losses_in_workers(start: str) -> None:
    loader = DataLoader(
        Rows(),
        batch_size=4,
        num_workers=1,
        timeout=300,
        collate_fn=bf.collate_labels(SHAPE[1]),
        multiprocessing_context=multiprocessing.get_context(start),
    )
    found = [(values, labels.to_dense()) for values, labels in loader]
    expected = [bf.collate_labels(SHAPE[1])([Rows()[i] for i in part]) for part in (range(4), range(4, 8))]
    for (values, labels), (true_values, true_labels) in zip(found, expected, strict=True):
        torch.testing.assert_close(values, true_values, rtol=1e-6, atol=0)
        assert torch.equal(labels, true_labels.to_dense())
