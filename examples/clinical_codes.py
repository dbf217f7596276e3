"""Clinical codes as a multi-label data set: the description of a code, and the codes above it.

The source is `simple-icd-10-cm`, the American clinical modification of the ICD-10, which carries its data with it.
Codes that differ only in the 7th character ("initial encounter", "subsequent encounter", ...) say nearly the same, so
they form one family, and a family is one example: its text is the description of its first code, its labels are the
ancestors of that code. The family's own six-character code is no label: no other family has it.

Whole families are split, always in the same way, whatever the seed of the training.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import simple_icd_10_cm

SPLIT_SEED = 0
HELD_OUT_SHARE = 0.05
"""Of the families, for validation; and as many again for the test."""


class Family(NamedTuple):
    code: str
    """The six characters, or fewer, that the family's codes share, without the dot."""
    text: str
    labels: frozenset[str]


class Split(NamedTuple):
    train: list[Family]
    validation: list[Family]
    test: list[Family]


def load_families() -> list[Family]:
    """All 36,227 families, in the order of the classification."""
    first_codes: dict[str, str] = {}
    for code in simple_icd_10_cm.get_all_codes():
        if simple_icd_10_cm.is_leaf(code):
            first_codes.setdefault(_compact(code)[:6], code)
    return [
        Family(family, simple_icd_10_cm.get_description(code), frozenset(_labels(code)))
        for family, code in first_codes.items()
    ]


def split_families(families: list[Family], limit: int | None = None) -> Split:
    """Shuffles, keeps at most `limit` families, and gives 5% to validation and 5% to the test."""
    shuffled = random.Random(SPLIT_SEED).sample(families, len(families))[:limit]
    held_out = max(1, int(HELD_OUT_SHARE * len(shuffled)))
    return Split(shuffled[2 * held_out :], shuffled[:held_out], shuffled[held_out : 2 * held_out])


def labels_by_frequency(families: list[Family]) -> list[str]:
    """Every label that occurs, the commonest first; equally common ones by their code."""
    counts = Counter(label for family in families for label in family.labels)
    return sorted(counts, key=lambda label: (-counts[label], label))


def describe(code: str) -> str:
    return simple_icd_10_cm.get_description(code)


def _compact(code: str) -> str:
    return code.replace(".", "")


def _labels(code: str) -> list[str]:
    ancestors = simple_icd_10_cm.get_ancestors(code)
    has_seventh_character = len(_compact(code)) == 7
    return ancestors[1:] if has_seventh_character else ancestors
