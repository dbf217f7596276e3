"""Fused classification losses for BERT-style heads."""

from .collate import collate_labels
from .functional import (
    asymmetric_loss,
    binary_cross_entropy_with_logits,
    class_balanced_weight,
    distribution_balanced_loss,
    ghm_loss,
    label_counts,
    poly_focal_loss,
    pos_weight_from_counts,
    prior_bias,
    sigmoid_focal_loss,
    two_way_loss,
    zlpr_loss,
)
from .modules import (
    AsymmetricLossMultiLabel,
    BCEWithLogitsLoss,
    DistributionBalancedLoss,
    GHMLoss,
    PolyBinaryCrossEntropy,
    SigmoidFocalLoss,
    TwoWayLoss,
    ZlprLoss,
)
from .ops.dispatch import set_backend
from .ops.upstream import UpstreamMemory
from .targets import SparseLabels

__version__ = "0.1.0"

__all__ = [
    "AsymmetricLossMultiLabel",
    "BCEWithLogitsLoss",
    "DistributionBalancedLoss",
    "GHMLoss",
    "PolyBinaryCrossEntropy",
    "SigmoidFocalLoss",
    "SparseLabels",
    "TwoWayLoss",
    "UpstreamMemory",
    "ZlprLoss",
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "class_balanced_weight",
    "collate_labels",
    "distribution_balanced_loss",
    "ghm_loss",
    "label_counts",
    "poly_focal_loss",
    "pos_weight_from_counts",
    "prior_bias",
    "set_backend",
    "sigmoid_focal_loss",
    "two_way_loss",
    "zlpr_loss",
]
