"""The losses of rows at their edges: shapes, strides, what does not count, and every way that autograd comes by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import row_oracles
import torch
from cases import DOUBLE, TOLERANCE, logits, uniform
from hypothesis import given
from hypothesis import strategies as st
from row_cases import ROW_LOSSES, RowLoss
from torch import Tensor

import bertloss_fast as bf

INF, NAN = math.inf, math.nan
N, C = 5, 6
# One loss of each kind: other parameters make no other edges.
LOSSES = {
    name: ROW_LOSSES[name]
    for name in ("ce", "ce-probabilities", "ce-z", "focal-2.0", "poly", "poly-probabilities", "ldam", "distillation")
} | {name: ROW_LOSSES[name] for name in ("distillation-alone", "r-drop", "js", "margin-mse")}
OF_LABELS = [name for name, loss in LOSSES.items() if "ignore_index" in loss.takes]
OF_CLASSES = [name for name in OF_LABELS if "weight" in LOSSES[name].takes]
SYMMETRIC = [name for name, loss in LOSSES.items() if loss.both and "probabilities" not in name]
MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "ce": bf.CrossEntropyLoss,
    "ce-probabilities": bf.CrossEntropyLoss,
    "ce-z": bf.CrossEntropyLoss,
    "focal-2.0": bf.SoftmaxFocalLoss,
    "poly": bf.PolyCrossEntropy,
    "poly-probabilities": bf.PolyCrossEntropy,
    "ldam": bf.LDAMLoss,
    "distillation": bf.DistillationLoss,
    "distillation-alone": bf.DistillationLoss,
    "r-drop": bf.RDropLoss,
    "js": bf.JSDivLoss,
    "margin-mse": bf.MarginMSELoss,
}


@pytest.fixture(params=["triton", "eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The eager one in blocks of a row."""
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    return str(request.param)


def data(
    name: str, device: torch.device, rows: int = N, classes: int = C, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """Logits, what comes after them, and the options that the loss always has."""
    loss = LOSSES[name]
    if rows == 0:
        second = [o[:0] for o in loss.second(1, classes, device)]
    else:
        second = list(loss.second(rows, classes, device))
    second = [o.to(dtype) if o.is_floating_point() else o for o in second]
    options = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in loss.options_of(classes).items()
    }
    return logits(rows, classes, device=device, dtype=dtype), second, options


def value_and_grads(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream)


