"""Trains the demo's encoder with a head of all labels, unfused and fused, and compares quality, memory and time.

    python examples/train_xmc.py                        three minutes in all, half for each head
    python examples/train_xmc.py --fused-step           a third head, which learns by `fused_step`
    python examples/train_xmc.py --labels-pad 100000    heads with more labels, which no text has
    python examples/train_xmc.py --sweep                only what steps cost, by the number of labels; draws it

Each head is trained in a process of its own, whose peak memory is read; the later ones take as many steps as the first.
Results go to runs/: xmc.json and xmc/checkpoint.pt, or xmc-sweep.json and xmc-sweep.png. The rest: `many_labels.py`
(the heads, and the training of one), `compare_heads.py` (all of them in order, table and picture), and the demo's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import train_multilabel as demo
from train_multilabel import STARTED

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
"""In the heads' processes glibc hands back what tensors of a MiB and more took. Else its heap grows step by step, and
the peak says little of what they hold."""

LOSSES = ("focal", "bce")
SWEEP = (None, 30_000, 100_000, 300_000)
"""Numbers of labels; the first is that of the texts."""
BATCH_SIZE, SWEEP_BATCH_SIZE = 32, 512
"""The second is for seeing what the logits take, `[N, L]`, beside the head's weight, `[L, 384]`."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares an unfused and a fused head of all labels: quality, peak memory and time of a step."
    )
    add = parser.add_argument
    names = ", ".join(f"{name}: {demo.LOSSES[name]}" for name in LOSSES)
    add("--loss", choices=LOSSES, default="focal", metavar="NAME", help=f"{names} (default %(default)s)")
    add("--labels-pad", type=demo.count, metavar="N", help="labels of the head (default: those of the texts)")
    add("--fused-step", action="store_true", help="a third head, which updates itself by HeadSGD in one pass")
    add("--steps", type=demo.count, help="at most so many of each head (default: until time is up)")
    shown = f"texts in a step (default {BATCH_SIZE}; {SWEEP_BATCH_SIZE} with --sweep)"
    add("--batch-size", type=demo.count, help=shown)
    sizes = ", ".join(f"{size:,}" for size in SWEEP if size)
    shown = f"only measure a few steps with heads of so many labels (default: those of the texts, {sizes})"
    add("--sweep", type=demo.count, nargs="*", metavar="N", help=shown)
    demo.add_options_of_a_run(parser)
    parser.set_defaults(gamma=2.0, alpha=None)
    return parser


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    for name in ("labels_pad", "steps", "minutes"):
        if options.sweep is not None and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no use with --sweep")
    if options.sweep == []:
        options.sweep = SWEEP
    if options.batch_size is None:
        options.batch_size = BATCH_SIZE if options.sweep is None else SWEEP_BATCH_SIZE
    return options


def main() -> int:
    parser = make_parser()
    options = parse_options(parser)

    def work() -> None:
        import compare_heads

        if options.sweep is None:
            compare_heads.compare(options, STARTED)
        else:
            compare_heads.sweep(options)

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
