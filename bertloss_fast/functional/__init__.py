"""The losses as functions."""

from .distillation import distillation_loss, js_div_loss, margin_mse_loss, r_drop_loss
from .imbalance import distribution_balanced_loss, ghm_loss
from .linear import (
    linear_asymmetric_loss,
    linear_binary_cross_entropy,
    linear_cross_entropy,
    linear_poly_focal_loss,
    linear_sigmoid_focal_loss,
    linear_softmax_focal_loss,
)
from .lists import pad_lists
from .listwise import (
    adr_mse_loss,
    lambda_loss,
    list_mle_loss,
    list_net_loss,
    multiple_negatives_ranking_loss,
    p_list_mle_loss,
    rank_net_loss,
)
from .pointwise import kl_div, mse_loss
from .rowwise import two_way_loss, zlpr_loss
from .sigmoid import asymmetric_loss, binary_cross_entropy_with_logits, poly_focal_loss, sigmoid_focal_loss
from .softmax import cross_entropy, ldam_loss, poly_cross_entropy, softmax_focal_loss
from .weights import class_balanced_weight, label_counts, pos_weight_from_counts, prior_bias

__all__ = [
    "adr_mse_loss",
    "asymmetric_loss",
    "binary_cross_entropy_with_logits",
    "class_balanced_weight",
    "cross_entropy",
    "distillation_loss",
    "distribution_balanced_loss",
    "ghm_loss",
    "js_div_loss",
    "kl_div",
    "label_counts",
    "lambda_loss",
    "ldam_loss",
    "linear_asymmetric_loss",
    "linear_binary_cross_entropy",
    "linear_cross_entropy",
    "linear_poly_focal_loss",
    "linear_sigmoid_focal_loss",
    "linear_softmax_focal_loss",
    "list_mle_loss",
    "list_net_loss",
    "margin_mse_loss",
    "mse_loss",
    "multiple_negatives_ranking_loss",
    "p_list_mle_loss",
    "pad_lists",
    "poly_cross_entropy",
    "poly_focal_loss",
    "pos_weight_from_counts",
    "prior_bias",
    "r_drop_loss",
    "rank_net_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "two_way_loss",
    "zlpr_loss",
]
