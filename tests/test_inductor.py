"""The inductor backend. Each pass compiled takes seconds: few of them, each for what another lets through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import list_oracles
import oracles
import pytest
import row_oracles
import torch
from cases import TOLERANCE, logits, uniform, value_and_grad
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import bertloss_fast as bf
from bertloss_fast.ops import dispatch

CPU = torch.device("cpu")
FOCAL = functools.partial(bf.sigmoid_focal_loss, reduction="mean", backend="inductor")
REASON = dispatch.why_not("inductor", CPU)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Pass(NamedTuple):
    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    targets: Callable[[Tensor], Any]  # of numbers between 0 and 1
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


def hard(share: Tensor) -> Tensor:
    return (share < 0.3).to(torch.uint8)


def classes(share: Tensor) -> Tensor:
    made = share.argmax(-1)
    made[1] = -100
    return made


PASSES = {
    # The closed form with everything that multiplies it, in the dtype that shows a slip in any digit.
    "focal": Pass(
        bf.sigmoid_focal_loss,
        oracles.sigmoid_focal,
        hard,
        {"gamma": 2.5, "alpha": 0.3, "pos_weight": torch.tensor(3.0), "label_smoothing": 0.1, "reduction": "mean"},
        torch.float64,
    ),
    # Rounded once, to 16 bits.
    "focal in bf16": Pass(bf.sigmoid_focal_loss, oracles.sigmoid_focal, hard, {"reduction": "sum"}, torch.bfloat16),
    "bce, soft": Pass(
        bf.binary_cross_entropy_with_logits, oracles.binary_cross_entropy, lambda share: share, {"reduction": "mean"}
    ),
    # No closed form of whole tensors: the compiler differentiates the plain operations.
    "softmax focal": Pass(bf.softmax_focal_loss, row_oracles.softmax_focal, classes, {"gamma": 2.0}),
    "lists": Pass(
        bf.rank_net_loss,
        lambda x, y, **options: list_oracles.of_lists(
            lambda s, labels: list_oracles.ranked_pairs(s, labels, None)[0], x, y, None
        ),
        lambda share: (3 * share).long(),
        {"reduction": "none"},
    ),
    "probabilities": Pass(
        bf.poly_cross_entropy,
        row_oracles.poly,
        lambda share: torch.nn.functional.one_hot(share.argmax(-1), share.shape[-1]).double(),
        {"epsilon": 2.0, "reduction": "none"},
        torch.float64,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def no_pass_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", PASSES)
def test_equals_the_definition_in_any_shape(name: str) -> None:
    """Compiled once, for shapes and upstreams of all kinds."""
    function, oracle, targets, options, dtype = PASSES[name]
    before = compilations()
    for rows, num_labels, factor in ((5, 7, 1.0), (31, 30, 0.3), (6, 6, -2.0)):
        x = logits(rows, num_labels, device=CPU, dtype=dtype)
        y = targets(uniform(rows, num_labels, device=CPU))
        exact = x.detach().double().requires_grad_()
        loss = function(x, y, backend="inductor", **options)
        value, grad = value_and_grad(loss, x, torch.full_like(loss, factor))
        true = oracle(exact, y, **options)
        true_value, true_grad = value_and_grad(true, exact, torch.full_like(true, factor))
        torch.testing.assert_close(grad, true_grad.to(dtype), **TOLERANCE[dtype])
        torch.testing.assert_close(value, true_value.to(value.dtype), rtol=max(TOLERANCE[dtype]["rtol"], 1e-6), atol=0)
    # Losses that are not reduced have a pass for their gradient.
    assert compilations() - before == (2 if options.get("reduction") == "none" else 1)


def test_what_backward_may_be_asked_for() -> None:
    """Twice, differentiated again, another upstream than what came last; sparse labels; no labels. One pass for all."""
    before = compilations()
    module = bf.SigmoidFocalLoss(reduction="mean", backend="inductor")
    for factor in (1.0, 0.25, 0.25, 3.0):
        x, y = logits(9, 12, device=CPU, dtype=torch.float32), uniform(9, 12, device=CPU) < 0.3
        exact = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(factor * oracles.sigmoid_focal(exact, y, reduction="mean"), exact)
        loss = module(x, bf.SparseLabels.from_dense(y))
        first, second = (torch.autograd.grad(factor * loss, x, retain_graph=True)[0] for _ in range(2))
        assert first.data_ptr() != second.data_ptr()
        for grad in (first, second):
            torch.testing.assert_close(grad, expected.float(), **TOLERANCE[torch.float32])
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (exact_grad,) = torch.autograd.grad(oracles.sigmoid_focal(exact, y, reduction="mean"), exact, create_graph=True)
    again = [torch.autograd.grad(g.square().sum(), z)[0] for g, z in ((grad, x), (exact_grad, exact))]
    torch.testing.assert_close(again[0], again[1].float(), rtol=1e-5, atol=1e-9)
    empty = torch.empty(0, 12, requires_grad=True)
    assert value_and_grad(module(empty, empty.detach()), empty)[0] == 0
    assert compilations() - before == 1


def test_as_plain_operations_where_torch_must_see_through() -> None:
    x, y = logits(4, 6, device=CPU), uniform(4, 6, device=CPU) < 0.3
    expected = value_and_grad(bf.sigmoid_focal_loss(x, y, reduction="mean", backend="eager"), x)
    torch.testing.assert_close(torch.func.grad(lambda z: FOCAL(z, y))(x.detach()), expected[1])
    compiled = torch.compile(lambda z: FOCAL(z, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled(x), x), expected)


def test_compiled_apart_from_hooks_and_autocast() -> None:
    """torch.func, with which a pass differentiates plain operations, runs under no hook of activation checkpointing."""
    x, y = logits(4, 6, device=CPU, dtype=torch.float32), uniform(4, 6, device=CPU) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpoint(lambda z: bf.zlpr_loss(1 * z, y, backend="inductor"), x, use_reentrant=False)
    exact = x.detach().double().requires_grad_()
    expected = value_and_grad(oracles.zlpr(exact, y, reduction="mean"), exact)
    torch.testing.assert_close(value_and_grad(loss, x), tuple(t.float() for t in expected), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("form", [torch.Tensor.float, bf.SparseLabels.from_dense])
def test_a_layer_on_it(form: Callable[[Tensor], Tensor | bf.SparseLabels], chunk_size: int | None) -> None:
    """The chunks' passes are the family's."""
    hidden, weight = logits(9, 4, device=CPU), logits(12, 4, device=CPU, seed=5)
    y = uniform(9, 12, device=CPU) < 0.3
    options = {"reduction": "mean", "chunk_size": chunk_size, "backend": "inductor"}
    loss = bf.linear_sigmoid_focal_loss(hidden, weight, form(y), **options)
    true = oracles.sigmoid_focal(hidden @ weight.T, y, reduction="mean")
    found, expected = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, true))
    torch.testing.assert_close((loss, *found), (true, *expected), rtol=1e-10, atol=1e-12)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ValueError, match=r"'inductor' cannot run on device 'cpu': .*no C.. compiler 'no-such-comp"):
            FOCAL(x, x)
    dispatch._why_not_compile.cache_clear()
    with torch._dynamo.config.patch(disable=True), pytest.raises(ValueError, match=r"torch.compile is disabled"):
        FOCAL(x, x)
    dispatch._why_not_compile.cache_clear()


def test_it_is_chosen_by_name_only() -> None:
    assert dispatch.resolve(None, CPU) != "inductor"
    bf.set_backend("inductor")
    try:
        assert dispatch.resolve(None, CPU) == "inductor"
    finally:
        bf.set_backend(None)
