"""Trains rerankers of clinical texts with bertloss_fast's losses and sentence-transformers' trainer.

    python examples/train_reranker.py                 eight minutes on a CPU, everything included
    python examples/train_reranker.py --minutes 4     with less of everything

LambdaLoss on graded lists; MultipleNegativesRankingLoss on mined hard negatives; and MarginMSELoss, by which the first
teaches a model of half its layers. NDCG@10 and MRR of each before and after, beside orders that nothing was trained
for. Results go to runs/: reranker.json, and reranker/ with the first model and its model card. The rest:
`reranking.py` (the task) and `compare_rerankers.py` (the trainings in order, and on time).
"""

from __future__ import annotations

import argparse
import sys

import train_multilabel as demo
from train_multilabel import STARTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains rerankers with three losses of bertloss_fast and says how good they are before and after."
    )
    demo.add_options_of_a_run(parser)
    parser.set_defaults(minutes=8.0)
    return parser


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()

    def work() -> None:
        import compare_rerankers

        compare_rerankers.run(options, STARTED)

    return demo.carry_out(parser, work)


if __name__ == "__main__":
    sys.exit(main())
