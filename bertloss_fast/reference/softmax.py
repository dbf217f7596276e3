"""The single-label family in plain PyTorch: the eager backend, and every derivative beyond the first.

A hard label t makes softmax a sigmoid: with u = log(sum of e^(x_j), j != t) - x_t, the probability of the label is
sigmoid(-u), of all others sigmoid(u), and cross-entropy is softplus(u). None of the three loses its digits at an end.
Class probabilities have no t; there the class of the greatest logit stands in its place.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class Spec(NamedTuple):
    """What a loss is, apart from its tensors."""

    formula: str
    params: tuple[float, ...]
    smoothing: float
    ignored: int
    softcap: float  # 0 for none
    z_loss: float
    reduction: str
    compute_dtype: torch.dtype
    loss_dtype: torch.dtype


class Operands(NamedTuple):
    """The tensors of a call."""

    inputs: Tensor  # [..., C]
    targets: Tensor | None = None  # [..., C]: class probabilities, or the logits of another model
    labels: Tensor | None = None  # [...]: classes
    weight: Tensor | None = None  # [C]
    margins: Tensor | None = None  # [C]
    sample_weight: Tensor | None = None  # [...]
    normalizer: Tensor | None = None  # []


class Denominators(NamedTuple):
    """What the sum of the losses is divided by, and that of what z_loss adds."""

    of_losses: int | Tensor
    of_z: int | Tensor


def loss(spec: Spec, operands: Operands) -> Tensor:
    """The loss, reduced, as differentiable operations."""
    losses, z = rows(spec, operands)
    if spec.reduction == "none":
        return (losses if z is None else losses + z).to(spec.loss_dtype)
    divided = denominators(spec, operands)
    total = losses.sum() / divided.of_losses
    return (total if z is None else total + z.sum() / divided.of_z).to(spec.loss_dtype)


def rows(spec: Spec, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """The loss of every row, [...], and what z_loss adds to it."""
    kept = keep(spec, operands)
    if kept is not None:  # what does not count is no source of NaN
        inputs = torch.where(kept.unsqueeze(-1), operands.inputs, 0)
        targets = None if operands.targets is None else torch.where(kept.unsqueeze(-1), operands.targets, 0)
        operands = operands._replace(inputs=inputs, targets=targets)
    return weigh(spec, operands, *_FORMULAS[spec.formula](spec, operands))


def weigh(spec: Spec, operands: Operands, losses: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """With the samples' weights, and nothing where no row counts."""
    kept = keep(spec, operands)
    if operands.sample_weight is not None:
        losses = losses * operands.sample_weight.to(losses.dtype)
    if kept is not None and operands.labels is not None:
        losses = torch.where(_is_class(operands), losses, torch.nan)  # a class out of range is loud
        losses = torch.where(kept, losses, 0)
        z = None if z is None else torch.where(kept, z, 0)
    return losses, z


def keep(spec: Spec, operands: Operands) -> Tensor | None:
    """Which rows count; None for all."""
    return None if operands.labels is None else operands.labels != spec.ignored


def _is_class(operands: Operands) -> Tensor:
    labels = cast(Tensor, operands.labels)
    return (labels >= 0) & (labels < operands.inputs.shape[-1])


def classes(operands: Operands) -> Tensor:
    """The labels as indices: 0 for what is no class."""
    return torch.where(_is_class(operands), cast(Tensor, operands.labels), 0).long()


def counts_weights(spec: Spec, operands: Operands) -> bool:
    """Whether a mean is one over weights, as torch's cross-entropy has it."""
    return spec.formula == "cross_entropy" and operands.weight is not None


def is_counted(spec: Spec, operands: Operands) -> bool:
    """Whether a denominator depends on data."""
    return spec.reduction == "mean" and operands.labels is not None and operands.normalizer is None


