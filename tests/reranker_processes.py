"""What test_reranker_training.py has each of two processes do: RANK FOLDER.

They train together by a trainer, a step of two accumulated batches each. What the step should have been is computed
from the batches that all of them saw, by sentence-transformers' own loss and without DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.cross_encoder import CrossEncoder, losses
from torch import nn

import bertloss_fast.integrations.sentence_transformers as ours
from tests.processes import do_each
from tests.rerankers import copies, trainer_of, value_and_gradients

RATE = 0.5
ALL = {"num_negatives": None}  # drawn ones would be others without the other process
LOSSES: dict[str, dict[str, Any]] = {
    "LambdaLoss": {"mini_batch_size": 2},
    "BinaryCrossEntropyLoss": {},
    "MultipleNegativesRankingLoss": ALL,
    "CachedMultipleNegativesRankingLoss": ALL | {"mini_batch_size": 3},
    "MarginMSELoss": {},
}


def train(model: CrossEncoder, loss: nn.Module, folder: Path) -> list[Any]:
    """A step; returns the batches that this process saw."""
    seen: list[Any] = []
    loss.register_forward_pre_hook(lambda _, given: seen.append(given))
    options = {"learning_rate": RATE, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer_of(loss, folder, max_steps=1, gradient_accumulation_steps=2, ddp_backend="gloo", **options).train()
    assert isinstance(loss.model, nn.parallel.DistributedDataParallel)
    return seen


def check(name: str, folder: Path) -> None:
    one, other = copies(folder, 2)
    batches: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(batches, train(one, getattr(ours, name)(one, **LOSSES[name]), folder))
    seen = [batch for of_process in batches for batch in of_process]
    assert len(seen) == 4
    assert len({text for batch in seen for text in batch[0][0]}) == 8, "no query is in two batches"
    theirs = getattr(losses, name)(other, **LOSSES[name])
    steps = [value_and_gradients(theirs, *batch)[1] for batch in seen]
    for parameter, (key, start) in zip(one.parameters(), other.named_parameters(), strict=True):
        change = -RATE * sum(step[key] for step in steps) / len(steps)
        torch.testing.assert_close({key: parameter - start}, {key: change}, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    do_each(LOSSES, check)
