"""The recipe from beginning to end: data, one training or several, baselines, a table, files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from adversarial import make_attack
from bertloss_fast import class_balanced_weight, label_counts, pos_weight_from_counts, prior_bias
from bertloss_fast.integrations.transformers import MultiLabelCollator, compute_loss_func
from bertloss_fast.metrics import multilabel_metrics, topk_logits_for_metrics, tune_thresholds
from clinical_codes import describe
from evaluation import FREQUENCY, Row, frequency_scores, judge, table
from experiment import (
    LABELS_SHOWN,
    OptionError,
    choose_device,
    data_sentence,
    describe_options,
    make_directory,
    neighbour_row,
    print_labels,
)
from recipe_data import Data, Texts, folds, load_data, make_sampler
from recipe_model import MeanPooledBert, codes_of, load_classifier, load_models, new_model, save, voting
from recipe_trainer import Pace, RecipeTrainer, TeacherFollows, has_bfloat16, make_arguments, make_optimizer
from second_opinions import OwnAverage, Teacher
from training import make_loss, sparse_labels, stop_request

FOLDER = "recipe"
EVALUATION_TEXTS = 500
"""What early stopping and cross-validation judge a model on."""
RANKED = 50
"""Labels of a text whose logits an evaluation keeps; no text has as many."""


class Fitted(NamedTuple):
    models: list[MeanPooledBert]
    steps: int
    texts: int
    seconds: float
    of_folds: list[dict[str, float]]
    """What `multilabel_metrics` says of each model on texts that its training left out."""
    interrupted: bool


def train(options: argparse.Namespace, data: Data, device: torch.device) -> Fitted:
    """A model, or one for each fold, which share the time. Ctrl-C ends the training and keeps what was learnt."""
    parts = [(data.train, data.validation, "training")]
    if options.folds is not None:
        if options.folds > len(data.train):
            raise OptionError(f"--folds {options.folds}: there are only {len(data.train):,} texts to train on")
        parts = [
            (data.train.select(learnt), data.train.select(left_out), f"fold {number} of {options.folds}")
            for number, (learnt, left_out) in enumerate(folds(len(data.train), options.folds, options.seed), 1)
        ]
    fitted = Fitted([], 0, 0, 0.0, [], False)
    with stop_request() as asked:
        for texts, held_out, title in parts:
            pace = Pace(options, options.seconds / len(parts), title, asked)
            trainer = make_trainer(options, data, device, texts, held_out, pace)
            trainer.train()
            of_folds = fitted.of_folds + ([trainer.evaluate()] if options.folds else [])
            trainer.accelerator.wait_for_everyone()
            if is_first_process():
                shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
            models = [*fitted.models, trainer.model]
            seconds = fitted.seconds + pace.lasted
            fitted = Fitted(
                models, fitted.steps + pace.steps, fitted.texts + pace.texts, seconds, of_folds, asked.is_set()
            )
            if fitted.interrupted:
                break
    return fitted


def make_trainer(
    options: argparse.Namespace, data: Data, device: torch.device, texts: Texts, held_out: Texts, pace: Pace
) -> RecipeTrainer:
    counts, labels = label_counts(sparse_labels(texts.targets)), len(data.codes)
    of_loss = options_of_the_loss(options, counts, len(texts))
    pos_weight = of_loss.get("pos_weight", torch.ones(labels)).clamp_min(1 / len(texts))
    bias = prior_bias(counts, len(texts)) + pos_weight.log()  # with these weights, so many positives
    model = new_model(data.codes, options.layers, bias, options.seed).to(device)
    loss = make_loss(options, counts, len(texts), **of_loss)
    arguments = make_arguments(options, device, options.runs / "recipe-checkpoints")
    optimizer = make_optimizer(model, options)
    callbacks: list[transformers.TrainerCallback] = [pace]
    teacher = make_teacher(options, data, device, model)
    if teacher is not None:
        callbacks.append(TeacherFollows(teacher))
    if options.early_stopping is not None:
        callbacks.append(transformers.EarlyStoppingCallback(options.early_stopping))
    judged = held_out.select(np.arange(min(len(held_out), EVALUATION_TEXTS)))
    trainer = RecipeTrainer(
        model,
        arguments,
        MultiLabelCollator(data.tokenizer, labels),
        texts,
        judged.select(np.argsort(judged.lengths)),
        compute_loss_func=compute_loss_func(loss),
        compute_metrics=multilabel_metrics(labels, threshold=None),
        preprocess_logits_for_metrics=topk_logits_for_metrics(RANKED),
        callbacks=callbacks,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, pace.factor)),
        options=options,
        sampler=make_sampler(options.sampler, texts, options.batch_size * arguments.world_size, options.seed),
        attack=make_attack(options.adversarial, options.epsilon) if options.adversarial else None,
        teacher=teacher,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def options_of_the_loss(options: argparse.Namespace, counts: Tensor, texts: int) -> dict[str, Any]:
    """Only those asked for: losses of whole rows take none."""
    chosen: dict[str, Any] = {}
    if options.class_weights == "positives":
        chosen["pos_weight"] = pos_weight_from_counts(counts, texts)
    if options.class_weights == "balanced":
        chosen["weight"] = class_balanced_weight(counts)
    if options.label_smoothing:
        chosen["label_smoothing"] = options.label_smoothing
    return chosen


def make_teacher(
    options: argparse.Namespace, data: Data, device: torch.device, student: MeanPooledBert
) -> Teacher | None:
    if options.distill is None:
        return None
    if options.distill == "self":
        return OwnAverage(student)
    models = load_models(options.distill)
    if codes_of(models[0]) != data.codes:
        raise OptionError(f"--distill {options.distill}: expected a teacher of the same {len(data.codes):,} labels")
    return Teacher([model.to(device) for model in models])


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def scores_of(fitted: Fitted, data: Data) -> np.ndarray:
    """Mean probabilities of the models for the validation texts and, below them, the test texts."""
    return voting(fitted.models, data.tokenizer).probabilities(data.held_out)


def run(options: argparse.Namespace, started: float) -> None:
    device = choose_device(options.device)
    if device.index:
        raise OptionError(f"--device {device}: Trainer takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES")
    make_directory(options.runs)
    data = load_data(options)
    if is_first_process():
        print(data_sentence(data.split, data.codes))
        print(f"Training on {device}; Ctrl-C stops early and keeps the model.", flush=True)
    fitted = train(options, data, device)
    if not is_first_process():
        return
    if fitted.interrupted:
        print("Stopped; what was trained is now evaluated and saved. Ctrl-C again ends without that.")
    scores = scores_of(fitted, data)
    keep(options.runs / FOLDER, fitted, data, scores)
    rows = [judge("MiniLM", data.targets, scores), *baselines(data)]
    print(f"\n{told(fitted)}\n\n{table({row.name: row.figures for row in rows})}")
    report = {
        "options": describe_options(options),
        "training": fitted._replace(models=len(fitted.models))._asdict(),
        "figures": {row.name: asdict(row.figures) for row in rows},
    }
    (options.runs / "recipe.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{time.monotonic() - started:.0f} s in all. In {options.runs}/: {FOLDER}/, recipe.json.")


def keep(folder: Path, fitted: Fitted, data: Data, scores: np.ndarray) -> None:
    """The models, and the thresholds that the validation texts' scores say."""
    thresholds = tune_thresholds(scores[: len(data.validation)], data.targets.validation, from_logits=False)
    save(folder, fitted.models, data.tokenizer, thresholds)


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def baselines(data: Data) -> list[Row]:
    frequency = judge(FREQUENCY, data.targets, frequency_scores(data.targets.train, len(data.held_out)))
    return [neighbour_row("", data.split.train, data.targets, data.held_out), frequency]


def told(fitted: Fitted) -> str:
    """What training was like."""
    several = f", {len(fitted.models)} models" if len(fitted.models) > 1 else ""
    lines = [f"After {fitted.texts:,} texts in {fitted.steps:,} steps and {fitted.seconds:.0f} s{several}:"]
    if fitted.of_folds:
        values = [of_fold["eval_ndcg@5"] for of_fold in fitted.of_folds]
        lines.append(f"nDCG@5 on texts that a fold left out: {', '.join(f'{value:.3f}' for value in values)}.")
    return "\n".join(lines)


def label_text(options: argparse.Namespace) -> None:
    classifier = load_classifier(options.runs / FOLDER, choose_device(options.device))
    threshold = classifier.thresholds.item()
    likeliest = classifier.topk([options.text], RANKED)[0]
    shown = max(LABELS_SHOWN, sum(probability >= threshold for _, probability in likeliest))
    print_labels([(code, describe(code), probability) for code, probability in likeliest[:shown]], threshold)
