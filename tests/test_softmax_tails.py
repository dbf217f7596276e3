"""The losses of rows far from 0, against mpmath: no clamp, no eps, no dead zone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mpmath
import pytest
import row_oracles
import torch
from cases import TOLERANCE, uniform
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf

INF, NAN = math.inf, math.nan
mpf = mpmath.mpf
Row = Sequence[Any]
Exact = tuple[Any, list[list[Any]]]  # a loss, and its gradient in each row of logits


@pytest.fixture(params=["triton", "eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the interpreter, many rows to a tile save time."""
    if request.param == "triton":
        for module in ("softmax", "pairs"):
            monkeypatch.setattr(f"bertloss_fast.kernels.{module}._MOST_ROWS", 32)
    return str(request.param)


def softmax(x: Row, temperature: float = 1.0) -> tuple[Row, Row]:
    """Probabilities and their logarithms."""
    x = [mpf(value) / mpf(temperature) for value in x]
    total = mpmath.fsum(mpmath.exp(value) for value in x)
    return [mpmath.exp(value) / total for value in x], [value - mpmath.log(total) for value in x]


def dot(weights: Row, values: Row) -> Any:
    """Of infinities, 0 times one is 0."""
    return mpmath.fsum(w * v for w, v in zip(weights, values, strict=True) if w)


def through(p: Row, slopes: Row) -> list[Any]:
    """The gradient in the logits, of the derivatives in the logarithms of p."""
    total = mpmath.fsum(slopes)
    return [slope - value * total for slope, value in zip(slopes, p, strict=True)]


def exact_cross_entropy(x: Row, target: Row) -> Exact:
    p, log_p = softmax(x)
    return -dot(target, log_p), [through(p, [-share for share in target])]


def exact_focal(x: Row, target: Row, gamma: float) -> Exact:
    (p, log_p), t = softmax(x), target.index(1)
    q = mpmath.fsum([*p[:t], *p[t + 1 :]])
    slopes = [mpf(0)] * len(x)
    slopes[t] = -(q**gamma) + (gamma * q ** (gamma - 1) * p[t] * log_p[t] if gamma and p[t] and q else 0)
    return -(q**gamma) * (log_p[t] if q or not gamma else 0), [through(p, slopes)]


def exact_poly(x: Row, target: Row, epsilon: float) -> Exact:
    p, log_p = softmax(x)
    missing = [mpmath.fsum([*p[:c], *p[c + 1 :]]) if share else 0 for c, share in enumerate(target)]
    slopes = [-share * (1 + mpf(epsilon) * p[c]) for c, share in enumerate(target)]
    return -dot(target, log_p) + mpf(epsilon) * dot(target, missing), [through(p, slopes)]


def exact_ldam(x: Row, target: Row, scale: float) -> Exact:
    inverse = [mpf(count) ** -0.25 for count in counts(len(x))]
    margins = [value / max(inverse) / 2 for value in inverse]
    shifted = [scale * (mpf(v) - share * m) for v, m, share in zip(x, margins, target, strict=True)]
    loss, [grad] = exact_cross_entropy(shifted, target)
    return loss, [[scale * value for value in grad]]


def divergence(log_p: Row, log_q: Row) -> Any:
    return mpmath.fsum(mpmath.exp(u) * (u - v) for u, v in zip(log_p, log_q, strict=True) if u != -INF)


def exact_distillation(x: Row, teacher: Row, target: Row | None, temperature: float = 2.0, alpha: float = 0.5) -> Exact:
    (p, log_p), (q, log_q) = softmax(x, temperature), softmax(teacher, temperature)
    loss = mpf(temperature) ** 2 * divergence(log_q, log_p)
    grad = [mpf(temperature) * (u - v) for u, v in zip(p, q, strict=True)]
    if target is None:
        return loss, [grad]
    nll, [of_nll] = exact_cross_entropy(x, target)
    share = mpf(alpha)
    return share * loss + (1 - share) * nll, [[share * u + (1 - share) * v for u, v in zip(grad, of_nll, strict=True)]]


