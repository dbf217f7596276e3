"""The losses of rows by their definitions in mpmath, and how far from them a loss may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor
from torch.nn import functional as F

import bertloss_fast as bf

mpf = mpmath.mpf
Row = Sequence[Any]
Exact = tuple[Any, list[list[Any]]]  # a loss, and its gradient in each row of logits


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
    return mpmath.fsum(mpmath.exp(u) * (u - v) for u, v in zip(log_p, log_q, strict=True) if u != -math.inf)


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
    log_m = [mpmath.log((u + v) / 2) if u + v else -math.inf for u, v in zip(p, q, strict=True)]
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


def exact_rows(exact: Callable[..., Exact], *arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The losses [N] and the gradients [N, C] of rows."""
    with mpmath.workdps(100):
        found = [exact(*row) for row in zip(*arguments, strict=True)]
        losses = torch.tensor([float(loss) for loss, _ in found], dtype=torch.float64)
        parts = zip(*(grads for _, grads in found), strict=True)
        values = [[[float(value) for value in row] for row in part] for part in parts]
    return losses, *(torch.tensor(part, dtype=torch.float64) for part in values)


def relative_error(ours: Tensor, true: Tensor, scale: Tensor | None = None) -> Tensor:
    """Where the true value is a normal number of our dtype; elsewhere nothing is promised."""
    normal = (true.abs() >= torch.finfo(ours.dtype).tiny) & (true.abs() <= torch.finfo(ours.dtype).max)
    error = (ours.cpu().double() - true).abs() / (true.abs() if scale is None else scale)
    return torch.where(normal, error.nan_to_num(math.inf), 0.0)


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
