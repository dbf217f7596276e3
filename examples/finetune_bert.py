"""Fine-tunes a BERT-like encoder with transformers' Trainer, by the ways to fight imbalance and over-fitting.

    python examples/finetune_bert.py                                      a minute of training with binary cross-entropy
    python examples/finetune_bert.py --loss asl --sampler over            asymmetric loss, rare texts drawn more often
    python examples/finetune_bert.py --adversarial fgm --r-drop 1 --layers 4 --learning-rate 1e-3
    python examples/finetune_bert.py --folds 3 --early-stopping 2         three models that vote
    python examples/finetune_bert.py --distill runs/recipe --runs runs/student   what an earlier run has learnt
    python examples/finetune_bert.py --text "broken arm"                  labels this text with the saved model
    accelerate launch examples/finetune_bert.py                           on all GPUs

Every flag goes with every other, or says in a sentence why not. Results go to runs/: recipe/, with the model and its
thresholds, and recipe.json. `compare_recipes.py` measures what each flag changes. The rest: `recipe.py` (all of it in
order), `recipe_data.py` (tokens, samplers, folds), `recipe_model.py` (the classifier), `recipe_trainer.py` (Trainer
with these flags), `adversarial.py` (FGM and PGD), `second_opinions.py` (distillation and R-Drop).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import train_multilabel as demo
from train_multilabel import STARTED

SECONDS = 60.0
CLASS_WEIGHTS = {
    "positives": "a label's positives count as much as its negatives, by pos_weight_from_counts",
    "balanced": "by the effective number of texts that have a label, class_balanced_weight",
}
SAMPLERS = {
    "over": "texts with rare labels are drawn more often",
    "under": "texts with common labels only are left out of most epochs",
}
ATTACKS = {"fgm": "one step along the gradient", "pgd": "three"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tunes a pretrained MiniLM on clinical codes with transformers' Trainer and bertloss_fast.",
    )
    add = parser.add_argument
    demo.add_options_of_a_training(parser, loss="bce")
    demo.add_options_of_the_data(parser)
    shown = f"of training, all folds together (default {SECONDS:g}, unless --epochs are given)"
    add("--seconds", type=demo.positive, help=shown)
    add("--layers", type=demo.count, default=2, help="of the encoder's six, the lowest (default %(default)s)")
    shown = "of two layers, more want less; of the head ten times that (default %(default)g)"
    add("--learning-rate", type=demo.positive, default=2e-3, help=shown)
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The ways."""
    smoothing = demo.number(float, lambda value: 0 <= value < 1, "a number from 0 to less than 1")
    share = demo.number(float, lambda value: 0 < value <= 1, "a number above 0, at most 1")
    several = demo.number(int, lambda value: value >= 2, "a whole number of at least 2")
    add = parser.add_argument_group("imbalance").add_argument
    for name, meanings in (("--class-weights", CLASS_WEIGHTS), ("--sampler", SAMPLERS)):
        shown = "; ".join(f"{choice}: {meaning}" for choice, meaning in meanings.items())
        add(name, choices=meanings, metavar="NAME", help=shown)
    add = parser.add_argument_group("over-fitting").add_argument
    shown = "; ".join(f"{choice}: {meaning}" for choice, meaning in ATTACKS.items())
    add("--adversarial", choices=ATTACKS, metavar="NAME", help=f"noise on the word embeddings; {shown}")
    add("--epsilon", type=demo.positive, help="length of a text's noise; a word's embedding has 1.1 (default 0.3)")
    shown = "learn from the average of one's own weights, or from the model that an earlier run left in a folder"
    add("--distill", type=teacher, metavar="self|FOLDER", help=shown)
    add("--distill-share", type=share, help="of the loss that is the teacher's (default 0.5)")
    add("--temperature", type=demo.positive, help="of teacher and student (default 1)")
    shown = "two looks at each text with other dropout shall agree; the weight of that (the paper: 1 to 5)"
    add("--r-drop", type=demo.at_least_0, default=0.0, metavar="ALPHA", help=shown)
    add("--weight-decay", type=demo.at_least_0, default=0.0, help="of matrices (default %(default)g)")
    add("--label-smoothing", type=smoothing, default=0.0, help="pulls each label so far to 1/2 (default %(default)g)")
    shown = "ends after so many evaluations without progress, of eight in the time, and goes back to the best"
    add("--early-stopping", type=demo.count, metavar="PATIENCE", help=shown)
    add(
        "--folds",
        type=several,
        metavar="K",
        help="K models, each without a part of the texts, whose probabilities are averaged",
    )


def teacher(text: str) -> str | Path:
    return text if text == "self" else Path(text)


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    demo.check_training(parser, options)
    if options.loss in ("zlpr", "twoway"):
        for name in ("class_weights", "label_smoothing"):
            if getattr(options, name):
                flag = f"--{name.replace('_', '-')}"
                parser.error(f"{flag} changes single labels; --loss {options.loss} takes the labels of a text together")
    for flag, name, default in (
        ("adversarial", "epsilon", 0.3),
        ("distill", "distill_share", 0.5),
        ("distill", "temperature", 1.0),
    ):
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif getattr(options, flag) is None:
            parser.error(f"--{name.replace('_', '-')} belongs to --{flag}")
    if isinstance(options.distill, Path) and not options.distill.is_dir():
        parser.error(f"--distill: expected self or the folder that an earlier run wrote, got {options.distill}")
    if options.labels is not None and options.labels < 5:
        parser.error(f"--labels: expected at least 5, whose order nDCG@5 judges, got {options.labels}")
    if options.seconds is None:
        options.seconds = math.inf if options.epochs else SECONDS
    if options.text is not None:
        trains = "`python examples/finetune_bert.py` trains one"
        demo.check_checkpoint(parser, options.runs / "recipe" / "thresholds.json", trains)
    return options


def main() -> int:
    parser = make_parser()
    options = parse_options(parser)

    def work() -> None:
        import recipe

        if options.text is not None:
            recipe.label_text(options)
        else:
            recipe.run(options, STARTED)

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
