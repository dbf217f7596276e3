"""The losses of rows at their edges: shapes, strides, dtypes, options, and what does not count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import row_oracles
import torch
from cases import DOUBLE, TOLERANCE, logits, uniform
from hypothesis import given
from hypothesis import strategies as st
from row_cases import ROW_LOSSES, cut_rows
from softmax_cases import LOSSES, OF_LABELS, C, N, data, expected, value_and_grads
from torch import Tensor

import bertloss_fast as bf

INF, NAN = math.inf, math.nan
OF_CLASSES = [name for name in OF_LABELS if "weight" in LOSSES[name].takes]
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
    monkeypatch.setattr("bertloss_fast.ops.softmax._SMALL", 0)
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 8)
    return str(request.param)


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


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_sum_to_0(
    dtype: torch.dtype, smoothing: float, z_loss: float, backend: str, device: torch.device
) -> None:
    """They leave nothing but what z_loss adds, which has no weights; of a linear layer too."""
    x = torch.linspace(-2, 2, 6, device=device).view(3, 2).to(dtype).requires_grad_()
    y, weight = torch.zeros(3, dtype=torch.long, device=device), torch.tensor([0.0, 1.0], device=device)
    options = {"weight": weight, "label_smoothing": smoothing, "z_loss": z_loss, "backend": backend}
    layer = torch.eye(2, device=device, dtype=dtype)
    true = z_loss * x.float().logsumexp(-1).square().mean()
    (true_grad,) = torch.autograd.grad(true, x)
    for loss in (bf.cross_entropy(x, y, **options), bf.linear_cross_entropy(x, layer, y, chunk_size=1, **options)):
        torch.testing.assert_close(loss, true.to(loss.dtype), rtol=1e-2, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], true_grad, rtol=2e-2, atol=1e-3 if z_loss else 0)


def test_the_product_of_two_weights_is_exact(backend: str, device: torch.device) -> None:
    x, y = torch.tensor([[0.5, -1.0]], device=device), torch.tensor([0], device=device)
    weight = torch.tensor([300.0, 1.0], dtype=torch.float16, device=device)
    loss = bf.softmax_focal_loss(x, y, alpha=weight, weight=weight, backend=backend)
    torch.testing.assert_close(loss, 90000 * bf.softmax_focal_loss(x, y, backend=backend))


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
        if cut:
            cut_rows(patch, longest=8, tile=32)
        found = value_and_grads(loss.function(x, *others, backend=backend, **options), x)
    torch.testing.assert_close(found, expected(loss, x, others, **options), **DOUBLE)
