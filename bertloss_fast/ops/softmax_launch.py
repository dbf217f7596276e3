"""The launches of the single-label family, and the memory that they need."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import pairs, passes, rows, softmax
from ..kernels.pair_formulas import FORMULAS
from ..kernels.upstream import Upstream
from ..reference.softmax import Denominators, Operands, Spec, counts_weights
from .families import Gradients


def _loss_of(spec: Spec) -> rows.Loss:
    scaled = spec.formula == "ldam"
    return rows.Loss(
        formula=spec.formula,
        params=spec.params,
        smoothing=spec.smoothing,
        ignored=spec.ignored,
        softcap=spec.softcap,
        scale=spec.params[0] if scaled else 1.0,
        z_loss=spec.z_loss,
        spread_weight=spec.formula in ("cross_entropy", "poly"),
    )


def _tensors_of(operands: Operands) -> rows.Operands:
    factors = () if operands.sample_weight is None else (operands.sample_weight,)
    return rows.Operands(*operands[:5], factors)


def _is_pair(spec: Spec) -> bool:
    return spec.formula in FORMULAS


def new_partials(spec: Spec, operands: Operands) -> Tensor:
    """For the sums of the programs."""
    inputs = operands.inputs
    if _is_pair(spec):
        cut = pairs.pair_config(inputs, spec.formula, spec.compute_dtype)
    else:
        cut = softmax.row_config(_loss_of(spec), _tensors_of(operands), spec.compute_dtype)
    return inputs.new_empty(rows.num_programs(len(inputs), cut), dtype=spec.compute_dtype)


def sum_partials(partials: Tensor, loss: Tensor) -> None:
    passes.sum_launcher(partials, loss)


def counted_denominators(spec: Spec, operands: Operands) -> Tensor | None:
    """Both denominators of a mean, [2], on operands that are rows; None where plain PyTorch counts faster."""
    assert operands.labels is not None
    if len(operands.labels) > rows.MAX_COUNTED:
        return None
    counts = operands.inputs.new_empty(2, dtype=spec.compute_dtype)
    rows.count_launcher(
        operands.labels,
        operands.weight if counts_weights(spec, operands) else None,
        counts,
        num_classes=operands.inputs.shape[-1],
        ignored=spec.ignored,
    )
    return counts


def launch(
    spec: Spec,
    operands: Operands,
    divided: Denominators,
    upstream: Upstream,
    upstreams: Tensor | None,
    loss: Tensor | None,
    grads: Gradients,
    *,
    written: bool = False,
) -> None:
    """On operands that are rows; the upstream gradient is one of a scalar, or ``upstreams`` of the losses."""
    tensors = _tensors_of(operands)
    reduced = spec.reduction != "none"
    compute_dtype: torch.dtype = spec.compute_dtype
    if _is_pair(spec):
        pairs.pairs_launcher(
            _loss_of(spec),
            tensors,
            divided.of_losses,
            upstream,
            upstreams,
            loss,
            (grads.inputs, grads.targets),
            compute_dtype=compute_dtype,
            reduced=reduced,
            written=written,
        )
        return
    softmax.softmax_launcher(
        _loss_of(spec),
        tensors,
        divided,
        upstream,
        upstreams,
        loss,
        grads.inputs,
        compute_dtype=compute_dtype,
        reduced=reduced,
        written=written,
    )
