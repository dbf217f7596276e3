"""The ranking family's forward and backward: allocation, launches, and the choice of code.

A loss of pairs has n times as many operations as its gradient has elements: forward keeps the gradient of every list's
loss, [Q, n] in the dtype of the computation, and backward scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..reference import listwise as reference
from ..reference.listwise import SCHEMES, Operands, Ranked, Spec
from . import dispatch
from .autograd import compute_loss
from .compiled import register
from .families import Family, Gradients, Saved, Shape, Wanted
from .inductor import with_inductor
from .list_blocks import Found, adr_mse_in_blocks, list_mle_and_slopes, ranked_in_blocks
from .upstream import Expected

if dispatch.TRITON_ERROR is None:
    from ..kernels import listwise as list_kernels
    from ..kernels import listwise_pairs as pair_kernels


def listwise_loss(spec: Spec, operands: Operands, backend: str) -> Tensor:
    """A loss of the family, on valid arguments. Eager is plain operations where they are few."""
    few = backend == "eager" and spec.formula in ("list_net", "multiple_negatives")
    if few or (backend == "inductor" and torch.compiler.is_compiling()):  # which then compiles them
        return reference.loss(spec, operands)
    return compute_loss(FAMILY, spec, operands, backend)


def _forward(
    backend: str, spec: Spec, operands: Operands, expected: Expected | None, wanted: Wanted
) -> tuple[Tensor, Saved]:
    lists = _as_lists(operands)
    ranked = reference.rank(spec, lists) if spec.formula in SCHEMES else None
    if ranked is not None:
        if backend == "triton":
            fast = operands.inputs.element_size() == 2
            losses, slopes = _launch_ranked(spec, ranked, wanted.inputs, fast=fast)
        else:
            losses, slopes = ranked_in_blocks(spec, ranked, wanted.inputs)
    else:
        losses, slopes = _of_lists(backend, spec)(spec, lists, wanted.inputs)
    divided = reference.denominator(spec, lists, ranked)
    loss = losses.reshape(operands.inputs.shape[:-1]) if spec.reduction == "none" else losses.sum() / divided
    counted = divided if isinstance(divided, Tensor) and operands.normalizer is None else None
    return loss.to(spec.loss_dtype), Saved(denominator=counted, row_slopes=slopes)


def _backward(
    backend: str,
    spec: Spec,
    operands: Operands,
    saved: Saved,
    upstream: Tensor,
    expected: Expected | None,
    wanted: Wanted,
) -> Gradients:
    divided = reference.denominator(spec, operands, None) if saved.denominator is None else saved.denominator
    scale = (upstream.to(spec.compute_dtype) / divided).expand(operands.inputs.shape[:-1]).reshape(-1, 1)
    grad = cast(Tensor, saved.row_slopes) * scale
    return Gradients(grad.to(operands.inputs.dtype).view(operands.inputs.shape))


def _of_lists(backend: str, spec: Spec) -> Callable[[Spec, Operands, bool], Found]:
    if spec.formula == "adr_mse":
        return _launch_adr_mse if backend == "triton" else adr_mse_in_blocks
    scans = spec.formula.endswith("mle")
    return list_mle_and_slopes if scans and not _can_scan(backend, spec) else _launch_lists


def _can_scan(backend: str, spec: Spec) -> bool:
    """Not in float64 on a GPU: exponentials inside a scan take more registers there than a long list leaves."""
    return backend == "triton" and (dispatch.INTERPRETED or spec.compute_dtype != torch.float64)


def _as_lists(operands: Operands) -> Operands:
    """Every operand as [Q, n]."""
    length = operands.inputs.shape[-1]

    def lists(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, length).resolve_neg()

    inputs, targets, mask, weight = map(lists, operands[:4])
    return Operands(cast(Tensor, inputs), targets, mask, weight, operands.normalizer)


def _launch_lists(spec: Spec, lists: Operands, with_grad: bool) -> Found:
    losses, grads = _room(spec, lists.inputs, with_grad)
    labels = lists.targets if spec.formula == "list_net" else None
    order = _contiguous(reference.ranking(spec, lists)) if spec.formula.endswith("mle") else None
    weight = _contiguous(reference.position_weights(spec, lists))
    list_kernels.lists_launcher(
        spec.formula, spec.params, lists.inputs, labels, lists.mask, order, weight, losses, grads
    )
    return losses, grads


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    """What torch computes of operands has their strides, and it sorts along them."""
    return None if tensor is None else tensor.contiguous()


def _launch_ranked(spec: Spec, ranked: Ranked, with_grad: bool, *, fast: bool) -> Found:
    losses, grads = _room(spec, ranked.scores, with_grad)
    parts = losses.new_empty(len(losses), pair_kernels.num_parts(ranked.scores.shape[-1]))
    sigma, mu, _, log_scale = spec.params
    discounts = reference.inverse_discounts(ranked.scores)
    pair_kernels.ranked_launcher(
        spec.formula,
        (sigma, mu if spec.formula == "NDCGLoss2++" else 0.0, log_scale),
        spec.k,
        ranked.scores.contiguous(),
        ranked.gains.contiguous(),
        None if ranked.valid is None else ranked.valid.sum(-1),
        ranked.order.contiguous(),
        discounts,
        reference.gap_weights(discounts),
        parts,
        grads,
        fast=fast,
    )
    return parts.sum(-1), grads


def _launch_adr_mse(spec: Spec, lists: Operands, with_grad: bool) -> Found:
    losses, grads = _room(spec, lists.inputs, with_grad)
    pair_kernels.adr_mse_launcher(
        spec.params,
        reference.scores_of(spec, lists).contiguous(),
        reference.true_ranks(spec, lists).contiguous(),
        _contiguous(lists.mask),
        losses,
        grads,
        None if grads is None else torch.empty_like(grads),
        fast=lists.inputs.element_size() == 2,
    )
    return losses, grads


def _room(spec: Spec, inputs: Tensor, with_grad: bool) -> Found:
    losses = inputs.new_empty(len(inputs), dtype=spec.compute_dtype)
    return losses, inputs.new_empty(inputs.shape, dtype=spec.compute_dtype) if with_grad else None


def _loss_shape(spec: Spec, operands: Operands) -> Shape:
    return tuple(operands.inputs.shape[:-1]) if spec.reduction == "none" else ()


def _saved_shapes(spec: Spec, operands: Operands) -> tuple[Shape | None, Shape | None, Shape | None]:
    length = operands.inputs.shape[-1]
    slopes = operands.inputs.shape[:-1].numel(), length
    return () if reference.is_counted(spec, operands) else None, slopes, None


FAMILY = register(
    with_inductor(
        Family(
            "listwise",
            Spec,
            Operands,
            reference.loss,
            _forward,
            _backward,
            _loss_shape,
            _saved_shapes,
            whole=True,
            keeps_slopes=True,
        )
    )
)