def expected(
    loss: RowLoss, x: Tensor, others: list[Tensor], upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """In float64, of logits as they are."""
    leaf = x.detach().double().requires_grad_()
    value = loss.oracle(leaf, *(o.detach().double() if o.is_floating_point() else o for o in others), **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), upstream * grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_rows(name: str, reduction: str, backend: str, device: torch.device) -> None:
    """An attached 0 where torch divides by nothing."""
    x, others, options = data(name, device, rows=0)
    loss = LOSSES[name].function(x, *others, reduction=reduction, backend=backend, **options)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not loss.any()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.shape == x.shape


def permuted(x: Tensor) -> Tensor:
    """The classes where torch has them, as a view."""
    return x if x.dim() < 3 else x.movedim(-1, 1)


@pytest.mark.parametrize(
    ("shape", "reduction"),
    [((), "mean"), ((3,), "none"), ((2, 3), "mean"), ((2, 3, 2), "none"), ((2, 0), "mean"), ((0, 2), "none")],
)
@pytest.mark.parametrize("name", LOSSES)
def test_shapes(name: str, shape: tuple[int, ...], reduction: str, backend: str, device: torch.device) -> None:
    """Those made of cross-entropy have the classes second, as torch has them; the others last."""
    rows = math.prod(shape)
    x, others, options = data(name, device, rows=rows)
    options["reduction"] = reduction
    loss = LOSSES[name]
    arranged = permuted if name in OF_CLASSES or "probabilities" in name else lambda tensor: tensor
    shaped = [arranged(o.reshape(*shape, C)) if o.dim() == 2 else o.reshape(shape) for o in others]
    leaf = arranged(x.detach().reshape(*shape, C)).requires_grad_()
    found = value_and_grads(loss.function(leaf, *shaped, backend=backend, **options), leaf)
    if rows:
        value, grad = expected(loss, x, others, **options)
    else:
        value, grad = x.new_zeros(shape if reduction == "none" else ()), x.detach()
    value = value.reshape(shape) if reduction == "none" else value
    torch.testing.assert_close(found, (value, arranged(grad.reshape(*shape, C))), **DOUBLE)


# The same values under other strides.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() == 2 else t.repeat_interleave(3)[::3],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "imaginary": lambda t: torch.complex(t, -t).conj().imag if t.is_floating_point() else t,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", LOSSES)
def test_strides(name: str, view: str, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device)
    if name in OF_CLASSES:
        options["weight"] = torch.linspace(0.5, 2, C, dtype=torch.float64, device=device)
    options["sample_weight"] = torch.linspace(0.5, 2, N, dtype=torch.float64, device=device)
    seen, *rest = (VIEWS[view](tensor.detach()) for tensor in (x, *others))
    strided = {
        key: VIEWS[view](o) if isinstance(o, Tensor) and o.dtype == torch.float64 else o for key, o in options.items()
    }
    if view == "expanded":
        options = {key: o.contiguous() if isinstance(o, Tensor) else o for key, o in strided.items()}
    found = value_and_grads(loss.function(seen.requires_grad_(), *rest, backend=backend, **strided), seen)
    torch.testing.assert_close(found, expected(loss, seen, rest, **options), **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", OF_LABELS)
def test_dtypes_of_classes(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """A byte has no -100: there, another class stands for none."""
    loss = LOSSES[name]
    x, others, options = data(name, device)
    if dtype == torch.uint8:
        others[-1], options = others[-1].clamp_min(0), {**options, "ignore_index": 255}
        others[-1][2] = 255
    found = loss.function(x, *others[:-1], others[-1].to(dtype), backend=backend, **options)
    torch.testing.assert_close(value_and_grads(found, x), expected(loss, x, others, **options), **DOUBLE)


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


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("name", OF_LABELS)
def test_what_is_ignored_does_not_leak(name: str, reduction: str, backend: str, device: torch.device) -> None:
    """Nor does it become NaN by being one; of nothing but ignored rows, the loss is an attached 0."""
    loss = LOSSES[name]
    x, others, options = data(name, device)
    others[-1][[1, 3]] = -100
    options["reduction"] = reduction
    dirty = [o.clone() if o.dim() == 2 else o for o in (x.detach(), *others)]
    for tensor, value in zip([o for o in dirty if o.dim() == 2], (NAN, INF), strict=False):
        tensor[1], tensor[3, 2] = value, -value
    leaf = dirty[0].requires_grad_()
    found = value_and_grads(loss.function(leaf, *dirty[1:], backend=backend, **options), leaf)
    true = expected(loss, x, others, **options)
    torch.testing.assert_close(found, true, **DOUBLE)
    assert not found[1][[1, 3]].any()
    none = torch.full_like(others[-1], -100)
    value, grad = value_and_grads(loss.function(leaf, *dirty[1:-1], none, backend=backend, **options), leaf)
    assert not value.any()
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of", ["weight", "sample_weight"])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_zero(name: str, of: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    if of not in loss.takes:
        return
    x, others, options = data(name, device, dtype=dtype)
    options[of] = torch.zeros(C if of == "weight" else N, device=device)
    value, grad = value_and_grads(loss.function(x, *others, backend=backend, **options), x)
    if name != "ce-z":  # which is not weighted
        assert value == 0
        assert not grad.any()
    assert value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, C, -(10**6)])
@pytest.mark.parametrize("name", OF_LABELS)
def test_a_class_out_of_range_is_loud(
    name: str, wrong: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody looked, as on a GPU: its row is NaN, nothing else is read, and the other rows are as they were."""
    monkeypatch.setattr("bertloss_fast.ops.dispatch.can_check_values", lambda device: False)
    loss = LOSSES[name]
    x, others, options = data(name, device)
    if backend == "eager" and name == "ce" and device.type == "cpu":
        return  # torch's own kernel raises
    true = expected(loss, x, others, reduction="none", **options)
    others[-1][3] = wrong
    value, grad = value_and_grads(loss.function(x, *others, reduction="none", backend=backend, **options), x)
    assert value[3].isnan()
    assert grad[3].isnan().any() or backend == "eager"
    rest = [0, 1, 2, 4]
    torch.testing.assert_close((value[rest], grad[rest]), (true[0][rest], true[1][rest]), **DOUBLE)
    value, grad = value_and_grads(loss.function(x, *others, backend=backend, **options), x)
    assert value.isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_further_apart_than_32_bits_count(name: str, device: torch.device) -> None:
    """Offsets past 2^31 in a small call: the storage is reserved, and but a few of its pages are touched."""
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    loss = LOSSES[name]
    x, others, options = data(name, device, 3, C, torch.bfloat16)
    far = torch.empty(2**31 + C, dtype=torch.bfloat16, device=device).as_strided((3, C), (2**30, 1)).copy_(x.detach())
    near = value_and_grads(loss.function(x, *others, backend="triton", **options), x)
    found = value_and_grads(loss.function(far.requires_grad_(), *others, backend="triton", **options), far)
    assert torch.equal(found[0], near[0])
    assert torch.equal(found[1], near[1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_what_z_loss_adds(reduction: str, backend: str, device: torch.device) -> None:
    """It is what is told of it, and has no gradient; unweighted, over the rows that count."""
    x, (y,), _ = data("ce", device)
    options: dict[str, Any] = {"reduction": reduction, "logit_softcap": 4.0}
    options["weight"] = torch.linspace(0.5, 2, C, dtype=torch.float64, device=device)
    options["sample_weight"] = torch.linspace(0, 2, N, dtype=torch.float64, device=device)
    whole, z = bf.cross_entropy(x, y, z_loss=0.3, return_z_loss=True, backend=backend, **options)
    kept = (y != -100).double()
    true = 0.3 * (4 * torch.tanh(x.detach() / 4)).logsumexp(-1).square() * kept
    count = {"none": 1, "sum": 1, "mean": int(kept.sum()), "batchmean": N}[reduction]
    torch.testing.assert_close(z, true if reduction == "none" else true.sum() / count, **DOUBLE)
    assert not z.requires_grad
    alone = bf.cross_entropy(x, y, backend=backend, **options)
    torch.testing.assert_close(whole, alone + z, **DOUBLE)
    without = bf.cross_entropy(x, y, return_z_loss=True, backend=backend, **options)
    torch.testing.assert_close(without, (alone, torch.zeros_like(alone)), **DOUBLE)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float64)]
)
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.both or "distillation" in name])
def test_mixed_dtypes(name: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: torch.device) -> None:
    """Of a student in 16 bits and a teacher in 32: computed in the wider, and each gradient is in its own."""
    loss = LOSSES[name]
    x, others, options = data(name, device)
    x, others[0] = x.detach().to(dtypes[0]).requires_grad_(), others[0].to(dtypes[1])
    leaves = [x, others[0].requires_grad_()] if loss.both else [x]
    found = loss.function(x, *others, backend=backend, **options)
    grads = torch.autograd.grad(found, leaves)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rest = [o.double() if o.is_floating_point() else o for o in others[len(leaves) - 1 :]]
    true = value_and_grads(loss.oracle(*exact, *rest, **options), *exact)
    for ours, exact_value in zip((found.detach(), *grads), true, strict=True):
        tolerance = {"rtol": TOLERANCE[ours.dtype]["rtol"], "atol": 1e-6}
        torch.testing.assert_close(ours.double(), exact_value, **tolerance)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_modules_are_the_functions(name: str, reduction: str, backend: str, device: torch.device) -> None:
    loss = LOSSES[name]
    x, others, options = data(name, device, dtype=torch.float32)
    module = MODULES[name](**options, reduction=reduction, backend=backend).to(device)
    weight = torch.linspace(0.5, 2, N, device=device)
    options |= {"reduction": reduction, "sample_weight": weight}
    expected = value_and_grads(loss.function(x, *others, backend=backend, **options).sum(), x)
    for _ in range(2):  # from the second on, it knows its upstream
        found = value_and_grads(module(x, *others, sample_weight=weight).sum(), x)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


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


@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_a_softcap_leaves_what_is_masked(target: str, backend: str, device: torch.device) -> None:
    """A class of logit -inf stays without a probability, where cap tanh(x / cap) would give it e^-cap."""
    x, (y,), _ = data("ce", device)
    x = x.detach().index_fill(-1, torch.tensor([1, 4], device=device), -INF).requires_grad_()
    left = [0, 2, 3, 5]
    shares = uniform(N, 4, device=device).softmax(-1)
    whole = x.new_zeros(N, C).index_copy(-1, torch.tensor(left, device=device), shares)
    y = torch.tensor([0, 5, -100, 2, 3], device=device)
    targets, few = (y, torch.tensor([0, 3, -100, 1, 2], device=device)) if target == "classes" else (whole, shares)
    options: dict[str, Any] = {"logit_softcap": 2.0, "z_loss": 0.1}
    found = value_and_grads(bf.cross_entropy(x, targets, backend=backend, **options), x)
    leaf = x.detach()[:, left].requires_grad_()
    value, grad = value_and_grads(row_oracles.cross_entropy(leaf, few, **options), leaf)
    torch.testing.assert_close((found[0], found[1][:, left]), (value, grad), **DOUBLE)
    assert not found[1][:, [1, 4]].any()


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


REDUCTIONS = ("none", "sum", "mean", "batchmean")


@given(
    name=st.sampled_from(sorted(ROW_LOSSES)),
    rows=st.integers(1, 9),
    classes=st.integers(2, 40),
    reduction=st.sampled_from(REDUCTIONS),
    asked=st.sets(st.sampled_from(["weight", "sample_weight", "label_smoothing", "normalizer"])),
    cut=st.booleans(),
    seed=st.integers(0, 9),
    backend=st.sampled_from(["triton", "eager"]),
)
def test_any_shape_and_options(
    name: str, rows: int, classes: int, reduction: str, asked: set[str], cut: bool, seed: int, backend: str
) -> None:
    """Rows of any length, whole or in tiles, with any options, against the definition."""
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = ROW_LOSSES[name]
    drawn = {
        "weight": uniform(classes, device=device, seed=seed) + 0.1,
        "sample_weight": uniform(rows, device=device, seed=seed + 1),
        "label_smoothing": 0.3,
        "normalizer": 2.5,
    }
    options = {key: drawn[key] for key in sorted(asked & set(loss.takes)) if key != "normalizer" or reduction != "none"}
    options |= loss.options_of(classes) | {"reduction": reduction}
    x, others = logits(rows, classes, device=device, seed=seed), list(loss.second(rows, classes, device))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("softmax", "pairs") if cut else ():
            patch.setattr(f"bertloss_fast.kernels.{module}._LONGEST", 8)
            patch.setattr(f"bertloss_fast.kernels.{module}._TILE_OF_LONG", 32)
        found = value_and_grads(loss.function(x, *others, backend=backend, **options), x)
    torch.testing.assert_close(found, expected(loss, x, others, **options), **DOUBLE)
