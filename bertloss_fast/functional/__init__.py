"""The losses as functions."""

from .sigmoid import binary_cross_entropy_with_logits, sigmoid_focal_loss

__all__ = ["binary_cross_entropy_with_logits", "sigmoid_focal_loss"]
