"""Scores beside foreign implementations and numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.evaluation.benchmarks.hotpotqa import exact_match_score, f1_score
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.text import squad

from mlpmem_eval.metrics import abstention, contains, retrieval_hit, score, similarities

from .fakes import LetterEncoder

EXAMPLES = Path(__file__).parents[2] / "examples"
SQUAD_SAMPLE = [
    # Answers and references in the shapes of the SQuAD development set.
    ("Denver Broncos", ["Denver Broncos", "Denver Broncos", "Denver Broncos"]),
    ("the Denver Broncos.", ["Denver Broncos"]),
    ("Santa Clara, California", ["Santa Clara, California", "Levi's Stadium"]),
    ("Levi's Stadium in Santa Clara", ["Levi's Stadium in the San Francisco Bay Area"]),
    ("golden", ["gold", "the golden anniversary"]),
    ("February 7, 2016", ["February 7, 2016", "February 7"]),
    ("24–10", ["24-10"]),
    ("", ["American Football Conference"]),
    ("an a the", ["the"]),
    ("Super Bowl 50 Super Bowl", ["Super Bowl 50"]),
]


def by_torchmetrics(answer: str, references: list[str]) -> tuple[float, float]:
    """Exact match and F1 by a port of the official script."""
    result = squad(
        [{"prediction_text": answer, "id": "1"}],
        [{"answers": {"answer_start": [0] * len(references), "text": references}, "id": "1"}],
    )
    return float(result["exact_match"]) / 100, float(result["f1"]) / 100


def by_llama_index(answer: str, references: list[str]) -> tuple[float, float]:
    """The same by another port, for answers other than yes and no, which it treats apart."""
    return (
        float(max(exact_match_score(answer, reference) for reference in references)),
        max(f1_score(answer, reference)[0] for reference in references),
    )


@pytest.mark.parametrize(("answer", "references"), SQUAD_SAMPLE)
def test_em_and_f1_are_squads(answer: str, references: list[str]) -> None:
    found = score(answer, references)
    assert (found.em, found.f1) == pytest.approx(by_torchmetrics(answer, references))


def test_em_and_f1_are_squads_on_the_sample_questions() -> None:
    lines = (EXAMPLES / "questions-dev.jsonl").read_text().splitlines()
    references: list[list[str]] = [json.loads(line)["answers"] for line in lines]
    compared = 0
    for number, right in enumerate(references):
        wrong = references[number - 1][0]
        for answer in (right[-1], f"The {right[0]}.", f"{wrong}, or {right[0]}", wrong):
            found = score(answer, right)
            assert (found.em, found.f1) == pytest.approx(by_llama_index(answer, right))
            assert (found.em, found.f1) == pytest.approx(by_torchmetrics(answer, right))
            compared += 1
    assert compared > 1000


WORDS = st.lists(
    st.sampled_from(["the", "A", "an", "red", "Red.", "fox", "fox's", "7", "-", "über", "x,y"]),
    min_size=1,
    max_size=6,
).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_em_and_f1_are_squads_for_any_words(answer: str, references: list[str]) -> None:
    found = score(answer, references)
    assert (found.em, found.f1) == pytest.approx(by_torchmetrics(answer, references))


def test_contains_asks_for_whole_words() -> None:
    assert contains("It was sold for 42 crowns.", ["42 crowns"])
    assert not contains("It was sold for 142 crowns.", ["42 crowns"])
    assert contains("The Mill, an old one", ["old one", "new one"])
    assert not contains("anything", ["the", "."])  # nothing is left of these references


def test_similarity_is_the_largest_cosine() -> None:
    found = similarities(["ab", "", "c"], [["ab", "c"], ["a"], ["a", "abc"]], LetterEncoder())
    assert found == pytest.approx([1.0, 0.0, 1 / np.sqrt(3)])


def test_risk_and_coverage_by_hand() -> None:
    # Surest first: right, wrong, right, and an answer to what cannot be answered.
    found = abstention([0.9, 0.7, 0.4, 0.4], [True, False, True, False], [True, True, True, False])
    assert found is not None
    assert found.curve == ((0.25, 0.0, 0.9), (0.5, 0.5, 0.7), (1.0, 0.5, 0.4))
    # Of the two that are equally sure, either may come first.
    assert found.aurc == pytest.approx((0 + 1 / 2 + 1.5 / 3 + 2 / 4) / 4)
    assert found.auroc_right == roc_auc_score([1, 0, 1], [0.9, 0.7, 0.4])
    assert found.auroc_answerable == roc_auc_score([1, 1, 1, 0], [0.9, 0.7, 0.4, 0.4])


def test_calibration_by_hand() -> None:
    found = abstention([0.95, 0.91, 0.5, 1.0], [True, False, True, True], [True] * 4)
    assert found is not None
    assert found.brier == pytest.approx((0.05**2 + 0.91**2 + 0.5**2) / 4)
    # Three in the last bin say 2.86 together and are right twice, one says .5 and is right.
    assert found.calibration_error == pytest.approx((2.86 - 2 + 1 - 0.5) / 4)


def test_abstention_without_answers_or_contrast() -> None:
    assert abstention([], [], []) is None
    found = abstention([0.5, 0.6], [True, True], [True, True])
    assert found is not None
    assert (found.auroc_right, found.auroc_answerable, found.aurc) == (None, None, 0.0)


def test_a_hit_needs_a_known_source() -> None:
    assert retrieval_hit(["a", "b"], ["b", "c"]) is True
    assert retrieval_hit(["a"], ["b"]) is False
    assert retrieval_hit(["a"], []) is None
