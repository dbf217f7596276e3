"""The eager backend's few passes over blocks of hard labels, and labels that are looked at when a block is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from cases import logits
from torch import Tensor

import bertloss_fast as bf
from bertloss_fast.ops import dispatch
from bertloss_fast.ops.blocks import are_surely_hard
from bertloss_fast.ops.few_labels import find_few
from bertloss_fast.ops.few_passes import FewPasses

CPU = torch.device("cpu")
BLOCKS, ROWS, LABELS = 4, 8, 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", ROWS * LABELS // threads)
    for module in ("small", "sigmoid"):
        monkeypatch.setattr(f"bertloss_fast.ops.{module}._SMALL", 0)
    monkeypatch.setattr("bertloss_fast.ops.sigmoid_eager._FEWER_OPERATIONS", 0)
    assert ROWS * LABELS % threads == 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each block that was offered, whether it was taken."""
    taken: list[bool] = []
    block = FewPasses.block

    def spy(self: FewPasses, *args: Any) -> Tensor | None:
        total = block(self, *args)
        taken.append(total is not None)
        return total

    monkeypatch.setattr(FewPasses, "block", spy)
    return taken


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of four blocks; half of the labels are 1, whatever their logits are."""
    x = logits(BLOCKS * ROWS, LABELS, device=CPU, dtype=dtype)
    return x, (logits(BLOCKS * ROWS, LABELS, device=CPU, dtype=torch.float32, seed=1).detach() > 0).float()


def assert_right(
    call: Callable[..., Tensor], oracle: Callable[..., Tensor], x: Tensor, y: Tensor, labels: Any, factor: float = 1.0
) -> None:
    """As the oracle in float64: loss, and gradient of ``factor`` times the loss."""
    exact = x.detach().double().requires_grad_()
    loss, true = call(x, labels), oracle(exact, y.double())
    ours = torch.autograd.grad(factor * loss.sum(), x)[0]
    theirs = torch.autograd.grad(factor * true.sum(), exact)[0]
    half = x.dtype == torch.bfloat16
    bound = 2**-8 if loss.dtype == torch.bfloat16 else 1e-4 if half else 2e-6
    torch.testing.assert_close(loss.double(), true, rtol=bound, atol=0)
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8 if half else 5e-6, atol=0)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "bce": (bf.binary_cross_entropy_with_logits, torch.nn.functional.binary_cross_entropy_with_logits, {}),
    "gamma 1": (bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": None, "gamma": 1.0}),
    "gamma 2": (bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": None, "gamma": 2.0}),
    "alpha": (bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": 0.25, "gamma": 2.0}),
    "alpha and gamma 1": (bf.sigmoid_focal_loss, oracles.sigmoid_focal, {"alpha": 0.8, "gamma": 1.0}),
}


def calls(case: str, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    function, oracle, own = CASES[case]
    return (
        lambda x, y: function(x, y, backend="eager", **own, **options),
        lambda x, y: oracle(x, y, **own, **{name: options[name] for name in ("reduction",)}),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", ["float", "bytes", "few", "sparse"])
def test_what_is_served(case: str, dtype: torch.dtype, labels: str, served: list[bool]) -> None:
    x, y = batch(dtype)
    if labels in ("few", "sparse"):
        y = torch.zeros_like(y).index_put_((torch.tensor([0, 9, 31]), torch.tensor([3, 0, 39])), torch.tensor(1.0))
    given = {"bytes": y.byte(), "sparse": bf.SparseLabels.from_dense(y)}.get(labels, y)
    call, oracle = calls(case, reduction="mean")
    assert_right(call, oracle, x, y, given)
    assert served == [True] * BLOCKS
    memory = bf.UpstreamMemory()
    call, oracle = calls(case, reduction="mean", upstream_memory=memory)
    for _ in range(2):  # what the first finds out the second's forward expects
        assert_right(call, oracle, x, y, given, factor=0.3125)
    assert all(served)
    assert len(served) == 4 * BLOCKS
    if dtype == torch.float32:
        call, oracle = calls(case, reduction="none")
        assert_right(call, oracle, x, y, given)
    assert all(served)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_call_of_one_block(
    case: str, dtype: torch.dtype, reduction: str, served: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertloss_fast.ops.blocks._BLOCK", 1 << 20)
    x, y = batch(dtype)
    call, oracle = calls(case, reduction=reduction)
    for shape in (x.shape, (BLOCKS, ROWS, LABELS)):
        of_shape, labels = x.detach().view(shape).requires_grad_(), y.view(shape)
        assert_right(call, oracle, of_shape, labels, labels, factor=0.3125)
    # A forward, and a backward for another upstream; not for one that is a tensor.
    assert served == [True] * (4 if reduction == "mean" else 2)
    served.clear()
    x, wrong = torch.full((2, 3), torch.inf, requires_grad=True), torch.zeros(2, 3)
    wrong[0, 0] = 1
    loss = call(x, wrong)
    assert loss.max() == torch.inf
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert served == [False]
    assert grad[0, 0] == 0
    assert grad.unique().numel() == 2
    assert grad[0, 1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hard_labels_by_their_bits(dtype: torch.dtype) -> None:
    room = torch.empty(1, dtype=dtype)
    for label in torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).split(1):
        is_hard = label.item() in (0, 1) and not label.signbit().item()
        assert are_surely_hard(label, room) == is_hard, label


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.05},
        {"gamma": 1.5},
        {"weight": torch.ones(LABELS)},
        {"label_smoothing": 0.1},
        {"alpha": torch.full((LABELS,), 0.25)},
    ],
)
def test_what_is_not(options: dict[str, Any], served: list[bool]) -> None:
    bf.sigmoid_focal_loss(*batch(), reduction="mean", backend="eager", **options)
    assert not served


@pytest.mark.parametrize("case", CASES)
def test_a_negative_normalizer_turns_the_loss(case: str, served: list[bool]) -> None:
    """As anything that divides would; the few passes add up magnitudes."""
    x, y = batch()
    call, oracle = calls(case, reduction="sum", normalizer=torch.tensor(-5.0))
    assert_right(call, lambda *args: oracle(*args) / -5, x, y, y)
    assert not served


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_with_another_default_dtype(case: str, dtype: torch.dtype, served: list[bool]) -> None:
    x, y = batch()
    call, oracle = calls(case, reduction="mean")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert_right(call, oracle, x, y, y)
    finally:
        torch.set_default_dtype(before)
    assert served == [True] * BLOCKS


@pytest.mark.parametrize("few", [True, False])
def test_deterministic_algorithms(few: bool, served: list[bool]) -> None:
    x, y = batch()
    if few:
        y.zero_()[0, 7] = 1
    call, oracle = calls("alpha", reduction="mean")
    torch.use_deterministic_algorithms(True)
    try:
        assert_right(call, oracle, x, y, y)
        weighted = bf.sigmoid_focal_loss(x, y, reduction="mean", weight=torch.ones(LABELS), backend="eager")
    finally:
        torch.use_deterministic_algorithms(False)
    assert served == [True] * BLOCKS
    torch.testing.assert_close(weighted, call(x, y))


@pytest.mark.parametrize("logit", [100.0, 3e38, float("inf")])
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("few", [True, False])
def test_a_block_with_a_logit_whose_exponential_is_infinite(
    logit: float, label: float, few: bool, served: list[bool]
) -> None:
    """It goes the longer way: the limit's loss and slope, and the others' as without it."""
    x, y = batch()
    if few:
        y.zero_()[5, 5] = 1
    y[3, 4] = label
    assert (find_few(y, later=True).places is not None) == few
    rest = torch.autograd.grad(bf.sigmoid_focal_loss(x, y, reduction="sum", backend="eager"), x)[0]
    others = torch.ones_like(y, dtype=torch.bool)
    others[3, 4] = False
    for sign in (1, -1):
        with torch.no_grad():
            x[3, 4] = sign * logit
        loss = bf.sigmoid_focal_loss(x, y, reduction="none", backend="eager")
        served.clear()
        total = bf.sigmoid_focal_loss(x, y, reduction="sum", backend="eager")
        grad = torch.autograd.grad(total, x)[0]
        wrong = (label == 0) == (sign == 1)
        if wrong and not (few and label):  # what is left out of a block does not count there
            assert not served[0]
        assert all(served[1:])
        weight = 0.25 if label else 0.75
        assert loss[3, 4].item() == (torch.tensor(weight) * logit if wrong else 0)
        assert total.isinf() == (wrong and logit == torch.inf)
        torch.testing.assert_close(grad[3, 4], torch.tensor((weight if label == 0 else -weight) if wrong else 0.0))
        torch.testing.assert_close(grad[others], rest[others], rtol=1e-5, atol=1e-9)


LATE = (
    "eager",
    pytest.param("inductor", marks=pytest.mark.skipif(bool(dispatch.why_not("inductor", CPU)), reason="no compiler")),
)


@pytest.mark.parametrize("backend", LATE)
@pytest.mark.parametrize("case", ["bce", "alpha"])
def test_soft_labels_that_are_seen_late(case: str, backend: str) -> None:
    x, y = batch()
    y[-1, -1] = 0.3
    assert find_few(y, later=True) == (None, None)
    function, oracle, options = CASES[case]
    exact = x.detach().double().requires_grad_()
    ours = function(x, y, reduction="mean", backend=backend, **options)
    theirs = oracle(exact, y.double(), reduction="mean", **options)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=0)
    grads = torch.autograd.grad(ours, x)[0].double(), torch.autograd.grad(theirs, exact)[0]
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("backend", LATE)
@pytest.mark.parametrize("value", [1.5, -0.25, float("inf")])
def test_no_probability_that_is_seen_late(value: float, backend: str) -> None:
    """An error, but where it does not count, or where torch takes it."""
    x, y = batch()
    hard = y.clone()
    y[-1, -1] = value
    with pytest.raises(ValueError, match=rf"^targets: expected values from 0 to 1, got {value:g}$"):
        bf.sigmoid_focal_loss(x, y, reduction="mean", backend=backend)
    if value != float("inf"):  # inf - inf in torch's
        ours = bf.binary_cross_entropy_with_logits(x, y, backend=backend)
        torch.testing.assert_close(ours, torch.nn.functional.binary_cross_entropy_with_logits(x, y))
    mask = torch.ones_like(y, dtype=torch.bool)
    mask[-1, -1] = False
    losses = [bf.sigmoid_focal_loss(x, t, reduction="mean", mask=mask, backend=backend) for t in (y, hard)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("backend", LATE)
def test_a_logit_that_is_nan_among_hard_labels(backend: str) -> None:
    x, y = batch()
    with torch.no_grad():
        x[-1, -1] = torch.nan
    loss = bf.sigmoid_focal_loss(x, y, reduction="sum", backend=backend)
    grad = torch.autograd.grad(loss, x)[0]
    assert loss.isnan()
    assert grad.isnan().nonzero().tolist() == [[len(x) - 1, LABELS - 1]]
