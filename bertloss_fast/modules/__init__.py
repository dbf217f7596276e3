"""The losses as modules."""

from .distillation import DistillationLoss, JSDivLoss, MarginMSELoss, RDropLoss
from .imbalance import DistributionBalancedLoss, GHMLoss
from .pointwise import KLDivLoss, MSELoss
from .rowwise import TwoWayLoss, ZlprLoss
from .sigmoid import AsymmetricLossMultiLabel, BCEWithLogitsLoss, PolyBinaryCrossEntropy, SigmoidFocalLoss
from .softmax import CrossEntropyLoss, LDAMLoss, PolyCrossEntropy, SoftmaxFocalLoss

__all__ = [
    "AsymmetricLossMultiLabel",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DistributionBalancedLoss",
    "GHMLoss",
    "JSDivLoss",
    "KLDivLoss",
    "LDAMLoss",
    "MSELoss",
    "MarginMSELoss",
    "PolyBinaryCrossEntropy",
    "PolyCrossEntropy",
    "RDropLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "TwoWayLoss",
    "ZlprLoss",
]
