"""The single-label family's forward and backward: losses of a row of logits and a class, and of two rows of logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import functional as F

from ..reference import softmax as reference
from ..reference.softmax import Denominators, Operands, Spec
from . import dispatch
from .autograd import compute_loss
from .blocks import block_size
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .inductor import with_inductor
from .inner import inner_autograd
from .upstream import Expected, UpstreamMemory, number_that_came

if dispatch.TRITON_ERROR is None:
    from ..kernels.upstream import Upstream
    from .launch import expected_upstream, upstream_of
    from .softmax_launch import counted_denominators, launch, new_partials, sum_partials

_PAIRS = ("distillation", "r_drop", "js", "margin_mse")
# Of these the second logits are trained too.
_SYMMETRIC = ("r_drop", "js", "margin_mse")
# Of so few logits the plain operations under torch's own autograd are done before a Function and its blocks have begun.
_SMALL = 16384


def softmax_loss(spec: Spec, operands: Operands, backend: str, memory: UpstreamMemory | None = None) -> Tensor:
    """A loss of the family, on valid arguments."""
    if backend == "eager" and _is_torch_s(spec, operands):
        loss = _torch_cross_entropy(spec, operands)
        # The probability 0 of a logit of -inf makes it NaN in torch.
        if operands.targets is None or not loss.isnan().any():
            return loss
    if backend == "eager" and operands.inputs.device.type == "cpu" and operands.inputs.numel() <= _SMALL:
        return reference.loss(spec, operands)
    return compute_loss(_SYMMETRIC_PAIRS if spec.formula in _SYMMETRIC else FAMILY, spec, operands, backend, memory)


def _is_torch_s(spec: Spec, operands: Operands) -> bool:
    """Whether torch's own kernel for the CPU serves, which is the best there is; of 16 bits it rounds too often."""
    return (
        spec.formula == "cross_entropy"
        and spec.z_loss == spec.softcap == 0
        and operands.inputs.dtype == spec.compute_dtype
        and operands.inputs.device.type == "cpu"
        and operands.inputs.numel() > 0
        and not dispatch.needs_plain_operations()
    )


def _torch_cross_entropy(spec: Spec, operands: Operands) -> Tensor:
    num_classes = operands.inputs.shape[-1]
    # A view's gradient is a view, which autograd would copy for a leaf.
    inputs = operands.inputs if operands.inputs.dim() == 2 else operands.inputs.reshape(-1, num_classes)
    kept = reference.keep(spec, operands)
    by_row = spec.reduction == "none" or operands.sample_weight is not None
    if operands.labels is None:
        target = cast(Tensor, operands.targets).to(spec.compute_dtype).reshape(-1, num_classes)
    else:
        target = operands.labels.reshape(-1).long()
        counts = cast(Tensor, kept).reshape(-1)
        if not counts.all():  # what does not count is no source of NaN, and takes no time
            inputs = torch.where(counts.unsqueeze(-1), inputs, 0) if by_row else inputs[counts]
            target = target if by_row else target[counts]
    weight = None if operands.weight is None else operands.weight.to(spec.compute_dtype)

    def compute(reduction: str) -> Tensor:
        return F.cross_entropy(inputs, target, weight, None, spec.ignored, None, reduction, spec.smoothing)

    if by_row:
        losses, _ = reference.weigh(spec, operands, compute("none").reshape(operands.inputs.shape[:-1]), None)
        if spec.reduction == "none":
            return losses.to(spec.loss_dtype)
        return (losses.sum() / reference.denominators(spec, operands).of_losses).to(spec.loss_dtype)
    if spec.reduction == "mean" and operands.normalizer is None:
        loss = compute("mean")
        if loss.item() == loss.item() or operands.labels is None:
            return loss.to(spec.loss_dtype)
    # Where no target counts, torch divides by 0.
    return (compute("sum") / reference.denominators(spec, operands).of_losses).to(spec.loss_dtype)


def _loss_shape(spec: Spec, operands: Operands) -> Shape:
    return tuple(operands.inputs.shape[:-1]) if spec.reduction == "none" else ()


def _saved_shapes(spec: Spec, operands: Operands) -> tuple[Shape | None, Shape | None, Shape | None]:
    return (2,) if reference.is_counted(spec, operands) else None, None, None


def as_rows(operands: Operands) -> Operands:
    """Every operand as [N, C], [N] or [C], by views wherever strides allow them."""
    num_classes = operands.inputs.shape[-1]

    def matrix(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, num_classes).resolve_neg()

    def vector(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1).resolve_neg().contiguous()

    return operands._replace(
        inputs=cast(Tensor, matrix(operands.inputs)),
        targets=matrix(operands.targets),
        labels=vector(operands.labels),
        weight=vector(operands.weight),
        margins=vector(operands.margins),
        sample_weight=vector(operands.sample_weight),
    )