def exact_r_drop(a: Row, b: Row, target: Row, alpha: float = 1.0) -> Exact:
    loss, grads = mpf(0), []
    for ours, other in ((a, b), (b, a)):
        (p, log_p), (q, log_q) = softmax(ours), softmax(other)
        nll, [of_nll] = exact_cross_entropy(ours, target)
        loss += (nll + alpha * divergence(log_p, log_q)) / 2
        of_both = through(p, [u * (lu - lv) - v if u else -v for u, lu, v, lv in zip(p, log_p, q, log_q, strict=True)])
        grads.append([(u + alpha * v) / 2 for u, v in zip(of_nll, of_both, strict=True)])
    return loss, grads


def exact_js(a: Row, b: Row) -> Exact:
    (p, log_p), (q, log_q) = softmax(a), softmax(b)
    log_m = [mpmath.log((u + v) / 2) if u + v else -INF for u, v in zip(p, q, strict=True)]
    grads = []
    for ours, logs in ((p, log_p), (q, log_q)):
        slopes = [u * (lu - m) / 2 if u else mpf(0) for u, lu, m in zip(ours, logs, log_m, strict=True)]
        grads.append(through(ours, slopes))
    return (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2, grads


def half(exact: Exact) -> Exact:
    """With half of the gradient: the other half is another tensor's."""
    return exact[0], [[value / 2 for value in exact[1][0]]]


def counts(classes: int) -> list[int]:
    return [(classes - c) ** 2 for c in range(classes)]


def hot(x: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, x.shape[-1]).to(x.dtype)


class Tail(NamedTuple):
    """A loss of logits and classes, and its definition for one row."""

    function: Callable[..., Any]
    exact: Callable[[Row, Row], Exact]
    integer: bool = True  # no power that is none


TAILS = {
    "ce": Tail(bf.cross_entropy, exact_cross_entropy),
    "ce-one-hot": Tail(lambda x, y, **options: bf.cross_entropy(x, hot(x, y), **options), exact_cross_entropy),
    **{
        f"focal-{gamma}": Tail(
            functools.partial(bf.softmax_focal_loss, gamma=gamma),
            functools.partial(exact_focal, gamma=gamma),
            gamma == int(gamma),
        )
        for gamma in (0.0, 0.5, 1.0, 2.0, 3.7)
    },
    **{
        f"poly-{epsilon}": Tail(
            functools.partial(bf.poly_cross_entropy, epsilon=epsilon), functools.partial(exact_poly, epsilon=epsilon)
        )
        for epsilon in (2.0, -0.5)
    },
    "poly-one-hot": Tail(
        lambda x, y, **options: bf.poly_cross_entropy(x, hot(x, y), **options),
        functools.partial(exact_poly, epsilon=2.0),
    ),
    "ldam": Tail(
        lambda x, y, **options: bf.ldam_loss(x, y, counts(x.shape[-1]), scale=1.0, **options),
        functools.partial(exact_ldam, scale=1.0),
    ),
    # Where the other part of a loss is 0, what is left is cross-entropy.
    "distillation-0": Tail(
        lambda x, y, **options: bf.distillation_loss(x, x.detach().flip(-1), y, alpha=0.0, **options),
        exact_cross_entropy,
    ),
    "r-drop-of-one": Tail(
        lambda x, y, **options: bf.r_drop_loss(x, x.detach(), y, **options),
        lambda x, t: half(exact_cross_entropy(x, t)),
    ),
}
# By how much the label is above the others, or one other above it: also around where softplus and the series of a
# fast logarithm change over, and where 1 - p is 0 in bf16, fp32 and fp64.
MARGINS = [0.0, 1e-3, 0.1, 1.0, 3.45, 6.0, 9.0, 13.0, 16.5, 17.4, 20.0, 24.0, 30.0, 36.7, 40.0, 52.0, 67.0, 80.0]
CLASSES = 5
TIES = [
    [0.0] * CLASSES,
    [-7.5] * CLASSES,
    [20.0] * CLASSES,
    [3.0, 3.0, -3.0, 3.0, -90.0],
    [-80.0, -80.0, 5.0, 5.0, 5.0],
]


@functools.cache
def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits that the dtype can hold, and the class of each row."""
    made = []
    below = uniform(len(MARGINS), 6, CLASSES, device=torch.device("cpu")) / 2
    for margin, jitter in zip(MARGINS, below, strict=True):
        for i, top in enumerate((margin / 2, 0.0, 80.0)):
            for j, sure in enumerate((True, False)):
                row = top - margin - jitter[2 * i + j]
                label = (len(made) + j) % CLASSES
                row[label] = top if sure else top - margin
                if not sure:
                    row[(label + 1) % CLASSES] = top
                made.append((row.tolist(), label))
    made += [(row, i % CLASSES) for i, row in enumerate(TIES)]
    x = torch.tensor([row for row, _ in made], dtype=torch.float64).to(dtype)
    return x, torch.tensor([label for _, label in made])


def exact_rows(exact: Callable[..., Exact], *arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The losses [N] and the gradients [N, C] of rows."""
    with mpmath.workdps(100):
        found = [exact(*row) for row in zip(*arguments, strict=True)]
        losses = torch.tensor([float(loss) for loss, _ in found], dtype=torch.float64)
        parts = zip(*(grads for _, grads in found), strict=True)
        values = [[[float(value) for value in row] for row in part] for part in parts]
    return losses, *(torch.tensor(part, dtype=torch.float64) for part in values)


@functools.cache
def exact_tail(loss: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = rows(dtype)
    return exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist())


def relative_error(ours: Tensor, true: Tensor, scale: Tensor | None = None) -> Tensor:
    """Where the true value is a normal number of our dtype; elsewhere nothing is promised."""
    normal = (true.abs() >= torch.finfo(ours.dtype).tiny) & (true.abs() <= torch.finfo(ours.dtype).max)
    error = (ours.cpu().double() - true).abs() / (true.abs() if scale is None else scale)
    return torch.where(normal, error.nan_to_num(INF), 0.0)


def of_torch(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> bool:
    """Whether the loss is torch's own on the CPU, whose tails are torch's."""
    own = loss.startswith("ce") and backend == "eager" and device.type == "cpu"
    return own and dtype in (torch.float32, torch.float64)


def limits(x: Tensor, integer: bool, backend: str) -> Tensor:
    """Of each row. In eager, the rounding of x - top alone is 1.9e-6 of the exponential where it is 40."""
    near = 2e-6 if backend == "triton" else 3e-6
    return torch.where(x.abs().amax(-1) <= 20, near, 1e-5) if integer else torch.full(x.shape[:-1], 2e-5)


def losses_and_grads(call: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """The losses, and the gradients of their sum."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    losses = call(*leaves)
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


def check(found: Sequence[Tensor], true: Sequence[Tensor], limit: Tensor, scale: Sequence[Tensor | None]) -> None:
    for ours, exact, of in zip(found, true, scale, strict=True):
        excess = relative_error(ours, exact, of) / (limit if exact.dim() == 1 else limit.unsqueeze(-1))
        at = tuple(int(i) for i in (excess == excess.max()).nonzero()[0])
        assert excess.max() <= 1, f"{ours[at]} at {at} instead of {exact[at]}, {excess.max():g} times the limit"


@pytest.mark.parametrize("loss", TAILS)
def test_fp32(loss: str, backend: str, device: torch.device) -> None:
    function, _, integer = TAILS[loss]
    x, y = rows(torch.float32)
    found = losses_and_grads(lambda leaf: function(leaf, y.to(device), reduction="none", backend=backend), x.to(device))
    if of_torch(loss, x.dtype, backend, device):
        theirs = losses_and_grads(lambda leaf: F.cross_entropy(leaf, y, reduction="none"), x)
        torch.testing.assert_close(found, theirs, **TOLERANCE[x.dtype])
        return
    check(found, exact_tail(loss, x.dtype), limits(x, integer, backend), (None, None))


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.bfloat16, "none"), (torch.float16, "sum")])
@pytest.mark.parametrize("loss", TAILS)
def test_16_bits(loss: str, dtype: torch.dtype, reduction: str, backend: str, device: torch.device) -> None:
    """What is left of 1 at the label is rounded once, and is not what two roundings leave, 0."""
    x, y = rows(dtype)
    leaf = x.to(device).requires_grad_()
    values = TAILS[loss].function(leaf, y.to(device), reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    true_loss, true_grad = exact_tail(loss, dtype)
    limit = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert relative_error(grad, true_grad).max() <= limit
    if reduction == "none":
        assert relative_error(values.detach(), true_loss).max() <= limit
    if dtype == torch.bfloat16 and loss.startswith("ce"):
        assert grad.count_nonzero() == true_grad.abs().ge(torch.finfo(dtype).tiny).sum()


SOFT = {
    "ce": (bf.cross_entropy, exact_cross_entropy),
    "poly": (bf.poly_cross_entropy, functools.partial(exact_poly, epsilon=2.0)),
}


@pytest.mark.parametrize("target", ["smoothed", "probabilities"])
@pytest.mark.parametrize("loss", SOFT)
def test_soft_targets_in_fp32(loss: str, target: str, backend: str, device: torch.device) -> None:
    """The gradient passes through 0, so that its error is held against the two parts of it."""
    function, exact = SOFT[loss]
    x, y = rows(torch.float32)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    if target == "smoothed":
        shares = hot(x.double(), y) * 0.9 + 0.1 / CLASSES
        found = losses_and_grads(
            lambda leaf: function(leaf, y.to(device), label_smoothing=0.1, **options), x.to(device)
        )
    else:
        shares = x.double().roll(1, 0).softmax(-1).float().double()
        found = losses_and_grads(lambda leaf: function(leaf, shares.float().to(device), **options), x.to(device))
    true = exact_rows(exact, x.tolist(), shares.tolist())
    check(found, true, limits(x, True, backend), (None, 3 * (x.double().softmax(-1) + shares)))


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Exact], bool, int]] = {
    "distillation": (bf.distillation_loss, exact_distillation, True, 1),
    "distillation-alone": (bf.distillation_loss, lambda x, z: exact_distillation(x, z, None), False, 1),
    "r-drop": (bf.r_drop_loss, exact_r_drop, True, 2),
    "js": (bf.js_div_loss, exact_js, False, 2),
}


def found_and_exact(
    loss: str, x: Tensor, z: Tensor, y: Tensor, backend: str, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Losses and gradients of two rows of logits, in float64."""
    function, exact, with_classes, trained = PAIRS[loss]
    classes = [y.to(device)] if with_classes else []
    leaves = [x.to(device), z.to(device)]
    constants = leaves[trained:]
    found = losses_and_grads(
        lambda *given: function(*given, *constants, *classes, reduction="none", backend=backend), *leaves[:trained]
    )
    true = exact_rows(exact, x.tolist(), z.tolist(), *([hot(x, y).tolist()] if with_classes else []))
    return tuple(value.double().cpu() for value in found), true


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("loss", PAIRS)
def test_pairs_in_fp32(loss: str, near: bool, backend: str, device: torch.device) -> None:
    """A difference of probabilities, or of their logarithms, is as accurate as these."""
    x, y = rows(torch.float32)
    z = x + uniform(*x.shape, device=torch.device("cpu"), seed=3).float() if near else x.roll(7, 0).roll(2, 1)
    found, true = found_and_exact(loss, x, z, y, backend, device)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-6)


# One logit in each row is what the name says, or several are; the label is the third.
INFINITE: dict[str, list[float]] = {
    "one": [1.0, -INF, 2.0, 0.5],
    "all but the label": [-INF, -INF, 2.0, -INF],
    "all but one other": [-INF, 3.0, 2.0, -INF],
    "the label": [1.0, 0.0, -INF, 0.5],
    "the label and one": [-INF, 0.0, -INF, 0.5],
    "all but one, which is not the label": [-INF, 1.0, -INF, -INF],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", TAILS)
def test_infinite_logits(loss: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """What the limit gives: no loss, or an infinite one with a finite gradient."""
    x, y = torch.tensor(list(INFINITE.values()), dtype=dtype), torch.full((len(INFINITE),), 2)
    found = losses_and_grads(
        lambda leaf: TAILS[loss].function(leaf, y.to(device), reduction="none", backend=backend), x.to(device)
    )
    true = exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist())
    assert true[0].isinf().sum() == 3
    torch.testing.assert_close([value.double().cpu() for value in found], list(true), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["both", "the second", "the first"])
@pytest.mark.parametrize("loss", PAIRS)
def test_infinite_logits_of_pairs(
    loss: str, hidden: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """In both alike, as a mask makes them, or in one alone: a class that p lacks is infinitely far for q, but in JS."""
    masked = torch.tensor(list(INFINITE.values()), dtype=dtype)
    whole = masked.nan_to_num(neginf=-3.0).roll(1, 1)
    x, z = (masked, whole) if hidden == "the first" else (whole, masked)
    if hidden == "both":
        x = torch.where(masked == -INF, -INF, whole)
    found, true = found_and_exact(loss, x, z, torch.full((len(x),), 2), backend, device)
    if loss == "r-drop" and hidden != "both":  # its gradient is infinite as well
        assert found[0].isinf().all()
        return
    tolerance = {"rtol": TOLERANCE[dtype]["rtol"], "atol": {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)}
    torch.testing.assert_close(found, true, **tolerance)


@pytest.mark.parametrize("loss", [*TAILS, *PAIRS])
def test_a_row_of_nothing_has_no_loss(loss: str, backend: str, device: torch.device) -> None:
    """Of a row of -inf alone torch makes NaN, as do we; its neighbours keep theirs."""
    x = torch.tensor([[0.5, 1.0, -2.0], [-INF] * 3, [1.0, 0.0, 3.0]], device=device).requires_grad_()
    y = torch.tensor([0, 1, 2], device=device)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    if loss in TAILS:
        losses = TAILS[loss].function(x, y, **options)
    else:
        losses = PAIRS[loss][0](x, x.detach().nan_to_num(neginf=0.0), *([y] if PAIRS[loss][2] else []), **options)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isnan().tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
    assert not grad[1].isfinite().all()


@pytest.mark.parametrize("hidden", ["first", "in the middle", "last", "all but the last tile"])
@pytest.mark.parametrize("loss", [*TAILS, *PAIRS])
def test_tiles_of_infinite_logits(
    loss: str, hidden: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in tiles of 32, of which some have nothing but -inf; the label is among what is left."""
    pytest.importorskip("triton", reason="Triton has no wheels outside Linux")
    from bertloss_fast.kernels import pairs, softmax

    for module in (softmax, pairs):
        monkeypatch.setattr(module, "_LONGEST", 16)
        monkeypatch.setattr(module, "_TILE_OF_LONG", 32)
    first, last = {"first": (0, 40), "in the middle": (30, 70), "last": (60, 80), "all but the last tile": (0, 64)}[
        hidden
    ]
    x, z = (20 * uniform(2, 80, device=torch.device("cpu"), seed=seed).float() - 10 for seed in (1, 2))
    x[:, first:last] = z[:, first:last] = -INF
    y = torch.tensor([20, 29] if first else [70, 79])
    if loss in PAIRS:
        found, true = found_and_exact(loss, x, z, y, "triton", device)
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
        return
    call = functools.partial(TAILS[loss].function, reduction="none", backend="triton")
    found = losses_and_grads(lambda leaf: call(leaf, y.to(device)), x.to(device))
    check(
        found,
        exact_rows(TAILS[loss].exact, x.tolist(), hot(x, y).tolist()),
        limits(x.clamp_min(0), False, "triton"),
        (None, None),
    )


class Sized(NamedTuple):
    """A loss for rows of any length."""

    function: Callable[..., Any]
    oracle: Callable[..., Tensor]
    exact: Callable[..., Exact]
    with_other: bool = False
    with_classes: bool = True


SIZED = {
    "ce": Sized(bf.cross_entropy, row_oracles.cross_entropy, exact_cross_entropy),
    "ce-one-hot": Sized(TAILS["ce-one-hot"].function, row_oracles.cross_entropy, exact_cross_entropy),
    "focal": Sized(bf.softmax_focal_loss, row_oracles.softmax_focal, functools.partial(exact_focal, gamma=2.0)),
    "poly": Sized(bf.poly_cross_entropy, row_oracles.poly, functools.partial(exact_poly, epsilon=2.0)),
    "ldam": Sized(
        TAILS["ldam"].function,
        lambda x, y, **options: row_oracles.ldam(x, y, counts(x.shape[-1]), scale=1.0, **options),
        TAILS["ldam"].exact,
    ),
    "distillation": Sized(bf.distillation_loss, row_oracles.distillation, exact_distillation, with_other=True),
    "r-drop": Sized(bf.r_drop_loss, row_oracles.r_drop, exact_r_drop, with_other=True),
    "js": Sized(bf.js_div_loss, row_oracles.js, exact_js, with_other=True, with_classes=False),
}


# One tile of many rows, of several, and of one; several tiles, of which the last is not full.
SIZES = [1, 2, 3, 127, 128, 1000, 30522, 32768, 50257, 131073]
SOME_SIZES = [1, 2, 128, 1000, 32768]


@pytest.mark.parametrize(
    ("loss", "classes"),
    [(loss, size) for loss in SIZED for size in (SIZES if loss in ("ce", "focal") else SOME_SIZES)],
)
def test_numbers_of_classes(loss: str, classes: int, backend: str, device: torch.device) -> None:
    """A sure row and a wrong one; of many classes, float64 is the oracle, where even the sure one is not very sure."""
    function, oracle, exact, with_other, with_classes = SIZED[loss]
    y = torch.tensor([classes // 2, classes - 1])
    x, z = (28 * uniform(2, classes, device=torch.device("cpu"), seed=seed).float() for seed in (1, 2))
    x[0], z[1] = x[0] - 20, z[1] - 20
    x[1], z[0] = x[1] - 8, z[0] - 8
    x[[0, 1], y] = torch.tensor([20.0, -20.0])
    given, constants = [x, z] if with_other else [x], [y] if with_classes else []
    trained = given if loss in ("r-drop", "js") else given[:1]
    others = [tensor.to(device) for tensor in (*given[len(trained) :], *constants)]
    found = losses_and_grads(
        lambda *leaves: function(*leaves, *others, reduction="none", backend=backend),
        *(tensor.to(device) for tensor in trained),
    )
    if classes <= 128:
        hots = [hot(x, y).tolist()] if with_classes else []
        true = exact_rows(exact, *(tensor.tolist() for tensor in given), *hots)
    else:
        rest = [*(tensor.double() for tensor in given[len(trained) :]), *constants]
        true = losses_and_grads(
            lambda *leaves: oracle(*leaves, *rest, reduction="none"), *(tensor.double() for tensor in trained)
        )
    if of_torch(loss, x.dtype, backend, device):
        torch.testing.assert_close(found, losses_and_grads(lambda leaf: F.cross_entropy(leaf, y, reduction="none"), x))
    elif with_other:
        # To 131072 small numbers, one after another, torch's log_softmax adds 1.
        rtol, atol = (1e-5, 1e-6) if backend == "triton" or classes <= 1000 else (1e-4, 1e-4)
        torch.testing.assert_close([value.double().cpu() for value in found], list(true), rtol=rtol, atol=atol)
    else:
        check(found, true, limits(x, True, backend), (None,) * len(true))
