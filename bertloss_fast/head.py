"""A head of many labels: linear layer and loss in one, so that the logits of a batch are never held."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional.checks import (
    check_device,
    check_index,
    check_inputs,
    check_number,
    check_probabilities,
)
from .functional.layer import as_layer, check_chunk_size, check_dtypes
from .modules import SigmoidFocalLoss
from .modules.shown import shown
from .modules.sigmoid import SeparableLoss
from .ops.chunks import Layer, logit_chunks
from .ops.dispatch import can_check_values
from .ops.linear import Call, Step, linear_loss, without_autocast
from .optim import HeadSGD, Update
from .targets import SparseLabels


class TopK(NamedTuple):
    """The labels with the greatest probabilities, those first; :meth:`MultiLabelHead.topk` gives one.

    Example::

        >>> import torch
        >>> from bertloss_fast import MultiLabelHead
        >>> scores, labels = MultiLabelHead(8, num_labels=1000).topk(torch.randn(2, 8), k=5)
    """

    scores: Tensor
    """Probabilities ``[..., k]``, at least float32."""

    labels: Tensor
    """int64 ``[..., k]``."""


class Prediction(NamedTuple):
    """The labels that a head gives; :meth:`MultiLabelHead.predict` makes one.

    Example::

        >>> import torch
        >>> from bertloss_fast import MultiLabelHead
        >>> labels, scores = MultiLabelHead(8, num_labels=1000).predict(torch.randn(2, 8), threshold=0.7)
        >>> labels.nnz == len(scores)
        True
    """

    labels: SparseLabels
    scores: Tensor
    """The probability of each, ``[nnz]``, at least float32."""


# Priors nearer to 0 and 1 are taken for this far from them.
_NEAREST = 1e-12


class MultiLabelHead(nn.Module):
    """Linear layer and multi-label loss in one: in training and in prediction, the logits of a batch are never held.

    .. math::
        \\text{loss}(W h + b, y)

    Its state dict is that of an :class:`torch.nn.Linear`.

    Args:
        in_features: D, the size of what it is given.
        num_labels: L.
        loss: a :class:`SigmoidFocalLoss`, :class:`BCEWithLogitsLoss`, :class:`AsymmetricLossMultiLabel` or
            :class:`PolyBinaryCrossEntropy`, with its options, of which the head keeps a copy; ``None`` for
            ``SigmoidFocalLoss(reduction="batchmean")``. Its tensors move with the head, but are not in its state dict.
        bias: whether there is one.
        dropout: the probability with which what is given is dropped in training.
        prior: how probable labels are before training, a number or a tensor ``[L]``, from 0 to 1, of which 1e-12 and
            1 - 1e-12 are the ends; the bias begins with its logits, and else as in ``nn.Linear``.
        chunk_size: how many labels to take at a time; ``None`` for as many as stay in the cache.
        device, dtype: of weight and bias. A head that is made on the meta device is given memory by ``to_empty`` and
            values by ``reset_parameters`` or a state dict; a loss's tensors are to be given to it anew then.

    Shape:
        hidden ``[..., D]`` and targets ``[..., L]``, dense or :class:`SparseLabels`, give the loss; hidden alone gives
        the logits ``[..., L]``. A call with targets also takes ``sample_weight``, ``mask``, ``normalizer``, and an
        ``ignore_index`` in the place of the loss's.

    Raises:
        TypeError, ValueError: for arguments that nothing fits; those that depend on the inputs at the call.

    Example::

        >>> import torch
        >>> from bertloss_fast import MultiLabelHead, SparseLabels
        >>> head = MultiLabelHead(8, num_labels=100_000, prior=1e-4)
        >>> hidden, labels = torch.randn(2, 8), SparseLabels.from_lists([[3], [99_999]], num_labels=100_000)
        >>> head(hidden, labels).backward()
        >>> head.topk(hidden, 5).labels.shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        loss: SeparableLoss | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        prior: float | Tensor | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_labels", num_labels)):
            if check_index(name, size) <= 0:
                raise ValueError(f"{name}: expected an integer > 0, got {size}")
        check_chunk_size(chunk_size)
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected True or False, got {type(bias).__name__}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {str(dtype).removeprefix('torch.')}")
        self.in_features, self.num_labels, self.chunk_size = in_features, num_labels, chunk_size
        linear = nn.Linear(in_features, num_labels, bias, device, dtype)
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.dropout = nn.Dropout(check_number("dropout", dropout, 0, 1))
        self.loss = _own(SigmoidFocalLoss(reduction="batchmean") if loss is None else loss)
        if not self.weight.is_meta:  # where the loss's tensors would be lost
            self.loss.to(self.weight.device)
        if prior is not None and not bias:
            raise ValueError("prior: expected None without a bias, which it would be")
        self._prior = None if prior is None else self._probabilities("prior", prior)
        self._begin_at_prior()

    def reset_parameters(self) -> None:
        """Begin anew: weight and bias as in ``nn.Linear``, and the bias at the prior."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        self._begin_at_prior()

    def _begin_at_prior(self) -> None:
        if self._prior is not None and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(self._prior.logit(_NEAREST))

    def _probabilities(self, name: str, values: float | Tensor) -> Tensor:
        """A number or one for each label, in float64."""
        if not isinstance(values, Tensor):
            return torch.tensor(check_number(name, values, 0, 1), dtype=torch.float64)
        if values.dim() and values.shape != (self.num_labels,):
            raise ValueError(
                f"{name}: expected a number or shape ({self.num_labels},), one value a label; got {tuple(values.shape)}"
            )
        check_probabilities(name, values)
        if can_check_values(values.device) and values.isnan().any():
            raise ValueError(f"{name}: expected values from 0 to 1, got nan")
        return values.detach().double()

    def forward(self, hidden: Tensor, targets: Tensor | SparseLabels | None = None, **options: Any) -> Tensor:
        """The loss; without targets the logits."""
        self._check(hidden)
        hidden = self.dropout(hidden)
        if targets is None:
            if options:
                raise TypeError(f"{next(iter(options))}: expected targets beside it, got None")
            return F.linear(hidden, self.weight, self.bias)
        return linear_loss(self.loss.linear_call(hidden, self.weight, targets, self.bias, self.chunk_size, options))

    def _check(self, hidden: Tensor) -> None:
        check_inputs("hidden", hidden)
        if not hidden.dim() or hidden.shape[-1] != self.in_features:
            raise ValueError(f"hidden: expected shape (..., {self.in_features}), got {tuple(hidden.shape)}")
        check_dtypes("hidden", hidden, "weight", self.weight)

    def fused_step(
        self,
        hidden: Tensor,
        targets: Tensor | SparseLabels,
        optimizer: HeadSGD,
        loss_scale: float = 1.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Loss, update of the head, and what the encoder learns from, in one pass that never holds a weight gradient.

        Args:
            hidden, targets, options: as in a call.
            optimizer: a :class:`HeadSGD` that is this head's alone.
            loss_scale: what multiplies the gradient of hidden, and nothing else: a ``GradScaler``'s scale, or 1 over
                the number of batches that the encoder accumulates.

        Returns:
            The loss, and its gradient in hidden times ``loss_scale``, of hidden's dtype. Both come without a graph: the
            caller runs ``hidden.backward(grad_hidden)``.

        Example::

            >>> import torch
            >>> from bertloss_fast import HeadSGD, MultiLabelHead
            >>> encoder, head, optimizer = torch.nn.Linear(4, 8), MultiLabelHead(8, 1000), HeadSGD(lr=0.1)
            >>> hidden = encoder(torch.randn(2, 4))
            >>> loss, grad_hidden = head.fused_step(hidden, torch.zeros(2, 1000, dtype=torch.bool), optimizer)
            >>> hidden.backward(grad_hidden)
        """
        if not isinstance(optimizer, HeadSGD):
            raise TypeError(f"optimizer: expected a HeadSGD, got {type(optimizer).__name__}")
        if self.loss.reduction == "none":
            raise ValueError("reduction: expected a loss that is reduced to one number, got 'none'")
        for name in ("weight", "bias"):
            if name not in self._parameters:
                raise TypeError(f"{name}: expected a parameter of the head's own to update, got a parametrized one")
        loss_scale = check_number("loss_scale", loss_scale, 0)
        self._check(hidden)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            dropped = self.dropout(leaf)
        loss, gradient = self._step(dropped, targets, optimizer, options)
        gradient = (gradient * loss_scale).to(dropped.dtype)
        return loss, torch.autograd.grad(dropped, leaf, gradient)[0] if dropped is not leaf else gradient

    def _step(
        self, hidden: Tensor, targets: Tensor | SparseLabels, optimizer: HeadSGD, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        call = self.loss.linear_call(hidden, self.weight, targets, self.bias, self.chunk_size, options)
        return run_step(call, optimizer.begin(trained(self)))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> TopK:
        """The k most probable labels of each row, and their probabilities.

        Raises:
            ValueError: if k is not from 1 to the number of labels.
        """
        self._check(hidden)
        if not 1 <= check_index("k", k) <= self.num_labels:
            raise ValueError(f"k: expected an integer from 1 to {self.num_labels}, the number of labels, got {k}")
        found = self._greatest(hidden, k)
        shape = (*hidden.shape[:-1], k)
        return TopK(found.scores.sigmoid().view(shape), found.labels.view(shape))

    def _greatest(self, hidden: Tensor, k: int) -> TopK:
        """The greatest logits, [N, k]."""
        return greatest(self._layer(hidden), k)

    @torch.no_grad()
    def predict(self, hidden: Tensor, threshold: float | Tensor = 0.5) -> Prediction:
        """The labels whose probability is at least a threshold, and the probabilities. On a GPU this waits.

        Args:
            hidden: ``[..., D]``; the labels are those of all rows together, ``[N, L]``.
            threshold: a number from 0 to 1, or one for each label, ``[L]``.
        """
        self._check(hidden)
        row, col, scores = self._above(hidden, self._thresholds(threshold))
        row, order = row.sort(stable=True)
        crow = torch.searchsorted(row, torch.arange(hidden.shape[:-1].numel() + 1, device=row.device))
        return Prediction(SparseLabels.from_csr(crow, col[order], self.num_labels), scores[order])

    def _thresholds(self, threshold: float | Tensor) -> Tensor:
        """A probability [1, 1] or [1, L]."""
        values = self._probabilities("threshold", threshold)
        if isinstance(threshold, Tensor):
            check_device("threshold", threshold, "weight", self.weight)
        return values.to(self.weight.device).reshape(1, -1)

    def _above(self, hidden: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, labels and probabilities, the labels of each row in order."""
        return above(self._layer(hidden), threshold)

    def _layer(self, hidden: Tensor) -> Layer:
        return as_layer(hidden, self.weight, self.bias, self.chunk_size)[0]

    def extra_repr(self) -> str:
        options = {"in_features": self.in_features, "num_labels": self.num_labels, "bias": self.bias is not None}
        return shown({**options, "chunk_size": self.chunk_size})


def greatest(layer: Layer, k: int) -> TopK:
    """The greatest logits, [N, k], or all where there are not as many."""
    dtype = torch.promote_types(layer.logits_dtype, torch.float32)
    rows = layer.inputs.shape[:-1].numel()
    best = TopK(layer.inputs.new_empty(rows, 0, dtype=dtype), layer.inputs.new_empty(rows, 0, dtype=torch.long))
    for labels, logits in logit_chunks(layer):
        of_chunk = logits.to(dtype).topk(min(k, logits.shape[1]))
        scores = torch.cat([best.scores, of_chunk.values], 1)
        best = greatest_of(scores, torch.cat([best.labels, of_chunk.indices + labels.start], 1), k)
    return best


def greatest_of(scores: Tensor, labels: Tensor, k: int) -> TopK:
    """The greatest of each row; of equal ones, which, is undefined."""
    found = scores.topk(min(k, scores.shape[1]))
    return TopK(found.values, labels.gather(1, found.indices))


def above(layer: Layer, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels and probabilities of what is at least a threshold, [1, 1] or [1, L]."""
    dtype = torch.promote_types(layer.logits_dtype, torch.float32)
    none = layer.inputs.new_empty(0, dtype=dtype)  # a layer may have no labels
    rows, cols, scores = [none.long()], [none.long()], [none]
    for labels, logits in logit_chunks(layer):
        probabilities = logits.to(dtype).sigmoid()
        row, col = (probabilities >= (threshold[:, labels] if threshold.numel() > 1 else threshold)).nonzero().T
        rows.append(row)
        cols.append(col + labels.start)
        scores.append(probabilities[row, col])
    return torch.cat(rows), torch.cat(cols), torch.cat(scores)


def run_step(call: Call, update: Update) -> tuple[Tensor, Tensor]:
    """The loss of a call, and its gradient in hidden; the update of the head is made on the way."""
    step = Step(call)
    with torch.no_grad(), without_autocast(call.layer):
        for labels, of_weight, of_bias in step:
            update.labels(labels, of_weight, of_bias)
    update.end()
    return step.loss, step.of_inputs


def _own(loss: SeparableLoss) -> SeparableLoss:
    """A copy of a loss that a linear layer takes in, whose tensors are in no state dict."""
    if not isinstance(loss, SeparableLoss):
        raise TypeError(
            "loss: expected a SigmoidFocalLoss, BCEWithLogitsLoss, AsymmetricLossMultiLabel or PolyBinaryCrossEntropy, "
            f"whose labels stand for themselves, got {type(loss).__name__}"
        )
    loss = copy.deepcopy(loss)
    for name, buffer in list(loss.named_buffers(recurse=False)):
        loss.register_buffer(name, buffer, persistent=False)
    return loss


def trained(head: MultiLabelHead) -> dict[str, Tensor]:
    """The parameters that are not frozen."""
    parameters = {name: value for name, value in head.named_parameters(recurse=False) if value.requires_grad}
    return {name: value.detach() for name, value in parameters.items()}
