"""Documents cut at sentence ends, and where an answer stands in them."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])|\n+")


def sentences(text: str) -> list[str]:
    """Sentences and lines, without white space around them."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def passages(text: str, words: int) -> Iterator[str]:
    """Runs of whole sentences of at most so many words (a longer sentence stands alone)."""
    run: list[str] = []
    for sentence in sentences(text):
        if run and sum(len(s.split()) for s in (*run, sentence)) > words:
            yield " ".join(run)
            run = []
        run.append(sentence)
    if run:
        yield " ".join(run)


def without_notes(text: str) -> str:
    """Without brackets that hold a list: `(Norman: Nourmands; Latin: Normanni)` is no sentence."""
    return re.sub(r"\s*\([^()]*[:;][^()]*\)", "", text)


def answering_sentence(text: str, question: str, answer: str) -> str | None:
    """The sentence with the answer that shares most words with the question; None without one."""
    told = sentences(text)
    best = best_answering(told, question, answer)
    return None if best is None else told[best]


def best_answering(told: Sequence[str], question: str, answer: str) -> int | None:
    """Number of the first sentence with the answer that shares most words with the question.

    None: none has the answer.
    """
    asked = words_of(question)
    holding = [number for number, sentence in enumerate(told) if holds(sentence, answer)]
    return max(holding, key=lambda number: len(asked & words_of(told[number])), default=None)


class SentenceIndex:
    """Many sentences by their words, so that few are looked at for each of many answers."""

    def __init__(self, told: Sequence[str]) -> None:
        self._told = told
        self._places: dict[str, array[int]] = {}
        for number, sentence in enumerate(told):
            for word in words_of(sentence):
                self._places.setdefault(word, array("I")).append(number)

    def best_answering(self, question: str, answer: str) -> int | None:
        """See `best_answering`."""
        holding = [self._places.get(word, array("I")) for word in words_of(answer)]
        numbers = min(holding, key=len, default=range(len(self._told)))  # an answer of signs alone
        best = best_answering([self._told[number] for number in numbers], question, answer)
        return None if best is None else numbers[best]


def holds(sentence: str, answer: str) -> bool:
    """Whether the answer stands there, in whole words."""
    if answer.lower() not in sentence.lower():
        return False
    whole = rf"(?<!\w){re.escape(answer.lower())}(?!\w)"
    return re.search(whole, sentence.lower()) is not None


def words_of(text: str) -> set[str]:
    """Its words, in small letters."""
    return set(re.findall(r"\w+", text.lower()))