def denominators(spec: Spec, operands: Operands) -> Denominators:
    """Numbers where they do not depend on data."""
    if operands.normalizer is not None:
        number = operands.normalizer.to(spec.compute_dtype)
        return Denominators(number, number)
    if not is_counted(spec, operands):
        known = 1 if spec.reduction in ("none", "sum") else operands.inputs.shape[:-1].numel()
        per_row = operands.inputs.shape[-1] - 1 if spec.formula == "margin_mse" and spec.reduction == "mean" else 1
        return Denominators(max(known * per_row, 1), max(known, 1))
    assert operands.labels is not None
    kept = operands.labels != spec.ignored
    num_rows = kept.sum(dtype=spec.compute_dtype).clamp_min(1)
    if not counts_weights(spec, operands):
        return Denominators(num_rows, num_rows)
    assert operands.weight is not None
    weights = operands.weight.to(spec.compute_dtype)[classes(operands)]
    total = torch.where(kept, weights, 0).sum()
    return Denominators(torch.where(total == 0, torch.inf, total), num_rows)  # where nothing counts, the mean is 0


def logits(spec: Spec, x: Tensor) -> Tensor:
    """As the loss is of them."""
    x = x.to(spec.compute_dtype)
    if spec.softcap:
        x = torch.where(x == -torch.inf, -torch.inf, spec.softcap * _tanh(x / spec.softcap))
    return x * spec.params[0] if spec.formula == "ldam" else x


def _tanh(x: Tensor) -> Tensor:
    """torch's, whose derivative 1 - tanh^2 would be 0 from 9 on in float32."""
    large = x.abs() > 1
    e = torch.exp(-2 * torch.where(large, x, 1).abs())
    return torch.where(large, x.sign() * (1 - e) / (1 + e), torch.tanh(torch.where(large, 0, x)))


def wide(x: Tensor) -> Tensor:
    """In float64, where a device has it."""
    return x if x.device.type == "mps" else x.double()


class Row(NamedTuple):
    """Of each row, what a loss of the label alone is made of."""

    at: Tensor | None  # [..., C], true at the label, or at the greatest logit where there is none
    x_at: Tensor  # [..., 1]
    others: Tensor  # [..., 1], the logarithm of their sum, in float64
    u: Tensor  # [..., 1], others - x_at


def _row(spec: Spec, operands: Operands, x: Tensor, margins: Tensor | None = None) -> Row:
    at = x.detach().argmax(-1, keepdim=True) if operands.labels is None else classes(operands).unsqueeze(-1)
    marked = at == torch.arange(x.shape[-1], device=x.device)
    # torch 2.13's compiler for CPUs may read the gradient of gather before it is written; and a sum costs it nothing.
    x_at = torch.where(marked, x, 0).sum(-1, keepdim=True) if torch.compiler.is_compiling() else x.gather(-1, at)
    if margins is not None:
        x_at = x_at - spec.params[0] * margins.to(x.dtype)[at]
    lowest = torch.finfo(x.dtype).min
    others = x.masked_fill(marked, lowest)  # finite, for second derivatives
    top = others.detach().amax(-1, keepdim=True)
    log_sum = (others - top).exp().sum(-1, keepdim=True).log()
    # In float32 the rounding of u alone is a relative error of 4e-6 where it is 80.
    log_others = log_sum + wide(top)
    log_others = log_others.masked_fill(top == lowest, -torch.inf)
    return Row(marked, x_at, log_others, log_others - x_at)


def _softplus(u: Tensor) -> Tensor:
    return F.softplus(u, threshold=40)  # torch's 20 is 2e-9 off


