"""All the figures of a set of rows, in the form of transformers' Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..functional.rows import IGNORED
from .checks import as_shares, check_count, logits_of
from .inputs import Floats, Integers, Scored, read, warn_of_rows_cut_off
from .ranking import ndcg_at, precision_at, psp_at


def topk_logits_for_metrics(k: int) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """For ``Trainer(preprocess_logits_for_metrics=...)``: of each row's logits only the k highest are kept.

    An evaluation then never holds ``[N, L]``: not on the GPU, not gathered from the processes, not in the memory of the
    host. ``multilabel_metrics`` and ``tune_thresholds`` take what it leaves.

    Args:
        k: how many to keep, all of them where there are fewer.

    Returns:
        A function of logits ``[N, L]`` (of a tuple, the first) and labels. It returns scores ``[N, k]``, falling, and
        their labels ``[N, k]``. Entries that multi-hot labels ignore, with -100, have -inf and come last.

    Example::

        >>> import torch
        >>> from bertloss_fast.metrics import topk_logits_for_metrics
        >>> topk_logits_for_metrics(2)(torch.tensor([[0.5, -1.0, 2.0]]), None)
        (tensor([[2.0000, 0.5000]]), tensor([[2, 0]]))
    """
    return functools.partial(_topk, k=check_count("k", k))


def _topk(logits: Any, labels: Any, k: int) -> tuple[Tensor, Tensor]:
    logits = logits_of("logits", logits)
    if isinstance(labels, Tensor) and labels.shape == logits.shape:
        logits = logits.masked_fill(labels == IGNORED, -torch.inf)
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return values, indices


def multilabel_metrics(
    num_labels: int,
    at: Sequence[int] | None = None,
    threshold: float | Sequence[float] | NDArray[Any] | None = 0.5,
    propensities: Sequence[float] | NDArray[Any] | None = None,
    lrap: bool = False,
    from_logits: bool = True,
) -> Callable[..., dict[str, float]]:
    """What measures multi-label scores, for ``Trainer(compute_metrics=...)`` or called with arrays.

    Args:
        num_labels: L, at least 2.
        at: the k of ``precision@k``, ``ndcg@k`` and ``psp@k``, at most L; None is those of 1, 3, 5 up to L.
        threshold: a probability, or one for each label ``[L]``: a label is predicted where its probability reaches it.
            None leaves the F1 scores out.
        propensities: ``[L]``, what ``propensities`` gives; None leaves ``psp@k`` out.
        lrap: whether to have the label ranking average precision, which needs the scores of all labels.
        from_logits: whether scores are logits, of which the sigmoid is the probability, or probabilities.

    Returns:
        A function ``(scores, labels)`` or, for Trainer, of its ``EvalPrediction``. Scores are ``[N, L]`` or the pair of
        ``[N, k]`` that ``topk_logits_for_metrics`` leaves; labels are multi-hot ``[N, L]`` (-100 ignored), indices
        padded with -100 ``[N, K]``, SparseLabels or scipy's CSR. It returns floats: ``precision@k``, ``ndcg@k``,
        ``psp@k`` (over the most that is possible, as the Extreme Classification Repository reports it) and
        ``psp_raw@k`` (not so), ``micro_f1``, ``macro_f1`` (of all labels), ``macro_f1_occurring`` (of those with a
        positive), ``samples_f1``, ``lrap``, and for a pair ``f1_rows_cut_off``: in how many rows labels beyond the k-th
        may have reached the threshold, which is warned of. The F1 scores are exact where that is 0.

    Raises:
        ValueError, TypeError: what does not fit, NaN among the scores, no row.
        ImportError: F1 or LRAP without scikit-learn.

    Example::

        >>> import torch
        >>> from bertloss_fast.metrics import multilabel_metrics
        >>> logits = torch.tensor([[2.0, 1.0, -3.0], [0.5, -1.0, -2.0]])
        >>> multilabel_metrics(3, at=[1])(logits, torch.tensor([[1, 1, 0], [0, 1, 0]]))["precision@1"]
        0.5
    """
    num_labels = check_count("num_labels", num_labels, 2)
    places = _places(at, num_labels)
    limit = None if threshold is None else _per_label("threshold", threshold, num_labels)
    propensity = None if propensities is None else _per_label("propensities", propensities, num_labels)
    if propensity is not None and not propensity.all():
        raise ValueError("propensities: expected numbers above 0, got 0")
    if limit is not None or lrap:
        scikit_learn()  # a missing library is told of before an hour of training, not after it
    return functools.partial(
        _measure,
        num_labels=num_labels,
        at=places,
        limit=limit,
        propensity=propensity,
        lrap=lrap,
        from_logits=from_logits,
    )


def _places(at: Sequence[int] | None, num_labels: int) -> tuple[int, ...]:
    if at is None:
        return tuple(k for k in (1, 3, 5) if k <= num_labels)
    if not isinstance(at, Iterable):
        raise TypeError(f"at: expected a list of integers, got {type(at).__name__}")
    places = tuple(check_count("at", k) for k in at)
    if places and max(places) > num_labels:
        raise ValueError(f"at: expected 1 to num_labels = {num_labels}, got {places}")
    return places


def _per_label(name: str, value: Any, num_labels: int) -> Floats:
    shares = as_shares(name, value)
    if shares.shape not in ((), (num_labels,)):
        raise ValueError(f"{name}: expected a number or shape ({num_labels},), got shape {shares.shape}")
    return np.broadcast_to(shares, num_labels)


def scikit_learn() -> ModuleType:
    try:
        import sklearn.metrics
    except ModuleNotFoundError as error:
        raise ImportError(
            'multilabel_metrics: F1 and LRAP need scikit-learn: pip install "bertloss-fast[metrics]"; '
            "threshold=None and lrap=False leave them out"
        ) from error
    return sklearn.metrics  # type: ignore[no-any-return]


def _measure(
    scores: Any,
    labels: Any = None,
    *,
    num_labels: int,
    at: tuple[int, ...],
    limit: Floats | None,
    propensity: Floats | None,
    lrap: bool,
    from_logits: bool,
) -> dict[str, float]:
    if labels is None and hasattr(scores, "label_ids"):  # transformers' EvalPrediction, which is not imported for it
        scores, labels = scores.predictions, scores.label_ids
    scored = read(scores, labels, num_labels)
    if lrap and scored.indices is not None:
        raise ValueError(
            "lrap: expected scores of all labels, since it asks for the ranks of all that are right, "
            f"got those of {scored.indices.shape[1]} labels a row"
        )
    figures = _ranking_figures(scored, at, propensity) if at else {}
    if limit is not None:
        figures |= _f1_figures(scored, limit, from_logits)
        warn_of_rows_cut_off("multilabel_metrics", int(figures.get("f1_rows_cut_off", 0)), scored)
    if lrap:
        figures["lrap"] = _lrap(scored)
    return figures


def _ranking_figures(scored: Scored, at: tuple[int, ...], propensity: Floats | None) -> dict[str, float]:
    if scored.scores.shape[1] < max(at):
        raise ValueError(f"scores: expected at least {max(at)} a row, as many as at has, got {scored.scores.shape[1]}")
    likeliest = scored.likeliest(max(at))
    right = scored.is_right(likeliest)
    figures = {f"precision@{k}": precision_at(k, right) for k in at}
    figures |= {f"ndcg@{k}": ndcg_at(k, right, scored.counts) for k in at}
    if propensity is not None:
        for k in at:
            figures[f"psp_raw@{k}"], figures[f"psp@{k}"] = psp_at(k, right, likeliest, scored, propensity)
    return figures


def _f1_figures(scored: Scored, limit: Floats, from_logits: bool) -> dict[str, float]:
    """What is ignored is neither true nor predicted, and F1 counts no true negatives.

    scikit-learn is given the labels that are true or predicted somewhere. The F1 of any other is 0, and of a million it
    would ask each, in Python, whether it is a number.
    """
    chances = scored.probabilities(from_logits)
    limits = limit if scored.indices is None else limit[scored.indices]
    rows, labels = np.nonzero(chances >= limits)
    labels = labels if scored.indices is None else scored.indices[rows, labels]
    true_rows, true_labels = np.repeat(np.arange(len(scored.truth)), scored.counts), scored.truth.col_indices.numpy()
    used = np.union1d(true_labels, labels)
    truth = _matrix(true_rows, np.searchsorted(used, true_labels), len(scored.truth), len(used))
    predicted = _matrix(rows, np.searchsorted(used, labels), len(scored.truth), len(used))

    f1 = functools.partial(scikit_learn().f1_score, truth, predicted, zero_division=0)
    total = float(f1(average=None).sum())
    figures = {
        "micro_f1": float(f1(average="micro")),
        "macro_f1": total / scored.num_labels,
        "macro_f1_occurring": total / max(1, int((scored.positives > 0).sum())),  # a label without a positive adds 0
        "samples_f1": float(f1(average="samples")),
    }
    if scored.indices is not None:
        figures["f1_rows_cut_off"] = float(scored.rows_cut_off(chances, limit))
    return figures


def _matrix(rows: Integers, labels: Integers, num_rows: int, num_labels: int) -> Any:
    """Of two columns at least: one scikit-learn takes for a binary target."""
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(len(rows), np.int8), (rows, labels)), shape=(num_rows, max(2, num_labels)))


def _lrap(scored: Scored) -> float:
    """Of ranks in the place of scores, since scikit-learn takes no infinite ones: what is ignored has the last."""
    from scipy.stats import rankdata

    scores = rankdata(scored.scores, method="dense", axis=1)
    if scored.ignored is not None:
        scores[scored.ignored] = 0
    return float(scikit_learn().label_ranking_average_precision_score(scored.truth.to_dense().numpy(), scores))
