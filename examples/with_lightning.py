"""Lightning: the loss in a LightningModule, the figures of each epoch in its log. The rest is that of with_pytorch.py.

python examples/with_lightning.py --limit 4000 --epochs 3
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from bertloss_fast import SigmoidFocalLoss, SparseLabels
from bertloss_fast.metrics import multilabel_metrics
from with_pytorch import arguments, load, make_optimizer, new_model, report


class Classifier(lightning.LightningModule):
    def __init__(self, model: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.model = model
        self.criterion = SigmoidFocalLoss(alpha=None, gamma=2.0, reduction="batchmean")
        self.measure = multilabel_metrics(num_labels, threshold=0.4)
        self.seen: list[tuple[SparseLabels, Tensor]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")  # SparseLabels have a `to`: Lightning has moved them to the model's device
        loss = self.criterion(self.model(**batch).logits, labels)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        labels = batch.pop("labels")
        self.seen.append((labels, self.model(**batch).logits))

    def on_validation_epoch_end(self) -> None:
        labels, logits = zip(*self.seen, strict=True)
        self.seen.clear()
        self.log_dict(self.measure(torch.cat(logits), SparseLabels.cat(labels)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)


def main(given: list[str] | None = None) -> dict[str, float]:
    options = arguments("Trains a classifier of clinical texts with Lightning.", given)
    data = load(options.limit)
    module = Classifier(new_model(len(data.codes)), len(data.codes))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data.train, data.validation)
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
    return report(module.model.to("cpu"), data)


if __name__ == "__main__":
    main()
