"""A Trainer that counts what its loss divides by, over all batches of an optimizer step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from ...targets import SparseLabels
from .collator import padded
from .losses import ItemCounts, TrainerLoss
from .patch import Patch, patch_of

if not hasattr(Trainer, "_get_num_items_in_batch"):  # else Trainer's own count would be taken without a word
    raise ImportError(
        "transformers: expected a Trainer that counts in _get_num_items_in_batch, as 4.57 to 5.23 do, "
        f"got {transformers.__version__}"
    )


class FusedLossTrainer(Trainer):  # type: ignore[misc]
    """Trainer for every loss, reduction and form of labels, exact under gradient accumulation and several processes.

    Two-way and GHM compare the rows of a batch, so accumulated batches are weighted, not merged.

    Trainer itself counts all labels but -100: the elements of zeros and ones, the positives of padded numbers of
    labels, nothing of :class:`SparseLabels`. This one counts what the loss's reduction divides by, over all batches of
    an optimizer step and, with ``average_tokens_across_devices``, over all processes. Its evaluation loss is that of
    all of the data at once.

    It takes Trainer's arguments, and is a mixin: ``class MyTrainer(FusedLossTrainer, SomeTrainer)``.

    Args:
        args, kwargs: Trainer's; ``compute_loss_func`` is what :func:`compute_loss_func` returns, or the model is one
            that ``use_fused_loss`` has patched.

    Raises:
        TypeError, ValueError: for neither or both of these, for ``label_smoothing_factor``, for several devices in one
            process, and for a model whose ``config`` does not tell ``num_labels``.

    Example::

        >>> from bertloss_fast import ZlprLoss
        >>> from bertloss_fast.integrations.transformers import FusedLossTrainer, compute_loss_func
        >>> FusedLossTrainer(  # doctest: +SKIP
        ...     model, arguments, collator, train_dataset, compute_loss_func=compute_loss_func(ZlprLoss())
        ... ).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if patch_of(self.model) not in (None, self.fused_loss):
            raise ValueError("compute_loss_func: expected None with a model that use_fused_loss has patched")
        if self.label_smoother is not None:
            raise ValueError(
                f"label_smoothing_factor: expected 0, since the loss has its own label_smoothing, "
                f"got {self.args.label_smoothing_factor}"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu: expected one device a process (torchrun, accelerate launch), got {self.args.n_gpu}, "
                "among which DataParallel cannot split what is counted"
            )
        if getattr(getattr(self.model, "config", None), "num_labels", None) is None:
            raise ValueError("model.config.num_labels: expected the number of labels, got none")
        self._counted: ItemCounts | None = None
        self._evaluated = self._nothing_evaluated()

    @property
    def fused_loss(self) -> TrainerLoss | Patch:
        """The loss that is counted for."""
        loss = patch_of(self.model) if self.compute_loss_func is None else self.compute_loss_func
        if not isinstance(loss, TrainerLoss | Patch):
            raise TypeError(
                "compute_loss_func: expected what bertloss_fast's compute_loss_func returns, or a model that "
                f"use_fused_loss has patched, got {'none' if loss is None else type(loss).__name__}"
            )
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> ItemCounts | None:
        """Of the batches of an optimizer step, in Trainer's place."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and parallel.non_data_parallel_size > 1:
            raise ValueError("parallelism_config: expected data parallelism alone, whose processes have their own rows")
        num_labels = self.model.config.num_labels
        counts = [self.fused_loss.counts(batch["labels"], num_labels) for batch in batch_samples]
        total = torch.stack([each.denominator for each in counts]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        self._counted = ItemCounts(total, num_labels)
        return self._counted

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Labels come out as a tensor, which Trainer can gather."""
        self._counted = None
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and self._counted is not None:
            number = self._counted.denominator.to(self._evaluated)
            total = loss.to(self._evaluated) * torch.where(number == 0, 1, number)  # of 0, it was divided by 1
            self._evaluated += torch.stack([total, number, torch.ones_like(number)])
        return loss, logits, padded(labels) if isinstance(labels, SparseLabels) else labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """With the loss of all data at once, where Trainer's is a mean of the batches' losses."""
        self._evaluated = self._nothing_evaluated()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # Trainer multiplies a loss that is divided by the count of all processes by how many they are.
        over_all = "mean" if self.args.average_tokens_across_devices else "sum"
        total, number, batches = self.accelerator.reduce(self._evaluated, over_all).tolist()
        if batches:
            output.metrics[f"{metric_key_prefix}_loss"] = total / (number or 1)
        return output

    def _nothing_evaluated(self) -> Tensor:
        """What batches' losses add up to before they are divided, by what, and how many batches."""
        device = self.args.device
        return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
