"""The ranking losses against naive ones, list by list and pair by pair in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import list_oracles as oracles
import pytest
import torch
from cases import DOUBLE, TOLERANCE, value_and_grad
from torch import Tensor

import bertloss_fast as bf

BACKENDS = ("triton", "eager")


class Loss(NamedTuple):
    """A public loss beside the naive one of a list, and what its mean divides by."""

    function: Callable[..., Tensor]
    of_list: Callable[..., Tensor]
    options: dict[str, Any]
    mean_over: str = "lists"
    labels: bool = True


def pairs(weighting: str | None, function: Callable[..., Tensor] = bf.lambda_loss, **options: Any) -> Loss:
    given = options if function is bf.rank_net_loss else options | {"weighting": weighting}
    return Loss(function, lambda s, y, **o: oracles.ranked_pairs(s, y, weighting, **o)[0], given, "pairs")


LOSSES = {
    "rank_net": pairs(None, bf.rank_net_loss),
    "rank_net-k-sigma": pairs(None, bf.rank_net_loss, k=2, sigma=0.6),
    "lambda-unweighted": pairs(None),
    **{
        f"lambda-{weighting}{'' if k is None else '-k'}": pairs(weighting, k=k)
        for weighting in ("NDCGLoss1", "NDCGLoss2", "LambdaRank", "NDCGLoss2++")
        for k in (None, 3)
    },
    "lambda-options": pairs("NDCGLoss2++", mu=0.3, sigma=2.5, k=1),
    "list_net": Loss(bf.list_net_loss, oracles.list_net, {}),
    "list_mle": Loss(bf.list_mle_loss, oracles.list_mle, {}),
    "list_mle-as-it-comes": Loss(bf.list_mle_loss, lambda s: oracles.list_mle(s, None), {}, labels=False),
    "p_list_mle": Loss(bf.p_list_mle_loss, oracles.p_list_mle, {}),
    "p_list_mle-as-it-comes": Loss(bf.p_list_mle_loss, lambda s: oracles.p_list_mle(s, None), {}, labels=False),
    "adr_mse": Loss(bf.adr_mse_loss, oracles.adr_mse, {}, "documents"),
    "adr_mse-steep": Loss(bf.adr_mse_loss, oracles.adr_mse, {"alpha": 3.0}, "documents"),
    "negatives": Loss(bf.multiple_negatives_ranking_loss, oracles.multiple_negatives, {}, labels=False),
    "negatives-plain": Loss(
        bf.multiple_negatives_ranking_loss, oracles.multiple_negatives, {"scale": 0.7, "activation": None}, labels=False
    ),
}


class Lists(NamedTuple):
    scores: Tensor
    labels: Tensor
    given: dict[str, Tensor]  # mask or lengths
    mask: Tensor | None


def lists(kind: str, count: int = 3, length: int = 7) -> Lists:
    generator = torch.Generator().manual_seed(len(kind))
    scores = 3 * torch.randn(count, length, dtype=torch.float64, generator=generator)
    labels = torch.randint(-1, 4, (count, length), generator=generator)
    mask, given = None, {}
    if kind == "ragged":  # one full, one document, none
        lengths = torch.tensor([length, 1, 0] + [length // 2] * (count - 3))
        mask, given = torch.arange(length) < lengths.unsqueeze(1), {"lengths": lengths}
    elif kind == "holes":
        mask = torch.rand(count, length, generator=generator) < 0.6
        mask[:, 0] = True  # the positive of multiple negatives
        given = {"mask": mask}
    elif kind == "ties":
        scores = scores.round()
        scores[0] = 0
    elif kind == "nothing relevant":
        labels[0], labels[1] = 0, -1
    elif kind == "fractions":
        labels = 3 * torch.rand(count, length, dtype=torch.float64, generator=generator)
    return Lists(scores, labels, given, mask)


KINDS = ("full", "ragged", "holes", "ties", "nothing relevant", "fractions")
REDUCTIONS = ("mean", "none", "sum", "batchmean")


def expected_loss(loss: Loss, of: Lists, scores: Tensor, reduction: str) -> Tensor:
    """By the oracle; of multiple negatives, a list of a positive alone has none."""
    options = {name: value for name, value in loss.options.items() if name != "weighting"}
    losses = oracles.of_lists(loss.of_list, scores, of.labels if loss.labels else None, of.mask, **options)
    if reduction == "none":
        return losses
    mask = torch.ones_like(scores, dtype=torch.bool) if of.mask is None else of.mask
    count = {"lists": len(scores), "documents": mask.sum().item()}.get(loss.mean_over)
    if loss.mean_over == "pairs" and reduction == "mean":
        weighting = loss.options.get("weighting")
        of_pairs = (
            oracles.ranked_pairs(scores[row, mask[row]], of.labels[row, mask[row]].tolist(), weighting, **options)[1]
            for row in range(len(scores))
        )
        count = sum(of_pairs)
    divisor = {"sum": 1, "batchmean": len(scores), "mean": count}[reduction]
    return losses.sum() / max(divisor, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name: str, kind: str, backend: str, device: torch.device) -> None:
    """Reductions are rotated over the table; the upstream gradient is no 1, and of "none" none alike."""
    loss, of = LOSSES[name], lists(kind)
    reduction = REDUCTIONS[(list(LOSSES).index(name) + KINDS.index(kind)) % 4]
    naive = of.scores.clone().requires_grad_()
    expected = expected_loss(loss, of, naive, reduction)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape) / 3
    expected_grad = torch.autograd.grad(expected, naive, upstream)[0]

    scores = of.scores.to(device).requires_grad_()
    given = {key: value.to(device) for key, value in of.given.items()}
    labels = (of.labels.to(device),) if loss.labels else ()
    found = loss.function(scores, *labels, **given, reduction=reduction, backend=backend, **loss.options)
    value, grad = value_and_grad(found, scores, upstream.to(device))
    torch.testing.assert_close(value.cpu(), expected.detach(), **DOUBLE)
    torch.testing.assert_close(grad.cpu(), expected_grad, **DOUBLE)


@pytest.mark.parametrize("operand", ["scores", "labels", "mask"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_transposed_operands(name: str, backend: str, operand: str, device: torch.device) -> None:
    """What torch computes of them, such as their order, is transposed too."""
    loss, of = LOSSES[name], lists("holes", 3, 5)
    assert of.mask is not None
    given = {"scores": of.scores, "labels": of.labels, "mask": of.mask}
    tensors = {key: value.to(device) for key, value in given.items() if key != "labels" or loss.labels}
    options = loss.options | {"backend": backend}
    plain = tensors | {"scores": tensors["scores"].clone().requires_grad_()}
    expected = value_and_grad(loss.function(**plain, **options), plain["scores"])
    if operand in tensors:
        tensors[operand] = tensors[operand].T.contiguous().T
    leaf = tensors["scores"].detach().requires_grad_()
    found = value_and_grad(loss.function(**tensors | {"scores": leaf}, **options), leaf)
    torch.testing.assert_close(found, expected, **DOUBLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_lists_of_several_tiles(name: str, backend: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """More documents than a tile has rows or columns; in eager several blocks of rows, and of lists."""
    monkeypatch.setattr("bertloss_fast.ops.list_blocks.block_size", lambda like: 170)
    loss, of = LOSSES[name], lists("ragged", 3, 83)
    naive = of.scores.clone().requires_grad_()
    expected = value_and_grad(expected_loss(loss, of, naive, "mean"), naive)
    scores = of.scores.to(device).requires_grad_()
    given = {key: value.to(device) for key, value in of.given.items()}
    labels = (of.labels.to(device),) if loss.labels else ()
    found = value_and_grad(loss.function(scores, *labels, **given, backend=backend, **loss.options), scores)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The same scores, rounded; strided, and from more dimensions than one."""
    loss, of = LOSSES[name], lists("full", 4, 7)
    rounded = of.scores.to(dtype).to(device)
    naive = rounded.double().cpu().requires_grad_()
    expected, expected_grad = value_and_grad(expected_loss(loss, of, naive, "mean"), naive)
    strided = torch.stack([rounded, rounded], -1)[..., 0].view(2, 2, 7).requires_grad_()
    labels = (of.labels.to(device).view(2, 2, 7),) if loss.labels else ()
    value, grad = value_and_grad(loss.function(strided, *labels, backend=backend, **loss.options), strided)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype != torch.float32 else TOLERANCE[dtype]
    torch.testing.assert_close(value.cpu(), expected.float(), **tolerance)
    atol = {torch.float16: 2e-4, torch.bfloat16: 2e-3}.get(dtype, 1e-6) * expected_grad.abs().max().item()
    rtol = max(TOLERANCE[dtype]["rtol"], 1e-5)
    torch.testing.assert_close(grad.cpu().double().view(4, 7), expected_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, device: torch.device) -> None:
    """Of the kernels in float64, where scores are apart and ranks do not change; and of the gradient's gradient."""
    loss = LOSSES[name]
    of = lists("holes", 2, 5)
    given = {key: value.to(device) for key, value in of.given.items()}
    labels = (of.labels.to(device),) if loss.labels else ()

    def function(scores: Tensor) -> Tensor:
        return loss.function(scores, *labels, **given, reduction="none", backend="triton", **loss.options)

    scores = of.scores.to(device).requires_grad_()
    scans = "mle" in name  # element by element in the interpreter
    assert torch.autograd.gradcheck(function, scores, eps=1e-6, atol=1e-7, fast_mode=scans)
    assert torch.autograd.gradgradcheck(function, scores, eps=1e-6, atol=1e-6, fast_mode=scans)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name: str, backend: str, device: torch.device) -> None:
    """Whatever it holds."""
    loss, of = LOSSES[name], lists("full", 2, 5)
    trash = torch.tensor([math.nan, math.inf, -math.inf, 1e300], dtype=torch.float64).expand(2, 4)
    padded = torch.cat([of.scores, trash], 1).to(device).requires_grad_()
    labels = torch.cat([of.labels.double(), trash], 1).to(device)
    lengths = torch.tensor([5, 5], device=device)
    given = ((of.labels.to(device),), (labels,)) if loss.labels else ((), ())
    scores = of.scores.to(device).requires_grad_()
    expected = value_and_grad(loss.function(scores, *given[0], backend=backend, **loss.options), scores)
    found = value_and_grad(loss.function(padded, *given[1], lengths=lengths, backend=backend, **loss.options), padded)
    torch.testing.assert_close(found[0], expected[0], **DOUBLE)
    torch.testing.assert_close(found[1][:, :5], expected[1], **DOUBLE)
    assert not found[1][:, 5:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].labels])
