"""transformers' Trainer with the recipe's flags: which texts are drawn, what else is learnt from, and when it ends."""

from __future__ import annotations

import argparse
import math
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm

from adversarial import Attack, learn_disturbed
from bertloss_fast.integrations.transformers import FusedLossTrainer
from second_opinions import Teacher, disagreement, imitation
from trainer_clock import FollowsTheClock

HEAD_FACTOR = 10
"""Of the learning rate: a new head has more to learn than a pretrained encoder."""
EVALUATIONS = 8
"""In a training that may stop early."""


class RecipeTrainer(FusedLossTrainer, transformers.Trainer):
    """Gradients of adversarial noise, a teacher's or a second look's, on top of what `compute_loss_func` says."""

    def __init__(
        self,
        *args: Any,
        options: argparse.Namespace,
        sampler: Sampler[int],
        attack: Attack | None = None,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options, self.sampler, self.attack, self.teacher = options, sampler, attack, teacher

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        learn = partial(super().training_step, model, inputs, num_items_in_batch)
        if self.attack is None:
            return learn()
        own = self.accelerator.unwrap_model(model)  # of which no gradients are shared among processes

        def learn_alone() -> Tensor:
            with self.accelerator.no_sync(model):
                return learn()

        def loss() -> Tensor:
            return self.compute_loss(own, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

        return learn_disturbed(own.get_input_embeddings(), self.attack, learn_alone, learn, loss)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, means over the batch are added, of which Trainer's processes and steps take the mean."""
        of_labels = partial(super().compute_loss, model, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not model.training or (self.teacher is None and not self.options.r_drop):
            loss, outputs = of_labels(inputs)
            return (loss, outputs) if return_outputs else loss
        features = {name: value for name, value in inputs.items() if name != "labels"}
        looks = 2 if self.options.r_drop else 1
        loss, outputs = of_labels({name: torch.cat([value] * looks) for name, value in inputs.items()})
        loss = loss / looks  # the sum of both over the number of texts
        more = torch.zeros((), device=loss.device)
        if self.teacher is not None:
            with self.accelerator.autocast():
                chances = self.teacher(features, self.options.temperature)
            share = self.options.distill_share
            loss = (1 - share) * loss
            more = share * imitation(outputs.logits, chances.repeat(looks, 1), self.options.temperature)
        if self.options.r_drop:
            more = more + self.options.r_drop * disagreement(*outputs.logits.float().chunk(2))
        loss = loss + more / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Pace(FollowsTheClock):
    """The clock of the first process, or epochs where these end sooner; a progress bar; evaluations at even intervals.

    All processes have to end at the same step, and to learn at the same rate.
    """

    def __init__(self, options: argparse.Namespace, seconds: float, title: str, asked: threading.Event) -> None:
        super().__init__(seconds)
        self.epochs = options.epochs or math.inf
        self.evaluates = options.early_stopping is not None
        self.asked, self.reached, self.texts, self.lasted = asked, 0.0, 0, 0.0
        self._bar = tqdm(
            total=100,
            desc=title,
            mininterval=0.5,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
            disable=None,
        )

    def progress(self) -> float:
        return self.reached

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        before = self.reached
        now = max((time.monotonic() - self.started) / self.seconds, state.epoch / self.epochs, self.asked.is_set())
        self.reached = min(1.0, _of_first_process(now, args.device))
        self.texts += args.train_batch_size * args.world_size
        super().on_step_end(args, state, control, **more)
        if self.evaluates and int(EVALUATIONS * self.reached) > int(EVALUATIONS * before):
            control.should_evaluate = control.should_save = True
        self._bar.update(100 * self.reached - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            speed = self.texts / (time.monotonic() - self.started)
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:.0f} texts/s", refresh=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.lasted = time.monotonic() - self.started
        self._bar.close()


def _of_first_process(value: float, device: torch.device) -> float:
    if not torch.distributed.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, 0)
    return shared.item()


class TeacherFollows(transformers.TrainerCallback):
    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.teacher.follow(model)


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The head learns faster; vectors, biases and those of layer norms, do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("classifier."), parameter.dim() > 1), []).append(parameter)
    rate, decay = options.learning_rate, options.weight_decay
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rate * (HEAD_FACTOR if of_head else 1),
                "weight_decay": decay if is_matrix else 0.0,
            }
            for (of_head, is_matrix), parameters in groups.items()
        ],
        fused=True,
    )


def make_arguments(options: argparse.Namespace, device: torch.device, folder: Path) -> transformers.TrainingArguments:
    arguments: dict[str, Any] = {}
    if options.early_stopping is not None:
        # When, `Pace` says; the strategies have to be there for it to be heard.
        arguments = {"eval_strategy": "steps", "eval_steps": 10**9, "save_strategy": "steps", "save_steps": 10**9}
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "ndcg@5", "save_only_model": True}
        arguments |= {"save_total_limit": 1}
    else:
        arguments = {"save_strategy": "no"}
    return transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs or 10_000,  # the clock ends them
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=128,
        bf16=has_bfloat16(device),
        use_cpu=device.type == "cpu",
        seed=options.seed % 2**32,
        logging_steps=20,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether there are instructions for it: with AVX-512 BF16 a step takes half the time, without it longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
