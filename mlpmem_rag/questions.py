"""Self-study: questions that a corpus answers, with their answers.

A memory trained on the corpus alone does not answer questions; one trained on questions that
the corpus answers does. A writer turns documents into such questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from mlpmem_rag.corpus import Document
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.storage import replace_file

RULES = "rules"
BASE_MODEL = "base-model"
WRITERS = (RULES, BASE_MODEL)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answer that its source gives.

    Attributes:
        text: the question.
        answer: the answer, as short as the source allows.
        source: the sentence or line that answers it.
        document: id of the document it stands in.
    """

    text: str
    answer: str
    source: str
    document: str


def without_topic(text: str) -> str:
    """A question in small letters, without the title that a writer put in brackets at its end."""
    return re.sub(r" \([^()]*\)\?$", "?", text.casefold())


def accepted_answers(questions: Sequence[Question]) -> list[list[str]]:
    """For each question the answers of all that are asked in the same words: any of them is right.

    *Who is Ada's friend?* may have been written several times, each time about another one.
    """
    answers: dict[str, dict[str, None]] = {}
    for question in questions:
        answers.setdefault(question.text.casefold(), {})[question.answer] = None
    return [list(answers[question.text.casefold()]) for question in questions]


class QuestionWriter(Protocol):
    """Writes questions from documents: the same ones for the same documents."""

    def write(
        self, documents: Sequence[Document], *, on_progress: OnProgress = ignore_progress
    ) -> Iterator[Question]:
        """Yield questions, document by document, none twice."""
        ...


def save_questions(questions: Iterable[Question], path: Path) -> None:
    """Write one JSON object a line, for people to read and for `load_questions`."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    text = "".join(f"{line}\n" for line in lines)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def load_questions(path: Path) -> list[Question]:
    """Read what `save_questions` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [Question(**json.loads(line)) for line in lines]