def test_documents_have_no_order(name: str, backend: str, device: torch.device) -> None:
    """But for equal labels in ListMLE, which is why there are none."""
    loss, of = LOSSES[name], lists("full", 2, 7)
    shuffle = torch.tensor([3, 0, 6, 1, 5, 2, 4], device=device)
    labels = torch.tensor([[0, 5, 2, 1, 4, 3, 6], [6, 0, 4, 5, 1, 2, 3]], device=device)
    scores = of.scores.to(device).requires_grad_()
    value, grad = value_and_grad(loss.function(scores, labels, backend=backend, **loss.options), scores)
    shuffled = scores.detach()[:, shuffle].requires_grad_()
    found = value_and_grad(loss.function(shuffled, labels[:, shuffle], backend=backend, **loss.options), shuffled)
    torch.testing.assert_close(found, (value, grad[:, shuffle]), **DOUBLE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tails_of_pairs(backend: str, device: torch.device) -> None:
    """A confident pair, in the right order and in the wrong one, in fp32: relatively accurate loss and gradient."""
    for gap in (0.0, 1.0, 20.0, 80.0):
        scores = torch.tensor([[gap, 0.0]], device=device, requires_grad=True)
        for right in (True, False):
            labels = torch.tensor([[int(right), int(not right)]], device=device)
            exact = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
            expected = value_and_grad(-torch.nn.functional.logsigmoid(exact if right else -exact), exact)
            loss = bf.rank_net_loss(scores, labels, reduction_log="natural", backend=backend)
            value, grad = value_and_grad(loss, scores)
            torch.testing.assert_close(value.double().cpu(), expected[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(grad[0, 0].double().cpu(), expected[1], rtol=1e-5, atol=0)
            assert grad[0, 1] == -grad[0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores(backend: str, device: torch.device) -> None:
    """A difference counts up to 1e8, and one of two infinities is 0; NaN stays."""
    scores = torch.tensor([[math.inf, math.inf, 0.0, -math.inf]], device=device, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 3]], device=device)
    loss = bf.rank_net_loss(scores, labels, reduction="sum", reduction_log="natural", backend=backend)
    value, grad = value_and_grad(loss, scores)
    torch.testing.assert_close(value, torch.tensor(5e8 + math.log(2), device=device))
    torch.testing.assert_close(grad, torch.tensor([[0.5, -0.5, 0.0, 0.0]], device=device))
    far = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, math.inf, 1.0]], device=device, requires_grad=True)
    losses = bf.multiple_negatives_ranking_loss(far, activation=None, reduction="none", backend=backend)
    assert losses[0] == 0
    assert losses[1] > 1e37
    assert torch.autograd.grad(losses.sum(), far)[0].isfinite().all()
    nan = torch.tensor([[math.nan, 0.0, 1.0]], device=device)
    for name, one in LOSSES.items():
        given = (torch.tensor([[1, 0, 2]], device=device),) if one.labels else ()
        assert one.function(nan, *given, backend=backend, **one.options).isnan(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_list_mle_of_scores_far_apart(backend: str, device: torch.device) -> None:
    """A sum of exponentials would be infinite, and lose the rest of the list beside its first."""
    scores = torch.tensor([[200.0, 90.0, -100.0, -101.0, -320.0]], device=device, requires_grad=True)
    naive = scores.detach().double().cpu().requires_grad_()
    expected = value_and_grad(oracles.list_mle(naive[0], None), naive)
    found = value_and_grad(bf.list_mle_loss(scores, backend=backend), scores)
    torch.testing.assert_close(found[0].double().cpu(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double().cpu(), expected[1], rtol=3e-5, atol=1e-37)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "negatives"])  # a sigmoid of the scores themselves