def _forward(
    backend: str,
    spec: Spec,
    operands: Operands,
    expected: Expected | None,
    wanted: Wanted,
    room: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    num_rows_of = operands.inputs.shape[:-1]
    grads = _new_gradients(operands, wanted) if room is None else Gradients(room if wanted.inputs else None)
    rows, flat = as_rows(operands), _flat(grads)
    counted, divided = _denominators(spec, rows, backend)
    if backend == "triton":
        upstream, note = expected_upstream(expected, grads.inputs if grads.targets is None else grads.targets)
        reduced = spec.reduction != "none"
        loss = operands.inputs.new_empty(() if reduced else num_rows_of, dtype=spec.loss_dtype)
        partials = new_partials(spec, rows) if reduced else None
        launch(spec, rows, divided, upstream, None, loss if partials is None else partials, flat)
        if partials is not None:
            sum_partials(partials, loss)
    else:
        note = None if expected is None else expected.value
        losses = _eager(spec, rows, divided, note, flat)
        loss = losses.reshape(num_rows_of) if spec.reduction == "none" else losses.sum()
        loss = loss.to(spec.loss_dtype)
    return loss, Saved(grads, note=note, denominator=counted)


def _backward(
    backend: str,
    spec: Spec,
    operands: Operands,
    saved: Saved,
    upstream: Tensor,
    expected: Expected | None,
    wanted: Wanted,
) -> Gradients:
    written = any(grad is not None for grad in saved.grads)
    if backend == "eager":
        number = number_that_came(upstream, expected)
        if saved.is_written_for(number):
            return saved.grads
    grads = saved.grads if written else _new_gradients(operands, wanted)
    rows, flat = as_rows(operands), _flat(grads)
    if saved.denominator is None:
        divided = _denominators(spec, rows, backend)[1]
    else:
        divided = Denominators(saved.denominator[0], saved.denominator[1])
    if backend == "triton":
        if any(upstream.stride()):
            launch(spec, rows, divided, Upstream(), upstream.reshape(-1).contiguous(), None, flat)
        else:
            launch(spec, rows, divided, upstream_of(upstream, saved, expected), None, None, flat, written=written)
    else:
        each = upstream.to(spec.compute_dtype).expand(operands.inputs.shape[:-1]).reshape(-1)
        _eager(spec, rows, divided, each, flat)
    return grads


def _new_gradients(operands: Operands, wanted: Wanted) -> Gradients:
    targets = operands.targets
    return Gradients(
        operands.inputs.new_empty(operands.inputs.shape) if wanted.inputs else None,
        targets.new_empty(targets.shape) if wanted.targets and targets is not None else None,
    )


def _flat(grads: Gradients) -> Gradients:
    return Gradients(*(None if grad is None else grad.view(-1, grad.shape[-1]) for grad in grads))


def _denominators(spec: Spec, operands: Operands, backend: str) -> tuple[Tensor | None, Denominators]:
    """What is counted, [2] for backward, and the denominators."""
    if not reference.is_counted(spec, operands):
        return None, reference.denominators(spec, operands)
    counted = None
    if backend == "triton":
        counted = counted_denominators(spec, operands)
    if counted is None:
        counted = torch.stack(cast(tuple[Tensor, Tensor], reference.denominators(spec, operands)))
    return counted, Denominators(counted[0], counted[1])


def _eager(spec: Spec, operands: Operands, divided: Denominators, upstream: Tensor | None, grads: Gradients) -> Tensor:
    """The loss of each row, [N], and the gradients: plain operations under autograd, on the CPU in blocks of rows.

    An upstream is a scalar, or [N].
    """
    losses = operands.inputs.new_empty(len(operands.inputs), dtype=spec.compute_dtype)
    of_labels = _is_of_labels(spec, operands)
    block = _label_block if of_labels else _block
    for rows, part in _parts(operands, _ROUNDS if of_labels else 1):
        each = None if upstream is None else upstream.expand(len(losses))[rows].contiguous()
        wanted = tuple(grad for grad in grads if grad is not None)
        rooms = [None if grad is None else grad[rows] for grad in grads[:2]]
        # What is written is not what autograd saved for a second use: its version stays.
        with _unsafe_preserve_version_counter(wanted):
            losses[rows], found = block(spec, part, divided, each, rooms)
            for room, values in zip((room for room in rooms if room is not None), found, strict=True):
                if room is not values:
                    room.copy_(values)
    return losses


def _block(
    spec: Spec, part: Operands, divided: Denominators, upstream: Tensor | None, rooms: list[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The losses of some rows, and the gradients for which there is room, by plain operations."""
    wanted = [room is not None for room in rooms]
    with inner_autograd() if any(wanted) else nullcontext():
        leaves = [part.inputs.detach(), None if part.targets is None else part.targets.detach()]
        sources = [cast(Tensor, leaf).requires_grad_() for leaf, asked in zip(leaves, wanted, strict=True) if asked]
        part = part._replace(inputs=cast(Tensor, leaves[0]), targets=leaves[1])
        of_rows = _divided(*reference.rows(spec, part), divided)
        found = torch.autograd.grad(of_rows, sources, _upstream_of_rows(of_rows, upstream)) if sources else ()
    return of_rows.detach(), found


def _is_of_labels(spec: Spec, operands: Operands) -> bool:
    """Whether the target is on the label alone, so that what autograd needs is a number or two a row."""
    return operands.targets is None and spec.smoothing == 0 and spec.formula != "z_loss"


def _label_block(
    spec: Spec, part: Operands, divided: Denominators, upstream: Tensor | None, rooms: list[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The same where u tells all: its derivative in the other logits is their share of the probability.

    That is summed up without the label's, so that it keeps its digits where it is small.
    """
    room = rooms[0]
    wanted = room is not None
    kept = cast(Tensor, reference.keep(spec, part))
    x = reference.logits(spec, part.inputs.detach())
    if not kept.all():  # what does not count is no source of NaN
        x = x.masked_fill(~kept.unsqueeze(-1), 0)
    at = reference.classes(part).unsqueeze(-1)
    x_at = x.gather(-1, at)
    if part.margins is not None:
        x_at -= spec.params[0] * part.margins.to(x.dtype)[at]
        x = x.scatter(-1, at, x_at)
    # What becomes the gradient is made in its place, unless that is the logits' own or of another dtype.
    in_place = room is not None and room.dtype == x.dtype and room.data_ptr() != part.inputs.data_ptr()
    probabilities = torch.softmax(x, -1, out=room if in_place else None)
    p = reference.wide(probabilities.gather(-1, at))
    of_others = reference.wide(probabilities.scatter_(-1, at, 0).sum(-1, keepdim=True))
    p, q = p / (p + of_others), of_others / (p + of_others)  # softmax adds up less carefully than sum
    log_sum = x_at - torch.where(q < 0.5, torch.log1p(-q), p.log())
    unlikely = (p < 1e-30).squeeze(-1)
    if unlikely.any():  # where the logarithm of p would be wrong
        log_sum[unlikely] = reference.wide(x[unlikely]).logsumexp(-1, keepdim=True)
    log_others = log_sum + q.log()
    with inner_autograd() if wanted else nullcontext():
        log_others, x_at = log_others.requires_grad_(wanted), x_at.requires_grad_(wanted)
        row = reference.Row(None, x_at, log_others, log_others - x_at)
        of_rows = _divided(*reference.weigh(spec, part, *reference.of_row(spec, part, row)), divided)
        if not wanted:
            return of_rows, ()
        each = _upstream_of_rows(of_rows, upstream)
        slope, slope_at = torch.autograd.grad(of_rows, [log_others, x_at], each)
    share = torch.where(of_others == 0, 0, slope / of_others).to(x.dtype)
    gradient = probabilities.mul_(share).scatter_(-1, at, slope_at)
    if spec.softcap:
        e = torch.exp(-2 * (part.inputs.detach().to(x.dtype) / spec.softcap).abs())
        gradient *= torch.where(kept.unsqueeze(-1), 4 * e / (1 + e).square(), 0)
    elif spec.formula == "ldam":
        gradient *= spec.params[0]
    return of_rows.detach(), (gradient,)


def _divided(losses: Tensor, z: Tensor | None, divided: Denominators) -> Tensor:
    losses = losses / divided.of_losses
    return losses if z is None else losses + z / divided.of_z


def _upstream_of_rows(losses: Tensor, upstream: Tensor | None) -> Tensor:
    return torch.ones_like(losses) if upstream is None else upstream


# What is done once a block costs as much as a few hundred thousand elements.
_ROUNDS = 8


def _parts(operands: Operands, rounds: int) -> Iterator[tuple[slice, Operands]]:
    """Rows in groups that stay in the cache."""
    step = max(rounds * block_size(operands.inputs) // operands.inputs.shape[1], 1)
    for start in range(0, len(operands.inputs), step):
        rows = slice(start, min(start + step, len(operands.inputs)))
        yield rows, cut_rows(operands, rows)


def cut_rows(operands: Operands, rows: slice) -> Operands:
    """Of operands that are rows."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return operands._replace(
        inputs=operands.inputs[rows],
        targets=cut(operands.targets),
        labels=cut(operands.labels),
        sample_weight=cut(operands.sample_weight),
    )


_FAMILY = Family("softmax", Spec, Operands, reference.loss, _forward, _backward, _loss_shape, _saved_shapes)
FAMILY = register(with_inductor(_FAMILY))
_SYMMETRIC_PAIRS = register(with_inductor(_FAMILY._replace(name="symmetric", grads_of_targets=True)))
