"""How good the labels are: precision at k, F1 scores, the baselines, a table of them and a picture.

The baselines answer "is this better than something simple?". *Label frequency* gives every text the same scores: how
often each label occurs. *TF-IDF nearest neighbour* copies the labels of the most similar training text. Every row of
the table is judged alike: one threshold for all labels, tuned for micro-F1 on validation, used on the test split.
Where the labels are too many for scores of all of them, a `Ranking` has those of the likeliest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score, precision_recall_curve
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import MultiLabelBinarizer

from bertloss_fast.metrics import best_threshold
from clinical_codes import Family


@dataclass(frozen=True)
class Figures:
    """Macro-F1 is over the labels with a positive in the test split; head, middle and tail are thirds of all labels.

    The thirds follow the labels' frequency in training. A third without any positive in the test has None.
    """

    p_at_1: float
    p_at_3: float
    p_at_5: float
    micro_f1: float
    macro_f1: float | None
    macro_f1_head: float | None
    macro_f1_middle: float | None
    macro_f1_tail: float | None
    threshold: float


FREQUENCY = "label frequency"
NEIGHBOUR = "TF-IDF nearest neighbour"
AT = (1, 3, 5)
RANKED = 50
"""Labels of a text that a `Ranking` has for tuning the threshold; no text has as many."""
TEXTS_AT_A_TIME = 256
COLUMNS = ("P@1", "P@3", "P@5", "micro-F1", "macro-F1", "head", "middle", "tail")


class Row(NamedTuple):
    name: str
    figures: Figures
    test_scores: np.ndarray


class Ranking(NamedTuple):
    """The likeliest labels of each text, those first, and their scores: `[N, k]` each."""

    labels: np.ndarray
    scores: np.ndarray


class Targets(NamedTuple):
    """`[N, L]` each, 1 where a text has a label; the columns go from the label commonest in training to the rarest."""

    train: csr_matrix
    validation: np.ndarray
    test: np.ndarray


def target_matrix(families: Sequence[Family], codes: list[str]) -> csr_matrix:
    """`[N, L]`, 1 where a family has a label, sparse: the columns follow `codes`."""
    known = frozenset(codes)
    return MultiLabelBinarizer(classes=codes, sparse_output=True).fit_transform(
        [family.labels & known for family in families]
    )


def precision_at(k: int, truth: np.ndarray, scores: np.ndarray) -> float:
    """Of the k likeliest labels, the share that is right; a text with fewer than k labels cannot reach 1."""
    best = np.argpartition(-scores, min(k, scores.shape[1]) - 1)[:, :k]
    return float(np.take_along_axis(truth, best, axis=1).sum() / (k * len(truth)))


def judge(name: str, targets: Targets, scores: np.ndarray) -> Row:
    """`scores` are those of the validation texts and, below them, of the test texts."""
    validation_scores, test_scores = np.split(scores, [len(targets.validation)])
    threshold = best_threshold(targets.validation, validation_scores, targets.validation.sum())
    predicted = (test_scores >= threshold).astype(np.uint8)
    precision = [precision_at(k, targets.test, test_scores) for k in AT]
    return Row(name, figures_of(targets.test, predicted, precision, threshold), test_scores)


def figures_of(
    truth: np.ndarray | csr_matrix, predicted: np.ndarray | csr_matrix, precision: Iterable[float], threshold: float
) -> Figures:
    """Of labels `[N, L]`, both dense or both sparse, and the precision at `AT`."""
    per_label = f1_score(truth, predicted, average=None, zero_division=0)
    occurs = np.asarray(truth.sum(axis=0)).ravel() > 0

    def macro(labels: np.ndarray) -> float | None:
        judged = labels[occurs[labels]]
        return float(per_label[judged].mean()) if len(judged) else None

    labels = np.arange(len(occurs))
    head, middle, tail = np.array_split(labels, 3)
    micro = float(f1_score(truth, predicted, average="micro", zero_division=0))
    return Figures(*precision, micro, macro(labels), macro(head), macro(middle), macro(tail), threshold)


def is_right(truth: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Whether a text has the label, `[N, k]`; labels beyond the columns of `truth` no text has."""
    width = max(truth.shape[1], labels.max() + 1)
    rows, columns = truth.nonzero()
    return np.isin(np.arange(len(labels))[:, None] * width + labels, rows.astype(np.int64) * width + columns)


def threshold_of(truth: csr_matrix, ranking: Ranking) -> float:
    return best_threshold(is_right(truth, ranking.labels), ranking.scores, truth.nnz)


