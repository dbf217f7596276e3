"""Three rerankers of `reranking.py`'s task, trained one after another within the minutes given, and their figures.

One learns from graded lists by LambdaLoss, one from positives and mined hard negatives, and one of half as many layers
from the margins of the first.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import random
import time
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.util import mine_hard_negatives
from torch import nn

from bertloss_fast.integrations.sentence_transformers import LambdaLoss, MarginMSELoss, MultipleNegativesRankingLoss
from classifier import pretrained_directory
from clinical_codes import load_families, split_families
from experiment import Clock, choose_device, make_directory
from reranking import CANDIDATES, Categories, Figures, Task, judge, make_task, training_lists
from trainer_clock import FollowsTheClock

TRAINING_QUERIES_A_MINUTE, TEST_QUERIES_A_MINUTE = 400, 30
TEACHER_QUERIES = 1000
NEGATIVES = 3
LEARNING_RATE = 3e-4
MAX_TOKENS = 64
SHARES = {"LambdaLoss": 0.35, "MultipleNegativesRankingLoss": 0.35, "MarginMSELoss": 0.3}
"""Of the time that is left for training."""


class Rerankers:
    """The task, and what is found out about each model."""

    def __init__(self, options: argparse.Namespace, started: float) -> None:
        self.options, self.clock = options, Clock(started, options.minutes)
        self.device = choose_device(options.device)
        families = load_families()
        split = split_families(families, options.limit)
        self.categories = Categories(families)
        wanted = (max(20, int(count * options.minutes)) for count in (TRAINING_QUERIES_A_MINUTE, TEST_QUERIES_A_MINUTE))
        of_training, of_test = wanted
        test = split.test[:of_test]
        self.task = make_task(test, self.categories)
        self.train = random.Random(options.seed).sample(split.train, min(of_training, len(split.train)))
        self.rows: list[dict[str, Any]] = []
        learnt = {family.code[:3] for family in self.train}
        self.unseen = sum(family.code[:3] not in learnt for family in test)

    def tell(self, name: str, after: Figures, before: Figures | None = None, **more: Any) -> None:
        row = {"name": name, "before": before and before._asdict(), "after": after._asdict(), **more}
        self.rows.append(row)
        started = f"from {before.ndcg:.3f} and {before.mrr:.3f}, " if before else ""
        print(f"{name}: {started}NDCG@10 {after.ndcg:.3f}, MRR {after.mrr:.3f}", flush=True)

    def baselines(self, encoder: SentenceTransformer) -> None:
        """What orders the candidates without having been trained to."""
        rows = np.arange(len(self.task.queries))[:, None]
        _, scores = self.categories.nearest(self.task.queries)
        self.tell("TF-IDF", judge(self.task, scores[rows, self.task.candidates]))
        queries, documents = (
            encoder.encode(texts, normalize_embeddings=True) for texts in (self.task.queries, self.categories.texts)
        )
        self.tell("MiniLM, cosine of embeddings", judge(self.task, (queries @ documents.T)[rows, self.task.candidates]))

    def scores(self, model: CrossEncoder, task: Task) -> Figures:
        pairs = [
            (query, self.categories.texts[number])
            for query, numbers in zip(task.queries, task.candidates, strict=True)
            for number in numbers
        ]
        return judge(task, predict(model, pairs).reshape(task.candidates.shape))

    def fit(self, loss: nn.Module, columns: Dataset, batch_size: int, seconds: float) -> int:
        """Trains a loss's model for so many seconds; returns the number of steps."""
        torch.manual_seed(self.options.seed)
        clock = FollowsTheClock(seconds)
        trained = [parameter for parameter in loss.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.01)
        arguments = CrossEncoderTrainingArguments(
            output_dir=str(self.options.runs / "reranker"),
            num_train_epochs=10_000,  # until the time is over
            per_device_train_batch_size=batch_size,
            bf16=in_bfloat16(loss.model),
            use_cpu=self.device.type == "cpu",
            seed=self.options.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.factor)
        trainer = CrossEncoderTrainer(
            loss.model, arguments, columns, loss=loss, callbacks=[clock], optimizers=(optimizer, schedule)
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        return clock.steps


def new_model(device: torch.device, seed: int) -> CrossEncoder:
    """The pretrained MiniLM with a new head; its embeddings and the lower half of its layers stay as they are."""
    torch.manual_seed(seed)
    model = CrossEncoder(str(pretrained_directory()), num_labels=1, max_length=MAX_TOKENS, device=str(device))
    bert = model.model.bert
    for frozen in (bert.embeddings, *bert.encoder.layer[: len(bert.encoder.layer) // 2]):
        frozen.requires_grad_(False)
    return model


def lower_half(teacher: CrossEncoder) -> CrossEncoder:
    """A teacher without the upper half of its layers, under its own head, to be trained as a whole."""
    student = copy.deepcopy(teacher)
    bert = student.model.bert
    bert.encoder.layer = bert.encoder.layer[: len(bert.encoder.layer) // 2]
    bert.config.num_hidden_layers = len(bert.encoder.layer)
    bert.encoder.requires_grad_(True)
    return student


def predict(model: CrossEncoder, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Logits; on a processor that is faster with it, in bfloat16."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16(model)):
        return model.predict(pairs, batch_size=128, activation_fn=nn.Identity())


_in_bfloat16: dict[str, bool] = {}


def in_bfloat16(model: CrossEncoder) -> bool:
    """Whether the device is faster in it, which is timed once."""
    kind = model.device.type
    if kind not in _in_bfloat16:
        seconds, texts = {}, [("displaced fracture of shaft of left ulna", "fracture of forearm")] * 128
        for enabled in (False, True):
            with torch.autocast(kind, torch.bfloat16, enabled=enabled):
                for _ in range(2):
                    begun = time.perf_counter()
                    model.predict(texts, batch_size=128)
                    seconds[enabled] = time.perf_counter() - begun
        _in_bfloat16[kind] = seconds[True] < seconds[False]
    return _in_bfloat16[kind]


def mined(work: Rerankers, encoder: SentenceTransformer) -> Dataset:
    """Each training query, its category, and the categories nearest to it by their embeddings."""
    own = work.categories.own(work.train)
    positives = [work.categories.texts[number] for number in own]
    pairs = Dataset.from_dict({"query": [family.text for family in work.train], "category": positives})
    of_negatives: dict[str, Any] = {"num_negatives": NEGATIVES, "output_format": "n-tuple"}
    return mine_hard_negatives(
        pairs, encoder, corpus=work.categories.texts, batch_size=128, verbose=False, **of_negatives
    )


def with_scores_of(teacher: CrossEncoder, columns: Dataset) -> Dataset:
    """The first queries of mined columns with the teacher's score of each of their documents."""
    columns = columns.select(range(min(TEACHER_QUERIES, len(columns))))
    names = columns.column_names[1:]
    scores = [predict(teacher, list(zip(columns["query"], columns[name], strict=True))) for name in names]
    return columns.add_column("scores", np.stack(scores, axis=1).tolist())


def run(options: argparse.Namespace, started: float) -> None:
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    make_directory(options.runs)
    work = Rerankers(options, started)
    task, device = work.task, work.device
    print(
        f"{len(task.queries)} test queries with {CANDIDATES} candidates each of {len(work.categories.codes):,} "
        f"categories. TF-IDF has the right one among them for {task.found:.0%}; for the others it was put there."
    )
    encoder = SentenceTransformer(str(pretrained_directory()), device=str(device))
    work.baselines(encoder)
    lists = Dataset.from_dict(training_lists(work.train, work.categories, options.seed))
    negatives = mined(work, encoder)

    listwise, pairwise = (new_model(device, options.seed) for _ in range(2))
    in_bfloat16(listwise)
    begun = time.monotonic()
    untrained = work.scores(listwise, task)
    reserve = (
        4 * (time.monotonic() - begun) + 5.0
    )  # judging three models and a half-sized one, and the teacher's scores
    left = max(work.clock.remaining() - reserve, 0.5 * work.clock.remaining(), 10.0)

    loss = LambdaLoss(listwise, mini_batch_size=-1)
    steps = work.fit(loss, lists, 8, SHARES["LambdaLoss"] * left)
    work.tell("LambdaLoss, graded lists", work.scores(listwise, task), untrained, steps=steps)
    listwise.save_pretrained(str(options.runs / "reranker"))

    loss = MultipleNegativesRankingLoss(pairwise)
    steps = work.fit(loss, negatives, 16, SHARES["MultipleNegativesRankingLoss"] * left)
    name = "MultipleNegativesRankingLoss, mined negatives"
    work.tell(name, work.scores(pairwise, task), untrained, steps=steps)

    student = lower_half(listwise)
    before = work.scores(student, task)
    steps = work.fit(MarginMSELoss(student), with_scores_of(listwise, negatives), 16, SHARES["MarginMSELoss"] * left)
    work.tell("MarginMSELoss, 3 layers, from the first", work.scores(student, task), before, steps=steps)
    report(work)


def report(work: Rerankers) -> None:
    """The table, the file of figures, and what the model card says."""
    runs = work.options.runs
    print("\n" + table(work.rows))
    figures = {
        "rows": work.rows,
        "queries": {"test": len(work.task.queries), "train": len(work.train), "of unseen categories": work.unseen},
        "candidates": CANDIDATES,
        "found by TF-IDF": round(work.task.found, 4),
        "minutes": work.options.minutes,
        "seconds": round(work.clock.elapsed(), 1),
        "seed": work.options.seed,
        "device": str(work.device),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    (runs / "reranker.json").write_text(json.dumps(figures, indent=1) + "\n")
    card = (runs / "reranker" / "README.md").read_text(encoding="utf-8")
    named = next(line for line in card.splitlines() if "bertloss_fast" in line).strip(" *")
    cited = next(line for line in card.splitlines() if "LambdaLoss Framework" in line).strip()
    print(f"\nThe model card in {runs / 'reranker'}/ has: {named}\n    and cites {cited}")
    print(f"{work.clock.elapsed():.0f} s in all. Figures are in {runs / 'reranker.json'}.")


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| | NDCG@10 before | after | MRR before | after | steps |", "|---|---|---|---|---|---|"]
    for row in rows:
        before, after = row["before"], row["after"]
        cells = [f"{figures[kind]:.3f}" if figures else "" for kind in ("ndcg", "mrr") for figures in (before, after)]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row.get('steps', '')} |")
    return "\n".join(lines)
