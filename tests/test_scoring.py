"""Exact match and F1, with the cases that SQuAD's own evaluation is known by."""

from __future__ import annotations

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_rag.scoring import exact_match, normalize, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an   apple\ta day\n", "apple day"),
        ("N. S. Nebelong", "n s nebelong"),
        ("a.m.", "am"),
        ("the", ""),
        ("1,858", "1858"),
        ("theatre and anthem", "theatre and anthem"),
        ("rock-and-roll!", "rockandroll"),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


def squad_normalize(text: str) -> str:
    """As in the published evaluate-v1.1.py."""

    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punctuation(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(text.lower())).split())


def squad_f1(prediction: str, truth: str) -> float:
    predicted, expected = squad_normalize(prediction).split(), squad_normalize(truth).split()
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


words = st.lists(st.sampled_from(["the", "A", "red", "Red.", "lamp", "in-", "1,000"]), min_size=1)


@given(words.map(" ".join), words.map(" ".join))
def test_scores_are_those_of_squads_evaluation(answer: str, reference: str) -> None:
    assert normalize(answer) == squad_normalize(answer)
    assert exact_match(answer, [reference]) == (
        squad_normalize(answer) == squad_normalize(reference)
    )
    if normalize(answer) or normalize(reference):
        assert token_f1(answer, [reference]) == pytest.approx(squad_f1(answer, reference))


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("three copper lamps", ["three copper lamps"], 1.0),
        ("copper lamps", ["three copper lamps"], 0.8),
        ("lamps lamps", ["three copper lamps"], 0.4),
        ("the lamps", ["a lamps"], 1.0),
        ("honey", ["three copper lamps"], 0.0),
        ("honey", ["lamps", "wild honey", "sweet wild honey"], 2 / 3),
        ("", ["honey"], 0.0),
        ("honey", ["the"], 0.0),
        ("the", [""], 1.0),
        ("honey", [], 0.0),
    ],
)
def test_f1_by_hand(answer: str, references: list[str], expected: float) -> None:
    assert token_f1(answer, references) == pytest.approx(expected)
    assert token_f1(answer, iter(references)) == pytest.approx(expected)


def test_exact_match_with_any_reference() -> None:
    assert exact_match("The Harbour!", iter(["mill", "harbour"]))
    assert not exact_match("the old harbour", ["mill", "harbour"])
    assert not exact_match("harbour", [])