def precisions(truth: csr_matrix, labels: np.ndarray) -> list[float]:
    """At `AT`, of each text's likeliest labels `[N, k]`."""
    right = is_right(truth, labels)
    return [float(right[:, :k].sum() / (k * len(right))) for k in AT]


def judge_rankings(validation: csr_matrix, test: csr_matrix, of_validation: Ranking, of_test: Ranking) -> Figures:
    threshold = threshold_of(validation, of_validation)
    rows, places = np.nonzero(of_test.scores >= threshold)
    cells = np.ones(len(rows), dtype=int), (rows, of_test.labels[rows, places])
    return figures_of(test, csr_matrix(cells, test.shape), precisions(test, of_test.labels), threshold)


def frequency_scores(train_targets: csr_matrix, texts: int) -> np.ndarray:
    return np.tile(np.asarray(train_targets.mean(axis=0), dtype=np.float32), (texts, 1))


def neighbour_scores(train_texts: list[str], train_targets: csr_matrix, texts: list[str]) -> np.ndarray:
    return copied_labels(train_targets, nearest(train_texts, texts))


def nearest(train_texts: list[str], texts: list[str]) -> np.ndarray:
    """The number of the most similar training text of each text."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute")
    neighbours.fit(vectorizer.fit_transform(train_texts))
    return neighbours.kneighbors(vectorizer.transform(texts), return_distance=False)[:, 0]


def copied_labels(train_targets: csr_matrix, rows: np.ndarray) -> np.ndarray:
    """1 for the labels of these training texts, else 0; among equals the commoner label comes first."""
    tie_break = 0.1 * frequency_scores(train_targets, 1)
    return train_targets[rows].toarray().astype(np.float32) + tie_break


def frequency_ranking(train_targets: csr_matrix, texts: int) -> Ranking:
    best = likeliest(frequency_scores(train_targets, 1))
    return Ranking(*(np.repeat(part, texts, axis=0) for part in best))


def neighbour_ranking(train_targets: csr_matrix, rows: np.ndarray) -> Ranking:
    """Of `rows`, what `nearest` gave; the scores of all labels are held for a few texts at a time."""
    starts = range(0, len(rows), TEXTS_AT_A_TIME)
    parts = [likeliest(copied_labels(train_targets, rows[i : i + TEXTS_AT_A_TIME])) for i in starts]
    return Ranking(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def likeliest(scores: np.ndarray) -> Ranking:
    labels = np.argpartition(-scores, RANKED, axis=1)[:, :RANKED]
    of_labels = np.take_along_axis(scores, labels, axis=1)
    order = np.argsort(-of_labels, axis=1, kind="stable")
    return Ranking(*(np.take_along_axis(part, order, axis=1) for part in (labels, of_labels)))


def table(figures: dict[str, Figures]) -> str:
    width = max(map(len, figures))
    lines = [" " * width + "".join(f"{column:>10}" for column in COLUMNS)]
    for name, of_name in figures.items():
        values = astuple(of_name)[: len(COLUMNS)]
        lines.append(f"{name:<{width}}" + "".join(f"{'-':>10}" if v is None else f"{v:10.3f}" for v in values))
    return "\n".join(lines)


def draw(path: Path, losses: list[tuple[float, float]], test_targets: np.ndarray, rows: list[Row]) -> None:
    """The loss over the seconds of training, and precision over recall on the test split."""
    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    seconds, values = np.array(losses).T
    window = max(1, len(values) // 40)
    left.plot(seconds, values, color="tab:blue", alpha=0.25, linewidth=1, label="each batch")
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    left.plot(seconds[window - 1 :], mean, color="tab:blue", linewidth=2, label=f"mean of {window} batches")
    left.set(title="Training loss", xlabel="seconds of training", ylabel="loss per text", yscale="log")
    left.legend(frameon=False)
    for row in rows:
        _draw_precision_recall(right, test_targets, row)
    right.set(title="Test split, all labels pooled", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(frameon=False, loc="center", title="points: at the tuned threshold")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_precision_recall(axes: Axes, truth: np.ndarray, row: Row) -> None:
    """A point where the threshold is, and a curve through it where the scores are graded (a neighbour's are not)."""
    predicted = row.test_scores >= row.figures.threshold
    hits = (predicted & (truth == 1)).sum()
    (point,) = axes.plot(hits / truth.sum(), hits / max(predicted.sum(), 1), "o", label=row.name, zorder=3)
    if not row.name.startswith(NEIGHBOUR):
        precision, recall, _ = precision_recall_curve(truth.ravel(), row.test_scores.ravel(), drop_intermediate=True)
        axes.plot(recall, precision, color=point.get_color(), linewidth=2)
