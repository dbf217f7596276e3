"""The head of many labels: against an nn.Linear, a loss on its logits and torch.optim.SGD."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import DOUBLE, logits, uniform
from torch import Tensor, nn

import bertloss_fast as bf
from bench.memory import extra_peak_bytes
from bertloss_fast.modules.sigmoid import ElementwiseLoss
from bertloss_fast.optim import rounded_at_random

ROWS, FEATURES, LABELS = 6, 5, 11
LOSSES: dict[str, tuple[Callable[[], ElementwiseLoss], Callable[..., Tensor], dict[str, Any]]] = {
    "focal": (
        lambda: bf.SigmoidFocalLoss(alpha=torch.linspace(0, 1, LABELS).double(), reduction="mean_positive"),
        oracles.sigmoid_focal,
        {"alpha": torch.linspace(0, 1, LABELS).double(), "reduction": "mean_positive"},
    ),
    "bce": (
        lambda: bf.BCEWithLogitsLoss(pos_weight=torch.linspace(1, 3, LABELS).double()),
        oracles.binary_cross_entropy,
        {"pos_weight": torch.linspace(1, 3, LABELS).double(), "reduction": "mean"},
    ),
    "asl": (
        lambda: bf.AsymmetricLossMultiLabel(label_smoothing=0.1),
        oracles.asymmetric,
        {"label_smoothing": 0.1, "reduction": "batchmean"},
    ),
    "poly": (
        lambda: bf.PolyBinaryCrossEntropy(epsilon=1.5, gamma=1.0),
        oracles.sigmoid_focal,
        {"epsilon": 1.5, "gamma": 1.0, "alpha": None, "reduction": "mean"},
    ),
}


def made_head(device: torch.device, loss: ElementwiseLoss | None = None, **options: Any) -> bf.MultiLabelHead:
    torch.manual_seed(0)
    options = {"chunk_size": 4, "dtype": torch.float64, **options}
    return bf.MultiLabelHead(FEATURES, LABELS, loss, device=device, **options).to(device)


def batch(device: torch.device, seed: int = 0) -> tuple[Tensor, bf.SparseLabels]:
    hidden = logits(ROWS, FEATURES, device=device, seed=seed)
    return hidden, bf.SparseLabels.from_dense(uniform(ROWS, LABELS, device=device, seed=seed) < 0.3)


def as_linear(head: bf.MultiLabelHead) -> nn.Linear:
    linear = nn.Linear(FEATURES, LABELS, head.bias is not None, head.weight.device, head.weight.dtype)
    linear.load_state_dict(head.state_dict())
    return linear


@pytest.mark.parametrize("name", LOSSES)
def test_a_linear_layer_and_its_loss(name: str, backend: str, device: torch.device) -> None:
    make, oracle, options = LOSSES[name]
    loss = make()
    loss.backend = backend
    head = made_head(device, loss)
    linear, (hidden, y) = as_linear(head), batch(device)
    of_call = {"sample_weight": uniform(ROWS, device=device), "mask": uniform(ROWS, LABELS, device=device) < 0.9}
    ours, true = head(hidden, y, **of_call), oracle(linear(hidden), y, **of_call, **options)
    found = torch.autograd.grad(ours, [hidden, head.weight, head.bias])
    torch.testing.assert_close(ours, true, **DOUBLE)
    torch.testing.assert_close(found, torch.autograd.grad(true, [hidden, linear.weight, linear.bias]), **DOUBLE)
    torch.testing.assert_close(head(hidden), linear(hidden), **DOUBLE)


def test_state_dict_is_a_linear_layer_s(device: torch.device) -> None:
    """Whatever tensors the loss has; and copies and pickles keep those."""
    head = made_head(device, LOSSES["focal"][0]())
    linear = as_linear(head)
    other = made_head(device, LOSSES["focal"][0]())
    other.load_state_dict(linear.state_dict())
    hidden, y = batch(device)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), other):
        assert torch.equal(twin(hidden, y), head(hidden, y))
    assert head.float().loss.alpha.dtype == torch.float32


def test_prior(device: torch.device) -> None:
    frequencies = torch.linspace(0.01, 0.9, LABELS).double()
    for prior in (0.02, frequencies):
        head = made_head(device, prior=prior)
        with torch.no_grad():
            head.weight.zero_()
        expected = torch.as_tensor(prior, dtype=torch.float64).expand(ROWS, LABELS).to(device)
        torch.testing.assert_close(head(batch(device)[0]).sigmoid(), expected, rtol=1e-6, atol=0)
    assert made_head(device, prior=0.0).bias.isfinite().all()


def test_dropout(device: torch.device) -> None:
    """Of what the head is given, in training alone; a fused step's gradient comes through it."""
    head, (hidden, y) = made_head(device, dropout=0.5), batch(device)
    torch.manual_seed(1)
    loss = head(hidden, y)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(hidden, 0.5)
    expected = bf.SigmoidFocalLoss(reduction="batchmean")(as_linear(head)(dropped), y)
    torch.testing.assert_close(loss, expected, **DOUBLE)
    (true,) = torch.autograd.grad(expected, hidden)
    torch.manual_seed(1)
    _, gradient = head.fused_step(hidden, y, bf.HeadSGD(0.1))
    torch.testing.assert_close(gradient, true, **DOUBLE)
    head.eval()
    assert torch.equal(head(hidden, y), head(hidden, y))


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11])
def test_topk(chunk_size: int | None, device: torch.device) -> None:
    head = made_head(device, chunk_size=chunk_size)
    hidden = logits(2, 3, FEATURES, device=device)
    for k in (1, 4, LABELS):
        found, true = head.topk(hidden, k), head(hidden).sigmoid().topk(k)
        assert torch.equal(found.labels, true.indices)
        torch.testing.assert_close(found.scores, true.values, **DOUBLE)
    assert head.topk(hidden[:0], 2).labels.shape == (0, 3, 2)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11])
