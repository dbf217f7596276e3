"""A head of many labels: linear layer and loss in one, so that the logits of a batch are never held."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional.checks import check_device, check_fraction, check_index, check_number, check_probabilities
from .functional.layer import as_layer
from .modules import SigmoidFocalLoss
from .modules.shown import shown
from .modules.sigmoid import ElementwiseLoss
from .ops.chunks import Layer, logit_chunks
from .ops.linear import linear_loss, linear_step
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


class HeadSGD:
    """What :meth:`MultiLabelHead.fused_step` updates a head by: stochastic gradient descent, as ``torch.optim.SGD`` is.

    .. math::
        b \\leftarrow \\mu b + (g + \\lambda w), \\quad w \\leftarrow w - \\eta b

    In float32 and float64 that is all. Weights in bfloat16 are updated in float32 and rounded up or down at random, in
    proportion to what is nearer: small updates are not lost, since they arrive in the mean. The same seed gives the
    same bits.

    Args:
        lr: the learning rate, eta; an attribute that may be set at any time.
        momentum: mu, from 0 and less than 1; above 0 it takes the memory of another weight.
        weight_decay: lambda, at least 0.
        seed: of the rounding.

    Example::

        >>> from bertloss_fast import HeadSGD
        >>> optimizer = HeadSGD(lr=0.1, momentum=0.9)
        >>> optimizer.lr *= 0.5
    """

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, seed: int = 0) -> None:
        self.lr = check_number("lr", lr, 0)
        self.momentum = check_fraction("momentum", momentum)
        self.weight_decay = check_number("weight_decay", weight_decay, 0)
        self.seed = check_index("seed", seed)
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {seed}")
        self._step = 0
        self._buffers: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: steps and momenta, by the parameters' names."""
        return {"step": self._step, **{f"momentum.{name}": buffer for name, buffer in self._buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        momenta = {name.removeprefix("momentum."): value for name, value in state.items() if name != "step"}
        self._step, self._buffers = state["step"], {name: value.clone() for name, value in momenta.items()}

    def __repr__(self) -> str:
        return f"HeadSGD(lr={self.lr}, momentum={self.momentum}, weight_decay={self.weight_decay}, seed={self.seed})"

    def begin(self, parameters: dict[str, Tensor], shard: int = 0) -> Update:
        """A step, in which every element of the parameters is updated once."""
        generator = None
        for name, parameter in parameters.items():
            if parameter.dtype == torch.float16:
                raise TypeError(f"{name}: expected bfloat16, float32 or float64 to update, got float16")
            if parameter.dtype == torch.bfloat16 and generator is None:
                generator = torch.Generator(parameter.device)
                entropy = np.random.SeedSequence([self.seed, self._step, shard]).generate_state(1, np.uint64)
                generator.manual_seed(int(entropy[0] >> np.uint64(1)))
            if self.momentum and name not in self._buffers:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self._buffers[name] = torch.zeros_like(parameter, dtype=dtype)
            if self.momentum and self._buffers[name].shape != parameter.shape:
                expected = tuple(parameter.shape)
                raise ValueError(
                    f"optimizer: expected the momenta of {name}, {expected}, got {tuple(self._buffers[name].shape)}"
                )
        self._step += 1
        return Update(self, parameters, self._buffers, generator)


class Update:
    """One step of a :class:`HeadSGD`."""

    def __init__(
        self,
        optimizer: HeadSGD,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self._optimizer, self._parameters, self._buffers, self._generator = optimizer, parameters, buffers, generator

    def __call__(self, labels: slice, of_weight: Tensor, of_bias: Tensor | None) -> None:
        """Update some labels by their gradients, which may be written to."""
        self._update("weight", labels, of_weight)
        if of_bias is not None:
            self._update("bias", labels, of_bias)

    def _update(self, name: str, labels: slice, gradient: Tensor) -> None:
        if name not in self._parameters:  # it is frozen
            return
        optimizer, parameter = self._optimizer, self._parameters[name][labels]
        before = parameter.to(gradient.dtype)
        if optimizer.weight_decay:
            gradient.add_(before, alpha=optimizer.weight_decay)
        if optimizer.momentum:
            gradient = self._buffers[name][labels].mul_(optimizer.momentum).add_(gradient)
        if parameter.dtype == gradient.dtype:
            parameter.add_(gradient, alpha=-optimizer.lr)
        else:
            parameter.copy_(rounded_at_random(before.add(gradient, alpha=-optimizer.lr), self._generator))


def rounded_at_random(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """float32 as bfloat16, up or down with a probability that makes the mean what it was."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    up_or_down = ((bits + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), up_or_down, values).bfloat16()


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
        prior: how probable labels are before training, a number or a tensor ``[L]`` between 0 and 1; the bias begins
            with its logits, and else as in ``nn.Linear``.
        chunk_size: how many labels to take at a time; ``None`` for as many as stay in the cache.
        device, dtype: of weight and bias.

    Shape:
        hidden ``[..., D]`` and targets ``[..., L]``, dense or :class:`SparseLabels`, give the loss; hidden alone gives
        the logits ``[..., L]``. A call with targets also takes ``sample_weight``, ``mask`` and ``normalizer``.

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
        loss: ElementwiseLoss | None = None,
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
        if chunk_size is not None and check_index("chunk_size", chunk_size, "an integer > 0 or None") <= 0:
            raise ValueError(f"chunk_size: expected an integer > 0 or None, got {chunk_size}")
        self.in_features, self.num_labels, self.chunk_size = in_features, num_labels, chunk_size
        linear = nn.Linear(in_features, num_labels, bias, device, dtype)
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.dropout = nn.Dropout(check_number("dropout", dropout, 0, 1))
        self.loss = _own(SigmoidFocalLoss(reduction="batchmean") if loss is None else loss)
        if prior is not None:
            self._begin_at(prior)

    def _begin_at(self, prior: float | Tensor) -> None:
        if self.bias is None:
            raise ValueError("prior: expected None without a bias, which it would be")
        if not isinstance(prior, Tensor):
            prior = torch.tensor(check_number("prior", prior, 0, 1))
        if prior.dim() > 1 or prior.numel() not in (1, self.num_labels):
            raise ValueError(
                f"prior: expected a number or shape ({self.num_labels},), one value a label; got {tuple(prior.shape)}"
            )
        check_probabilities("prior", prior)
        with torch.no_grad():
            self.bias.copy_(prior.double().logit(1e-12))

    def forward(self, hidden: Tensor, targets: Tensor | SparseLabels | None = None, **options: Any) -> Tensor:
        """The loss; without targets the logits."""
        hidden = self.dropout(hidden)
        if targets is None:
            if options:
                raise TypeError(f"{next(iter(options))}: expected targets beside it, got None")
            as_layer(hidden, self.weight, self.bias)
            return F.linear(hidden, self.weight, self.bias)
        return linear_loss(self.loss.linear_call(hidden, self.weight, targets, self.bias, self.chunk_size, **options))

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
        loss_scale = check_number("loss_scale", loss_scale, 0)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            dropped = self.dropout(leaf)
        loss, gradient = self._step(dropped, targets, optimizer, options)
        gradient = (gradient * loss_scale).to(dropped.dtype)
        return loss, torch.autograd.grad(dropped, leaf, gradient)[0] if dropped is not leaf else gradient

    def _step(
        self, hidden: Tensor, targets: Tensor | SparseLabels, optimizer: HeadSGD, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        call = self.loss.linear_call(hidden, self.weight, targets, self.bias, self.chunk_size, **options)
        return linear_step(call, optimizer.begin(trained(self)))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> TopK:
        """The k most probable labels of each row, and their probabilities.

        Raises:
            ValueError: if k is not from 1 to the number of labels.
        """
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
        row, col, scores = self._above(hidden, self._thresholds(threshold))
        row, order = row.sort(stable=True)
        crow = torch.searchsorted(row, torch.arange(hidden.shape[:-1].numel() + 1, device=row.device))
        return Prediction(SparseLabels.from_csr(crow, col[order], self.num_labels), scores[order])

    def _thresholds(self, threshold: float | Tensor) -> Tensor:
        """A probability [1, 1] or [1, L]."""
        if not isinstance(threshold, Tensor):
            threshold = torch.tensor(check_number("threshold", threshold, 0, 1), device=self.weight.device)
        if threshold.dim() > 1 or threshold.numel() not in (1, self.num_labels):
            raise ValueError(
                f"threshold: expected a number or shape ({self.num_labels},), one value a label; "
                f"got {tuple(threshold.shape)}"
            )
        check_device("threshold", threshold, "weight", self.weight)
        check_probabilities("threshold", threshold)
        return threshold.reshape(1, -1)

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


def _own(loss: ElementwiseLoss) -> ElementwiseLoss:
    """A copy of a loss that a linear layer takes in, whose tensors are in no state dict."""
    if not isinstance(loss, ElementwiseLoss) or loss.formula is None:
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
