"""The losses as modules."""

from .imbalance import DistributionBalancedLoss, GHMLoss
from .rowwise import TwoWayLoss, ZlprLoss
from .sigmoid import AsymmetricLossMultiLabel, BCEWithLogitsLoss, PolyBinaryCrossEntropy, SigmoidFocalLoss

__all__ = [
    "AsymmetricLossMultiLabel",
    "BCEWithLogitsLoss",
    "DistributionBalancedLoss",
    "GHMLoss",
    "PolyBinaryCrossEntropy",
    "SigmoidFocalLoss",
    "TwoWayLoss",
    "ZlprLoss",
]
