"""The losses as functions."""

from .imbalance import distribution_balanced_loss, ghm_loss
from .rowwise import two_way_loss, zlpr_loss
from .sigmoid import asymmetric_loss, binary_cross_entropy_with_logits, poly_focal_loss, sigmoid_focal_loss
from .weights import class_balanced_weight, label_counts, pos_weight_from_counts, prior_bias

__all__ = [
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "class_balanced_weight",
    "distribution_balanced_loss",
    "ghm_loss",
    "label_counts",
    "poly_focal_loss",
    "pos_weight_from_counts",
    "prior_bias",
    "sigmoid_focal_loss",
    "two_way_loss",
    "zlpr_loss",
]