def _classes(spec: Spec, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy, and the losses that are made of it."""
    x = logits(spec, operands.inputs)
    return of_row(spec, operands, _row(spec, operands, x, operands.margins), x)


def of_row(spec: Spec, operands: Operands, row: Row, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The losses of rows; a target that is on the label alone needs none of their logits."""
    dtype, num_classes = spec.compute_dtype, operands.inputs.shape[-1]
    weight = None if operands.weight is None else operands.weight.to(dtype)
    of_label = weight_of_label(spec, operands, weight)
    # Of the smoothed target: what is on the label, and what is spread over all classes.
    spread: Tensor | None = None
    if operands.targets is not None:
        spread = operands.targets.to(dtype) * (1 - spec.smoothing) + spec.smoothing / num_classes
    elif spec.smoothing and x is not None:
        spread = torch.full_like(x, spec.smoothing / num_classes)
    hard: float | Tensor = 0.0 if operands.targets is not None else 1 - spec.smoothing
    per_row: Tensor | None = None
    if spec.formula in ("focal", "ldam"):
        per_row = of_label
    else:
        spread = spread if spread is None or weight is None else spread * weight
        hard = hard if of_label is None else hard * of_label.unsqueeze(-1)
    nll = _softplus(row.u)
    # The log of the sum over all classes, from the greater part: x_at may be -inf.
    log_sum = torch.where(row.u > 0, row.others + _softplus(-row.u), row.x_at + nll).to(dtype)
    losses = hard * nll
    if spread is not None and x is not None and row.at is not None:
        absent = (x == -torch.inf) & (spread == 0)
        above = torch.where(row.at, nll.to(dtype), (log_sum - x).masked_fill(absent, 0))
        losses = losses + (spread * above).sum(-1, keepdim=True)
    if spec.formula == "poly":
        missing = hard * torch.sigmoid(row.u)
        if spread is not None and x is not None and row.at is not None:
            others = torch.where(row.at, torch.sigmoid(row.u).to(dtype), 1 - x.softmax(-1))
            missing = missing + (spread * others).sum(-1, keepdim=True)
        losses = losses + spec.params[0] * missing
    if spec.formula == "focal" and spec.params[0]:
        # Of the label's logit -inf, the factor is 1 without a slope.
        factor = torch.where(row.u == torch.inf, 1, torch.exp(spec.params[0] * F.logsigmoid(row.u)))
        losses = losses * factor
    losses = losses.squeeze(-1).to(dtype)
    losses = losses if per_row is None else losses * per_row
    return losses, spec.z_loss * log_sum.squeeze(-1).square() if spec.z_loss else None


def weight_of_label(spec: Spec, operands: Operands, weight: Tensor | None) -> Tensor | None:
    if weight is None or operands.labels is None:
        return None
    return weight[classes(operands)]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q); a class that p does not have adds 0."""
    absent = log_p == -torch.inf
    return torch.where(absent, 0, log_p.exp() * (log_p - log_q).masked_fill(absent, 0)).sum(-1)


def _distillation(spec: Spec, operands: Operands) -> tuple[Tensor, None]:
    temperature, alpha = spec.params
    assert operands.targets is not None
    x, teacher = operands.inputs.to(spec.compute_dtype), operands.targets.detach().to(spec.compute_dtype)
    kl = _kl((teacher / temperature).log_softmax(-1), (x / temperature).log_softmax(-1)) * temperature**2
    if operands.labels is None:
        return kl, None
    nll = _softplus(_row(spec, operands, x).u).squeeze(-1).to(x.dtype)
    if alpha in (0, 1):  # 0 times infinity is no 0
        return kl if alpha else nll, None
    return alpha * kl + (1 - alpha) * nll, None


def _r_drop(spec: Spec, operands: Operands) -> tuple[Tensor, None]:
    assert operands.targets is not None
    a, b = operands.inputs.to(spec.compute_dtype), operands.targets.to(spec.compute_dtype)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    nll = _softplus(_row(spec, operands, a).u) + _softplus(_row(spec, operands, b).u)
    nll = nll.squeeze(-1).to(a.dtype)
    if spec.params[0]:  # 0 times infinity is no 0
        nll = nll + spec.params[0] * (_kl(log_p, log_q) + _kl(log_q, log_p))
    return 0.5 * nll, None


def _js(spec: Spec, operands: Operands) -> tuple[Tensor, None]:
    assert operands.targets is not None
    log_p = operands.inputs.to(spec.compute_dtype).log_softmax(-1)
    log_q = operands.targets.to(spec.compute_dtype).log_softmax(-1)
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_m = torch.logaddexp(log_p.masked_fill(absent, 0), log_q.masked_fill(absent, 0)) - 0.6931471805599453
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m)), None


def _margin_mse(spec: Spec, operands: Operands) -> tuple[Tensor, None]:
    assert operands.targets is not None
    error = operands.inputs.to(spec.compute_dtype) - operands.targets.to(spec.compute_dtype)
    return (error[..., :1] - error[..., 1:]).square().sum(-1), None


def _z_loss(spec: Spec, operands: Operands) -> tuple[Tensor, Tensor]:
    """What z_loss adds, alone."""
    z = spec.z_loss * logits(spec, operands.inputs).logsumexp(-1).square()
    return torch.zeros_like(z), z


_FORMULAS = {
    "z_loss": _z_loss,
    "cross_entropy": _classes,
    "focal": _classes,
    "poly": _classes,
    "ldam": _classes,
    "distillation": _distillation,
    "r_drop": _r_drop,
    "js": _js,
    "margin_mse": _margin_mse,
}