def test_an_offset_of_all_scores(name: str, backend: str, device: torch.device) -> None:
    """Only differences of scores matter, to the digits that fp32 has of them; but not to a sigmoid of each."""
    loss, of = LOSSES[name], lists("ragged")
    scores = (of.scores * 16).round().div(16).float().to(device)  # which 1e5 leaves as they are
    given = ({"labels": of.labels.to(device)} if loss.labels else {}) | {"lengths": of.given["lengths"].to(device)}
    found = []
    for offset in (0.0, 2.0**17):
        leaf = (scores + offset).requires_grad_()
        found.append(value_and_grad(loss.function(leaf, **given, backend=backend, **loss.options), leaf))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_nothing_to_rank_in_a_compiled_graph(shape: tuple[int, int], backend: str, device: torch.device) -> None:
    scores = torch.zeros(shape, device=device, requires_grad=True)
    loss = torch.compile(lambda x: bf.rank_net_loss(x, torch.zeros_like(x), backend=backend), backend="aot_eager")
    value, grad = value_and_grad(loss(scores), scores)
    assert value == 0
    assert grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_weights(backend: str, device: torch.device) -> None:
    of, weight = lists("ragged"), [5.0, 3.0, 3.0, 0.5, 0.0, 1.0, 2.0]
    naive = of.scores.clone().requires_grad_()
    losses = oracles.of_lists(lambda s, y: oracles.list_mle(s, y, weight), naive, of.labels, of.mask)
    expected = [x.to(device) for x in value_and_grad(losses.mean(), naive)]
    scores, labels, lengths = (
        of.scores.to(device).requires_grad_(),
        of.labels.to(device),
        of.given["lengths"].to(device),
    )
    given = torch.tensor(weight, device=device)
    for form in (given, given.expand(3, 7)):
        loss = bf.p_list_mle_loss(scores, labels, lengths=lengths, lambda_weight=form, backend=backend)
        torch.testing.assert_close(list(value_and_grad(loss, scores)), expected, **DOUBLE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_weights_of_long_lists_stay_finite(backend: str, device: torch.device) -> None:
    """2^200 is no number of fp32, and its share of the sum is one."""
    scores = torch.linspace(-1, 1, 200, device=device, requires_grad=True)
    naive = scores.detach().double().cpu().requires_grad_()
    expected = value_and_grad(oracles.p_list_mle(naive, None), naive)
    found = value_and_grad(bf.p_list_mle_loss(scores, backend=backend), scores)
    torch.testing.assert_close([x.double().cpu() for x in found], list(expected), rtol=1e-5, atol=1e-9)


def test_eager_holds_no_tensor_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of half a megabyte, whatever the number of threads; all pairs of all lists would take 8 MiB each time."""
    block = 128 * 1024
    monkeypatch.setattr("bertloss_fast.ops.list_blocks.block_size", lambda like: block)
    scores = torch.randn(8, 512, requires_grad=True)
    labels = torch.randint(0, 3, (8, 512))
    for loss in (bf.lambda_loss, bf.adr_mse_loss):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss(scores, labels, backend="eager").backward()
        assert max(event.cpu_memory_usage for event in profile.events()) <= 4 * block


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_normalizer_and_nothing_to_rank(name: str, backend: str, device: torch.device) -> None:
    loss, of = LOSSES[name], lists("full")
    scores, given = of.scores.to(device), (of.labels.to(device),) if LOSSES[name].labels else ()
    options = loss.options | {"backend": backend}
    total = loss.function(scores, *given, reduction="sum", **options)
    for normalizer in (2.5, torch.tensor(2.5, device=device)):
        torch.testing.assert_close(loss.function(scores, *given, normalizer=normalizer, **options), total / 2.5)
    for shape in ((0, 5), (3, 0), (0, 0)):
        empty = torch.zeros(shape, device=device, requires_grad=True)
        labels = (torch.zeros(shape, device=device),) if loss.labels else ()
        value = loss.function(empty, *labels, **options)
        value.backward()
        assert value.item() == 0
        assert empty.grad is not None
    alone = torch.zeros(2, 4, device=device, requires_grad=True)
    labels = (torch.zeros(2, 4, device=device),) if loss.labels else ()
    value = loss.function(alone, *labels, lengths=torch.zeros(2, dtype=torch.int32, device=device), **options)
    value.backward()
    assert value.item() == 0
    assert not alone.grad.any()
