"""What test_trainer.py has each of two processes do: RANK FOLDER.

They train together, a step of two accumulated batches each, whose rows do not count alike. What the step should have
been is that of one model which has all of their batches at once, without Trainer and without DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bertloss_fast as bf
from bertloss_fast.integrations.transformers import FusedLossTrainer, compute_loss_func, use_fused_loss
from tests.bert import LABELS, arguments, class_labels, rows_of, some_ignored, tiny
from tests.processes import do_each

RATE = 0.5
ROWS = 12  # two steps' rows: an epoch goes on after the step that is compared


WEIGHT = torch.linspace(0.1, 3, LABELS)
LOSSES: dict[str, tuple[nn.Module, Tensor]] = {
    "CrossEntropyLoss": (bf.CrossEntropyLoss(WEIGHT, backend="eager"), class_labels(ROWS)),
    "AsymmetricLossMultiLabel": (bf.AsymmetricLossMultiLabel(reduction="mean", backend="eager"), some_ignored(ROWS)),
    "ZlprLoss": (bf.ZlprLoss("mean_positive", backend="eager"), some_ignored(ROWS)),
    "sum": (bf.SigmoidFocalLoss(reduction="sum", backend="eager"), some_ignored(ROWS)),
    "local": (bf.AsymmetricLossMultiLabel(reduction="mean", backend="eager"), some_ignored(ROWS)),
    "fused head": (bf.AsymmetricLossMultiLabel(reduction="mean", backend="eager"), some_ignored(ROWS)),
}


def train(model: nn.Module, name: str, folder: Path) -> tuple[list[dict[str, Tensor]], float]:
    """A step; returns the batches that this process saw, and the loss of all rows after it."""
    loss, labels = LOSSES[name]
    seen: list[dict[str, Tensor]] = []

    class Seeing(FusedLossTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *given: Any) -> Tensor:
            assert isinstance(model, nn.parallel.DistributedDataParallel)
            seen.append(dict(inputs))
            step: Tensor = super().training_step(model, inputs, *given)
            return step

    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": RATE, "ddp_backend": "gloo"}
    options["average_tokens_across_devices"] = name != "local"
    if name == "fused head":
        use_fused_loss(model, loss, fused_head=True)
        of_ours = None
    else:
        of_ours = compute_loss_func(loss)
    rows = rows_of(labels)
    trainer = Seeing(
        model, arguments(folder, 2, **options), train_dataset=rows, eval_dataset=rows, compute_loss_func=of_ours
    )
    trainer.train()
    return seen, trainer.evaluate()["eval_loss"]


def expected(model: nn.Module, name: str, batches: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The weights after the step that all batches make at once; or, counted locally, the processes' mean step."""
    windows = batches if name == "local" else [[batch for of_process in batches for batch in of_process]]
    loss = 0.0
    for window in windows:
        tokens, labels = (torch.cat([batch[key] for batch in window]) for key in ("input_ids", "labels"))
        loss = loss + compute_loss_func(LOSSES[name][0]).of_logits(model(tokens).logits, labels) / len(windows)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    steps = zip(model.named_parameters(), gradients, strict=True)
    return {key: (value - RATE * gradient).detach() for (key, value), gradient in steps}


def check(name: str, folder: Path) -> None:
    model = tiny()
    batches: list[Any] = [None] * dist.get_world_size()
    seen, evaluated = train(model, name, folder)
    dist.all_gather_object(batches, seen)
    assert len({tuple(row) for of in batches for batch in of for row in batch["input_ids"].tolist()}) == 8, (
        "no row twice"
    )
    found = {key: value.detach() for key, value in model.named_parameters()}
    torch.testing.assert_close(found, expected(tiny(), name, batches), rtol=1e-5, atol=1e-6)
    loss, labels = LOSSES[name]
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows_of(labels)])).logits
        of_all = compute_loss_func(loss).of_logits(logits, labels).item()
    torch.testing.assert_close(evaluated, of_all, rtol=1e-5, atol=0)


if __name__ == "__main__":
    do_each(LOSSES, check)
