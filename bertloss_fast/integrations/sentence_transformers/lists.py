"""Losses of a query and the list of its documents, each of which has a number for how relevant it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from sentence_transformers.cross_encoder import losses
from sentence_transformers.util import fullname
from torch import Tensor, nn

from ...functional import adr_mse_loss, lambda_loss, list_net_loss, pad_lists
from ...functional.checks import check_backend, check_index, check_positive
from ...functional.listwise import Weighting, check_k, check_pairs
from .base import IDENTITY, CrossEncoderLoss, Labels, check_columns

_WEIGHTING: dict[type[nn.Module], Weighting | None] = {
    losses.NoWeightingScheme: None,
    losses.NDCGLoss1Scheme: "NDCGLoss1",
    losses.NDCGLoss2Scheme: "NDCGLoss2",
    losses.LambdaRankScheme: "LambdaRank",
    losses.NDCGLoss2PPScheme: "NDCGLoss2++",
}
_NDCG2PP = losses.NDCGLoss2PPScheme()


class ListLoss(CrossEncoderLoss):
    """A listwise loss of the package on the scores of each query's documents, lists of any lengths.

    Args:
        model: a CrossEncoder with one label.
        activation_fn: what the logits go through before the loss.
        mini_batch_size: how many pairs the model is given at a time; ``None`` or 0 for as many as there are queries,
            less for all at once.
        backend: ``"triton"``, ``"eager"``, or ``None`` for the best that runs on the model's device.
    """

    def __init__(
        self, model: nn.Module, activation_fn: nn.Module | None, mini_batch_size: int | None, backend: str | None
    ) -> None:
        super().__init__(model, activation_fn or IDENTITY, num_labels=1)
        if mini_batch_size is not None:
            check_index("mini_batch_size", mini_batch_size, "an integer or None")
        check_backend(backend)
        self.mini_batch_size = mini_batch_size
        self.backend = backend

    def forward(
        self,
        inputs: Sequence[Sequence[Any]],
        labels: Labels,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        check_columns(inputs, 2, 2, "two columns, queries and lists of documents")
        queries, documents = inputs
        wrong = next((texts for texts in documents if not isinstance(texts, list | tuple)), None)
        if wrong is not None:
            raise TypeError(f"inputs: expected a list of documents for each query, got {type(wrong).__name__}")
        lengths = [len(of_query) for of_query in documents]
        values = _flat(labels, lengths)
        pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        size = self.mini_batch_size or len(queries)
        size = size if size > 0 else len(pairs)
        parts = [self.score(pairs[start : start + size], prompt, task) for start in range(0, len(pairs), size)]
        logits = self.activate(torch.cat(parts).squeeze(1).float())
        scores, of_lists = pad_lists(logits, lengths)
        relevance, _ = pad_lists(values.to(logits.device, torch.float32), lengths)
        return self.compute(scores, relevance, of_lists)

    def compute(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """The loss of scores and labels ``[Q, n]``, of which each row has ``lengths`` documents."""
        raise NotImplementedError

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}


class LambdaLoss(ListLoss):
    """LambdaLoss; :func:`bertloss_fast.lambda_loss` has the formula.

    Args:
        model: a CrossEncoder with one label.
        weighting_scheme: one of the schemes that sentence-transformers has, ``None`` for no weights.
        k: only pairs of which one document is among the k that the model ranks first; ``None`` for all.
        sigma: the steepness of the sigmoid.
        eps: the least that an ideal DCG is taken for.
        reduction_log: ``"binary"`` or ``"natural"``, the logarithm.
        activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.

    Shape:
        inputs are queries and a list of documents for each; labels a list of tensors, or ``[Q, n]``.

    Raises:
        ValueError: at construction for a model with other than one label, or a scheme of another class; at the call
            for other than two columns, or where labels and documents do not match.
    """

    citation = losses.LambdaLoss.citation

    def __init__(
        self,
        model: nn.Module,
        weighting_scheme: nn.Module | None = _NDCG2PP,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: Literal["natural", "binary"] = "binary",
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size, backend)
        self.weighting_scheme = weighting_scheme or losses.NoWeightingScheme()
        if type(self.weighting_scheme) not in _WEIGHTING:  # a subclass may weigh as it likes
            known = ", ".join(scheme.__name__ for scheme in _WEIGHTING)
            raise ValueError(
                f"weighting_scheme: expected one of {known} or None, got {type(weighting_scheme).__name__}"
            )
        check_k(k or None)
        check_pairs(sigma, reduction_log)
        check_positive("eps", eps)
        self.k = k
        self.sigma = sigma
        self.eps = eps
        self.reduction_log = reduction_log

    def compute(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return lambda_loss(
            scores,
            labels,
            lengths=lengths,
            weighting=_WEIGHTING[type(self.weighting_scheme)],
            mu=getattr(self.weighting_scheme, "mu", _NDCG2PP.mu),
            k=self.k or None,  # 0 too is sentence-transformers' for all
            sigma=self.sigma,
            eps=self.eps,
            reduction_log=self.reduction_log,
            backend=self.backend,
        )

    def get_config_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("k", "sigma", "eps", "reduction_log")}
        return super().get_config_dict() | own | {"weighting_scheme": fullname(self.weighting_scheme)}


class RankNetLoss(LambdaLoss):
    """RankNet, which is LambdaLoss without weights; :func:`bertloss_fast.rank_net_loss` has the formula.

    Args:
        model, k, sigma, reduction_log: as of :class:`LambdaLoss`.
        eps: taken and not used: no ideal DCG is divided by.
        activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.

    Shape:
        as of :class:`LambdaLoss`.

    Raises:
        ValueError: as :class:`LambdaLoss`.
    """

    citation = losses.RankNetLoss.citation

    def __init__(
        self,
        model: nn.Module,
        k: int | None = None,
        sigma: float = 1.0,
        eps: float = 1e-10,
        reduction_log: Literal["natural", "binary"] = "binary",
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, None, k, sigma, eps, reduction_log, activation_fn, mini_batch_size, backend=backend)

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        del config["weighting_scheme"]
        return config


class ListNetLoss(ListLoss):
    """ListNet; :func:`bertloss_fast.list_net_loss` has the formula.

    Args:
        model, activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.

    Shape:
        as of :class:`LambdaLoss`.

    Raises:
        ValueError: as :class:`LambdaLoss`.
    """

    citation = losses.ListNetLoss.citation

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size, backend)

    def compute(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return list_net_loss(scores, labels, lengths=lengths, backend=self.backend)


class ADRMSELoss(ListLoss):
    """ADR-MSE, squared error of approximate ranks; :func:`bertloss_fast.adr_mse_loss` has the formula.

    Args:
        model: a CrossEncoder with one label.
        alpha: how closely the sigmoid approximates a rank.
        activation_fn, mini_batch_size, backend: as of :class:`ListLoss`.

    Shape:
        as of :class:`LambdaLoss`.

    Raises:
        ValueError: as :class:`LambdaLoss`.
    """

    if hasattr(losses, "ADRMSELoss"):  # it came with 5.5
        citation = losses.ADRMSELoss.citation

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1.0,
        activation_fn: nn.Module | None = IDENTITY,
        mini_batch_size: int | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(model, activation_fn, mini_batch_size, backend)
        self.alpha = check_positive("alpha", alpha)

    def compute(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return adr_mse_loss(scores, labels, lengths=lengths, alpha=self.alpha, backend=self.backend)

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"alpha": self.alpha}


def _flat(labels: Labels, lengths: list[int]) -> Tensor:
    """Labels of all documents, one list after another."""
    if isinstance(labels, Tensor) and labels.dim() != 2:
        raise ValueError(f"labels: expected a list for each query, got a tensor of shape {tuple(labels.shape)}")
    if labels is None:
        raise TypeError("labels: expected a list for each query, got None")
    values = [torch.as_tensor(of_query) for of_query in labels]
    wrong = next((of_query for of_query in values if of_query.dim() != 1), None)
    if wrong is not None:
        raise ValueError(f"labels: expected a list for each query, got one of shape {tuple(wrong.shape)}")
    got = [len(of_query) for of_query in values]
    if got != lengths:
        raise ValueError(f"labels: expected as many as each query has documents, {lengths}, got {got}")
    if not sum(lengths):
        raise ValueError("inputs: expected a query with documents, got none")
    return torch.cat(values)
