"""What a multi-label user measures, and the thresholds that make labels of scores. docs/metrics.md has the formulas.

    checks.py       arguments in any form: numbers, arrays, what a model returns
    inputs.py       scores of all labels or of the likeliest, labels in any form: checked, in one form
    ranking.py      precision, nDCG and propensity-scored precision at k, from the likeliest labels alone
    report.py       all figures of a set of texts; F1 and LRAP are scikit-learn's
    thresholds.py   the thresholds with the highest F1
    classifier.py   texts to labels, by threshold or by rank, by one model or by several

Scores are logits unless ``from_logits=False`` says that they are probabilities; a threshold is always a probability.
F1 and LRAP need scikit-learn (``pip install "bertloss-fast[metrics]"``), the rest only what this package needs.
"""

from .classifier import ThresholdedClassifier
from .ranking import propensities
from .report import multilabel_metrics, topk_logits_for_metrics
from .thresholds import Thresholds, best_threshold, tune_thresholds

__all__ = [
    "ThresholdedClassifier",
    "Thresholds",
    "best_threshold",
    "multilabel_metrics",
    "propensities",
    "topk_logits_for_metrics",
    "tune_thresholds",
]