def test_predict(chunk_size: int | None, device: torch.device) -> None:
    head, (hidden, _) = made_head(device, chunk_size=chunk_size), batch(device)
    for threshold in (0.0, 0.5, 0.7, 1.0, torch.linspace(0.2, 0.8, LABELS).to(device)):
        found, probabilities = head.predict(hidden, threshold), head(hidden).sigmoid()
        expected = probabilities >= threshold
        assert torch.equal(found.labels.to_dense(), expected)
        torch.testing.assert_close(found.scores, probabilities[expected], **DOUBLE)
    assert head.predict(hidden[:0]).labels.shape == (0, LABELS)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_fused_steps_are_torch_s_sgd(momentum: float, weight_decay: float, backend: str, device: torch.device) -> None:
    """20 of them, in float32, with the encoder's own step between; the state is saved and loaded half-way."""
    losses = []
    for fused in (True, False):
        torch.manual_seed(0)
        encoder = nn.Linear(4, FEATURES, device=device)
        loss = bf.SigmoidFocalLoss(reduction="batchmean", backend=backend)
        head = made_head(device, loss, dtype=torch.float32)
        optimizer = bf.HeadSGD(0.3, momentum, weight_decay)
        of_encoder = torch.optim.SGD(encoder.parameters(), 0.1)
        of_head = torch.optim.SGD(head.parameters(), 0.3, momentum, weight_decay=weight_decay)
        losses.append([])
        for step in range(20):
            _, y = batch(device, step)
            hidden = encoder(uniform(ROWS, 4, device=device, seed=100 + step).float())
            of_encoder.zero_grad()
            if fused:
                value, gradient = head.fused_step(hidden, y, optimizer, loss_scale=4.0)
                hidden.backward(gradient / 4)
                assert head.weight.grad is None
            else:
                of_head.zero_grad()
                value = head(hidden, y)
                value.backward()
                of_head.step()
            of_encoder.step()
            losses[-1].append(value.detach())
            if fused and step == 10:
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = bf.HeadSGD(0.3, momentum, weight_decay)
                optimizer.load_state_dict(state)
        losses[-1] += [*head.state_dict().values(), *encoder.state_dict().values()]
    torch.testing.assert_close(*losses, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_dtypes_that_differ(momentum: float, device: torch.device) -> None:
    """Of targets, of autocast, and of a head that was moved between two steps."""
    hidden, y = batch(device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        head, optimizer = made_head(device, dtype=torch.float32), bf.HeadSGD(0.0, momentum)
        head.fused_step(hidden.float(), y, optimizer)
        head.to(dtype)
        before = head.weight.detach().clone()
        head.fused_step(hidden.to(dtype), y.to_dense(torch.float64), optimizer)
        if dtype != torch.float64:
            with torch.autocast(device.type, torch.bfloat16):
                head.fused_step(hidden.float(), y, optimizer)
        assert torch.equal(head.weight, before)  # a rate of 0 changes nothing


def test_steps_in_inference_mode(device: torch.device) -> None:
    head, optimizer, (hidden, y) = made_head(device), bf.HeadSGD(0.1, 0.9), batch(device)
    with torch.inference_mode():
        head.fused_step(hidden, y, optimizer)
    head.fused_step(hidden, y, optimizer)


def test_to_empty_and_reset(device: torch.device) -> None:
    head = bf.MultiLabelHead(FEATURES, LABELS, prior=0.02, device="meta").to_empty(device=device)
    head.reset_parameters()
    torch.testing.assert_close(head.bias.sigmoid(), torch.full_like(head.bias, 0.02))
    assert head.weight.isfinite().all()


def test_frozen_parameters_stay(device: torch.device) -> None:
    head, (hidden, y) = made_head(device), batch(device)
    head.bias.requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    head.fused_step(hidden, y, bf.HeadSGD(0.1, weight_decay=0.1))
    assert torch.equal(head.bias, before["bias"])
    assert not torch.equal(head.weight, before["weight"])


def test_a_step_without_rows(device: torch.device) -> None:
    head, (hidden, y) = made_head(device), batch(device)
    before = head.weight.detach().clone()
    loss, gradient = head.fused_step(hidden[:0], y[:0], bf.HeadSGD(0.1))
    assert loss == 0
    assert gradient.shape == (0, FEATURES)
    assert torch.equal(head.weight, before)


def test_rounding_at_random(device: torch.device) -> None:
    """Updates of bfloat16 weights that are too small for it arrive in the mean: 4000 seeds."""
    torch.manual_seed(0)
    loss = bf.SigmoidFocalLoss(reduction="batchmean", backend="eager")
    head = bf.MultiLabelHead(8, 128, loss, bias=False, device=device, dtype=torch.bfloat16)
    hidden, y = torch.randn(4, 8, device=device).bfloat16(), torch.rand(4, 128, device=device) < 0.2
    before = head.weight.detach().clone()
    exact = before.float().requires_grad_()
    logits = nn.functional.linear(hidden.float(), exact)
    (gradient,) = torch.autograd.grad(bf.sigmoid_focal_loss(logits, y, reduction="batchmean"), exact)
    lr, seeds = 0.001, 4000
    true = before.double() - lr * gradient.double()
    ulp = 2.0 ** (true.abs().log2().floor() - 7)
    assert ((lr * gradient).abs() < ulp / 2).double().mean() > 0.8  # most are lost where the nearest is taken
    total = torch.zeros_like(true)
    for seed in range(seeds):
        with torch.no_grad():
            head.weight.copy_(before)
        optimizer = bf.HeadSGD(lr, seed=seed)
        if seed % 100:  # as a step does, whose gradient is always this one
            optimizer.begin({"weight": head.weight.detach()}).labels(slice(0, 128), gradient.clone(), None)
        else:
            head.fused_step(hidden, y, optimizer)
        total += head.weight.detach()
    error = (total / seeds - true) / ulp
    assert error.square().mean().sqrt() < 0.5 / seeds**0.5
    assert error.mean().abs() < 1e-3


def test_rounding_repeats_with_its_seed(device: torch.device) -> None:
    weights = []
    for seed in (1, 1, 2):
        head, optimizer = made_head(device, dtype=torch.bfloat16), bf.HeadSGD(0.1, momentum=0.5, seed=seed)
        for step in range(3):
            hidden, y = batch(device, step)
            head.fused_step(hidden.bfloat16(), y, optimizer)
        weights.append(head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_rounding_leaves_alone(device: torch.device) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf"), float("nan")], device=device)
    found = rounded_at_random(values, torch.Generator(device).manual_seed(0))
    torch.testing.assert_close(found.float(), values, rtol=0, atol=0, equal_nan=True)


def most_allocated(run: Callable[[], object], device: torch.device) -> int:
    """By torch, above what there was. A process's resident set tells of malloc's habits too."""
    if device.type == "cuda":
        return extra_peak_bytes(run, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def test_a_fused_step_holds_no_gradient_of_the_weight(device: torch.device) -> None:
    """As the way with autograd does, which shows that the measure sees one."""
    labels, features = 150_000, 64
    loss = bf.BCEWithLogitsLoss(reduction="batchmean", backend=None if device.type == "cuda" else "eager")
    head = bf.MultiLabelHead(features, labels, loss, device=device)
    hidden, y = torch.randn(8, features, device=device), bf.SparseLabels.from_lists([[3]] * 8, labels).to(device)
    optimizer = bf.HeadSGD(0.1)
    weight_bytes = labels * features * 4
    for run, low, high in (
        (lambda: head.fused_step(hidden, y, optimizer), 0, 0.4),
        (lambda: head(hidden, y).backward(), 1, 1.3),
    ):
        run()
        head.zero_grad()
        assert low <= most_allocated(run, device) / weight_bytes <= high
