"""Drop-in losses for the cross-encoders of sentence-transformers, 5.1 or later.

The names, arguments and numbers are those of ``sentence_transformers.cross_encoder.losses``: change the import, and
the loss is computed by bertloss_fast's kernels. The weighting schemes are sentence-transformers' own classes. Focal,
asymmetric and GHM loss are new there, and so is binary cross-entropy of several labels.

==================================================  ================================================================
inputs                                              losses
==================================================  ================================================================
pairs of texts with a class or a score (pairs)      CrossEntropyLoss, MSELoss
pairs of texts with one label or several (labels)   BinaryCrossEntropyLoss, FocalLoss, AsymmetricLoss, GHMLoss
queries, lists of documents (lists, orders)         LambdaLoss, RankNetLoss, ListNetLoss, ADRMSELoss, ListMLELoss,
                                                    PListMLELoss
queries, positives, negatives (negatives)           MultipleNegativesRankingLoss, MarginMSELoss,
                                                    CachedMultipleNegativesRankingLoss (in two passes: gradcache)
==================================================  ================================================================
"""

try:
    from sentence_transformers.cross_encoder.losses import (
        LambdaRankScheme,
        NDCGLoss1Scheme,
        NDCGLoss2PPScheme,
        NDCGLoss2Scheme,
        NoWeightingScheme,
        PListMLELambdaWeight,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "sentence_transformers":
        raise  # it is there, and misses something of its own
    raise ImportError(
        "bertloss_fast.integrations.sentence_transformers needs sentence-transformers 5.1 or later: "
        'pip install "bertloss-fast[sentence-transformers]"'
    ) from error

from .labels import AsymmetricLoss, BinaryCrossEntropyLoss, FocalLoss, GHMLoss
from .lists import ADRMSELoss, LambdaLoss, ListNetLoss, RankNetLoss
from .negatives import CachedMultipleNegativesRankingLoss, MarginMSELoss, MultipleNegativesRankingLoss
from .orders import ListMLELoss, PListMLELoss
from .pairs import CrossEntropyLoss, MSELoss

__all__ = [
    "ADRMSELoss",
    "AsymmetricLoss",
    "BinaryCrossEntropyLoss",
    "CachedMultipleNegativesRankingLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GHMLoss",
    "LambdaLoss",
    "LambdaRankScheme",
    "ListMLELoss",
    "ListNetLoss",
    "MSELoss",
    "MarginMSELoss",
    "MultipleNegativesRankingLoss",
    "NDCGLoss1Scheme",
    "NDCGLoss2PPScheme",
    "NDCGLoss2Scheme",
    "NoWeightingScheme",
    "PListMLELambdaWeight",
    "PListMLELoss",
    "RankNetLoss",
]
