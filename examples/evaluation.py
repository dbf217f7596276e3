"""How good the labels are: precision at k, F1 scores, the baselines, a table of them and a picture.

The baselines answer "is this better than something simple?". *Label frequency* gives every text the same scores: how
often each label occurs. *TF-IDF nearest neighbour* copies the labels of the most similar training text. Every row of
the table is judged alike: one threshold for all labels, tuned for micro-F1 on validation, used on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
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


NEIGHBOUR = "TF-IDF nearest neighbour"
COLUMNS = ("P@1", "P@3", "P@5", "micro-F1", "macro-F1", "head", "middle", "tail")


class Row(NamedTuple):
    name: str
    figures: Figures
    test_scores: np.ndarray


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


def best_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """The threshold, one for all labels, with the highest micro-F1."""
    precision, recall, thresholds = precision_recall_curve(truth.ravel(), scores.ravel(), drop_intermediate=True)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def judge(name: str, targets: Targets, scores: np.ndarray) -> Row:
    """`scores` are those of the validation texts and, below them, of the test texts."""
    validation_scores, test_scores = np.split(scores, [len(targets.validation)])
    threshold = best_threshold(targets.validation, validation_scores)
    predicted = (test_scores >= threshold).astype(np.uint8)
    per_label = f1_score(targets.test, predicted, average=None, zero_division=0)
    occurs = targets.test.sum(axis=0) > 0

    def macro(labels: np.ndarray) -> float | None:
        judged = labels[occurs[labels]]
        return float(per_label[judged].mean()) if len(judged) else None

    labels = np.arange(len(occurs))
    head, middle, tail = np.array_split(labels, 3)
    figures = Figures(
        p_at_1=precision_at(1, targets.test, test_scores),
        p_at_3=precision_at(3, targets.test, test_scores),
        p_at_5=precision_at(5, targets.test, test_scores),
        micro_f1=float(f1_score(targets.test, predicted, average="micro", zero_division=0)),
        macro_f1=macro(labels),
        macro_f1_head=macro(head),
        macro_f1_middle=macro(middle),
        macro_f1_tail=macro(tail),
        threshold=threshold,
    )
    return Row(name, figures, test_scores)


def frequency_scores(train_targets: csr_matrix, texts: int) -> np.ndarray:
    return np.tile(np.asarray(train_targets.mean(axis=0), dtype=np.float32), (texts, 1))


def neighbour_scores(train_texts: list[str], train_targets: csr_matrix, texts: list[str]) -> np.ndarray:
    """1 for the nearest neighbour's labels, else 0; among equals the commoner label comes first."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute")
    nearest.fit(vectorizer.fit_transform(train_texts))
    rows = nearest.kneighbors(vectorizer.transform(texts), return_distance=False)[:, 0]
    tie_break = 0.1 * frequency_scores(train_targets, 1)
    return train_targets[rows].toarray().astype(np.float32) + tie_break


def table(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [" " * width + "".join(f"{column:>10}" for column in COLUMNS)]
    for row in rows:
        values = astuple(row.figures)[: len(COLUMNS)]
        lines.append(f"{row.name:<{width}}" + "".join(f"{'-':>10}" if v is None else f"{v:10.3f}" for v in values))
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
