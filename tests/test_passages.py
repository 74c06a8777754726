"""Sentences, passages, and the sentence that answers."""

from __future__ import annotations

import numpy as np
import pytest

from mlpmem_rag.corpus import Document
from mlpmem_rag.passages import (
    SentenceIndex,
    answering_sentence,
    best_answering,
    passages,
    sentences,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One came. Two left! Who? Nobody.", ["One came.", "Two left!", "Who?", "Nobody."]),
        ("It cost 3.50 crowns. (He paid.)", ["It cost 3.50 crowns.", "(He paid.)"]),
        ('He said "no". "Why?" she asked.', ['He said "no".', '"Why?" she asked.']),
        ("A heading\n\n  A line\nAnother one.  ", ["A heading", "A line", "Another one."]),
        ("It was e.g. wild honey. 42 crowns.", ["It was e.g. wild honey.", "42 crowns."]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_passages_by_hand() -> None:
    text = "One two three. Four five. Six seven eight nine ten eleven. Twelve. Thirteen."
    assert list(passages(text, 5)) == [
        "One two three. Four five.",
        "Six seven eight nine ten eleven.",
        "Twelve. Thirteen.",
    ]


@pytest.mark.parametrize("words", [1, 8, 20, 1000])
def test_passages_are_full_runs_of_whole_sentences(
    tiny_documents: list[Document], words: int
) -> None:
    text = " ".join(document.text for document in tiny_documents)
    found = list(passages(text, words))
    assert " ".join(found) == " ".join(sentences(text))
    counts = [len(passage.split()) for passage in found]
    for passage, following, count in zip(found, found[1:], counts, strict=False):
        assert count <= words or len(sentences(passage)) == 1
        assert count + len(sentences(following)[0].split()) > words, "no more would have fitted"


def test_no_text_has_no_passages() -> None:
    assert list(passages("\n\n", 10)) == []


TEXT = (
    "In the harbour, Ines Maro found a map. In the mill, Ines Maro found honey. "
    "The map was sold for 42 crowns. Nobody asked about the HONEY again."
)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Who found honey in the mill?", "Ines Maro", "In the mill, Ines Maro found honey."),
        ("Who found a map?", "Ines Maro", "In the harbour, Ines Maro found a map."),
        ("What did nobody ask about again?", "honey", "Nobody asked about the HONEY again."),
        ("For how much?", "42 crowns", "The map was sold for 42 crowns."),
        ("Who found a map?", "Dr. Tollen", None),
    ],
)
def test_the_sentence_that_answers(question: str, answer: str, expected: str | None) -> None:
    assert answering_sentence(TEXT, question, answer) == expected


def test_the_first_of_two_sentences_that_answer_alike() -> None:
    assert answering_sentence("A lamp fell. A lamp rose.", "What?", "lamp") == "A lamp fell."


def test_an_index_finds_what_looking_at_all_sentences_finds() -> None:
    rng = np.random.default_rng(0)
    words = ["Ines", "maro", "MARO's", "1858", "3-4", "°", "%", "the", "mill", "re-read", "in"]
    told = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(60)]
    index = SentenceIndex(told)
    found = []
    for _ in range(300):
        question, answer = (" ".join(rng.choice(words, size)) for size in (4, rng.integers(1, 4)))
        expected = best_answering(told, question, answer)
        assert index.best_answering(question, answer) == expected
        found.append(expected)
    assert None in found
    assert len(set(found)) > 20
    assert index.best_answering("Who?", "nobody") is None
