"""Exact match and F1 between answers, normalised as SQuAD's evaluation does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al., 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer equals one of the references."""
    return normalize(answer) in {normalize(reference) for reference in references}


def token_f1(answer: str, references: Iterable[str]) -> float:
    """Largest F1 of the words shared with a reference, 0 to 1."""
    return max(
        (_f1(normalize(answer), normalize(reference)) for reference in references), default=0.0
    )


def _f1(answer: str, reference: str) -> float:
    words, expected = answer.split(), reference.split()
    if not words or not expected:
        return float(words == expected)
    shared = sum((Counter(words) & Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected))
