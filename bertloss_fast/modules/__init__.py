"""The losses as modules."""

from .distillation import DistillationLoss, JSDivLoss, MarginMSELoss, RDropLoss
from .imbalance import DistributionBalancedLoss, GHMLoss
from .listwise import (
    ADRMSELoss,
    LambdaLoss,
    ListMLELoss,
    ListNetLoss,
    MultipleNegativesRankingLoss,
    PListMLELoss,
    RankNetLoss,
)
from .pointwise import KLDivLoss, MSELoss
from .rowwise import TwoWayLoss, ZlprLoss
from .sigmoid import AsymmetricLossMultiLabel, BCEWithLogitsLoss, PolyBinaryCrossEntropy, SigmoidFocalLoss
from .softmax import CrossEntropyLoss, LDAMLoss, PolyCrossEntropy, SoftmaxFocalLoss

__all__ = [
    "ADRMSELoss",
    "AsymmetricLossMultiLabel",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "DistributionBalancedLoss",
    "GHMLoss",
    "JSDivLoss",
    "KLDivLoss",
    "LDAMLoss",
    "LambdaLoss",
    "ListMLELoss",
    "ListNetLoss",
    "MSELoss",
    "MarginMSELoss",
    "MultipleNegativesRankingLoss",
    "PListMLELoss",
    "PolyBinaryCrossEntropy",
    "PolyCrossEntropy",
    "RDropLoss",
    "RankNetLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "TwoWayLoss",
    "ZlprLoss",
]
