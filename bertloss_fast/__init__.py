"""Fused classification losses for BERT-style heads."""

from .functional import binary_cross_entropy_with_logits, sigmoid_focal_loss
from .modules import BCEWithLogitsLoss, SigmoidFocalLoss
from .ops.dispatch import set_backend

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "SigmoidFocalLoss",
    "binary_cross_entropy_with_logits",
    "set_backend",
    "sigmoid_focal_loss",
]
