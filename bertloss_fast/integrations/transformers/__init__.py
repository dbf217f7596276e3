"""The losses in transformers' Trainer, 4.57 or later.

=========================  ====================================================================================
compute_loss_func          any loss for ``Trainer(compute_loss_func=...)`` (losses; counting has what divides them)
FusedLossTrainer           a Trainer that counts what the loss divides by, over all accumulated batches (trainer)
use_fused_loss             any loss as a model's own, with the last linear layer in it (patch; heads has that layer)
MultiLabelCollator         texts with lists of labels (collator)
topk_logits_for_metrics    evaluation without the scores of all labels (bertloss_fast.metrics)
=========================  ====================================================================================
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is there, and misses something of its own
    raise ImportError(
        "bertloss_fast.integrations.transformers needs transformers 4.57 or later: "
        'pip install "bertloss-fast[transformers]"'
    ) from error

from ...metrics import topk_logits_for_metrics
from .collator import MultiLabelCollator
from .losses import ItemCounts, TrainerLoss, compute_loss_func
from .patch import Undo, undo_fused_loss, use_fused_loss
from .trainer import FusedLossTrainer

__all__ = [
    "FusedLossTrainer",
    "ItemCounts",
    "MultiLabelCollator",
    "TrainerLoss",
    "Undo",
    "compute_loss_func",
    "topk_logits_for_metrics",
    "undo_fused_loss",
    "use_fused_loss",
]
