"""The losses of rows in every way that autograd comes by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DOUBLE, TOLERANCE, uniform
from softmax_cases import LOSSES, OF_LABELS, C, N, data, expected, value_and_grads

INF, NAN = math.inf, math.nan
SYMMETRIC = [name for name, loss in LOSSES.items() if loss.both and "probabilities" not in name]


@pytest.mark.parametrize(
    ("dtype", "upstream"), [(torch.float64, 0.0), (torch.float64, -3.0), (torch.float64, NAN), (torch.bfloat16, 0.25)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_upstream_gradients(name: str, dtype: torch.dtype, upstream: float, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device, dtype=dtype)
    value = loss.function(x, *others, backend=backend, **options)
    (grad,) = torch.autograd.grad(value, x, torch.tensor(upstream, dtype=value.dtype, device=device))
    kept = torch.ones(N, dtype=torch.bool) if name not in OF_LABELS else others[-1] != -100
    true_grad = expected(loss, x, others, upstream=upstream, **options)[1]
    tolerance = TOLERANCE[dtype] | ({"atol": 1e-2} if dtype == torch.bfloat16 else {})
    torch.testing.assert_close(grad[kept].double(), true_grad[kept], **tolerance, equal_nan=True)
    assert not grad[~kept].any() or math.isnan(upstream)


@pytest.mark.parametrize("name", LOSSES)
def test_expanded_and_strided_upstream(name: str, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device)
    values = loss.function(x, *others, reduction="none", backend=backend, **options)
    leaf = x.detach().clone().requires_grad_()
    true = loss.oracle(leaf, *others, reduction="none", **options)
    every_other = uniform(2 * N, device=device)[::2]
    for upstream in (torch.full((), 0.5, dtype=torch.float64, device=device).expand(N), every_other, 0 * every_other):
        found = torch.autograd.grad(values, x, upstream, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(true, leaf, upstream, retain_graph=True), **DOUBLE)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_twice_and_two_losses_in_one(name: str, backend: str, device: torch.device) -> None:
    """Gradients are nobody else's: what one backward gave may be written to. Arguments stay as they are."""
    loss = LOSSES[name]
    x, others, options = data(name, device)
    given = [(tensor, tensor.detach().clone(), tensor._version) for tensor in (x, *others)]
    value = loss.function(x, *others, backend=backend, **options)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], kept, rtol=0, atol=0)
    twice = loss.function(x, *others, backend=backend, **options) + 2 * loss.function(
        x, *others, backend=backend, **options
    )
    torch.testing.assert_close(torch.autograd.grad(twice, x)[0], 3 * kept, **DOUBLE)
    again = loss.function(x, *others, backend=backend, **options)
    assert torch.equal(value, again)  # bitwise
    assert torch.equal(torch.autograd.grad(again, x)[0], kept)
    for tensor, before, version in given:
        assert torch.equal(tensor, before)
        assert tensor._version == version


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", LOSSES)
def test_without_gradient(name: str, mode: Callable[[], Any], backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device)
    attached = loss.function(x, *others, backend=backend, **options)
    with mode():
        value = loss.function(x, *others, backend=backend, **options)
    assert attached.requires_grad
    assert not value.requires_grad
    torch.testing.assert_close(value, attached.detach(), **DOUBLE)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_only_the_second_logits_are_trained(name: str, reduction: str, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device)
    options["reduction"] = reduction
    x, z = x.detach(), others[0].detach().requires_grad_()
    upstream = torch.full((N,) if reduction == "none" else (), -2.0, dtype=torch.float64, device=device)
    found = value_and_grads(loss.function(x, z, *others[1:], backend=backend, **options), z, upstream=upstream)
    twin = z.detach().requires_grad_()
    true = value_and_grads(loss.oracle(x, twin, *others[1:], **options), twin, upstream=upstream)
    torch.testing.assert_close(found, true, **DOUBLE)


@pytest.mark.parametrize("name", ["ce", "ce-z", "poly"])
def test_probabilities_of_zero_have_a_gradient_too(name: str, backend: str, device: torch.device) -> None:
    """Of a target that is trained: -log p of each class, and of what smoothing leaves of it."""
    x, (y,), options = data(name, device)
    targets = torch.nn.functional.one_hot(y.clamp_min(0), C).double().requires_grad_()
    options["label_smoothing"] = 0.2 if name == "poly" else 0.0
    options["epsilon" if name == "poly" else "reduction"] = 1.5 if name == "poly" else "sum"
    found = value_and_grads(LOSSES[name].function(x, targets, backend=backend, **options), x, targets)
    true = value_and_grads(LOSSES[name].oracle(x, targets, **options), x, targets)
    torch.testing.assert_close(found, true, **DOUBLE)


@pytest.mark.parametrize("name", ["ce-z", "focal-2.0", "poly", "ldam", "distillation", "r-drop", "js"])
def test_second_derivatives_of_one_class_and_of_masked_ones(name: str, backend: str, device: torch.device) -> None:
    """There the logarithm of the sum of the others is -inf, and its derivatives are 0."""
    loss = LOSSES[name]
    for classes, hidden in ((1, []), (3, [1]), (3, [1, 2])):
        x, others, options = data(name, device, classes=classes)
        left = [c for c in range(classes) if c not in hidden]
        mask = torch.tensor(hidden, dtype=torch.long, device=device)
        others = [o.index_fill(-1, mask, -INF) if o.dim() == 2 else torch.zeros_like(o) for o in others]
        seconds = []
        for columns, function in (
            (slice(None), functools.partial(loss.function, backend=backend)),
            (left, loss.oracle),
        ):
            z = x if columns == left else x.index_fill(-1, mask, -INF)
            kept = options | ({"counts": options["counts"][columns]} if name == "ldam" else {})
            rest = [o[:, columns] if o.dim() == 2 else o for o in others]
            (grad,) = torch.autograd.grad(function(z[:, columns], *rest, **kept), x, create_graph=True)
            seconds.append((grad, *torch.autograd.grad((grad * grad.detach().cos()).sum(), x)))
        torch.testing.assert_close(*seconds, **DOUBLE)
