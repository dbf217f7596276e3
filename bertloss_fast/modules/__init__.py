"""The losses as modules."""

from .sigmoid import BCEWithLogitsLoss, SigmoidFocalLoss

__all__ = ["BCEWithLogitsLoss", "SigmoidFocalLoss"]
