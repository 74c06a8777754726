"""Questions to compare on: jsonl, CSV, LabelledRagDataset json, or written from the corpus.

A row that is no question is listed with its line and the reason, and does not end the run.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.writers import write_questions

Row = TypeVar("Row")

FORMATS = (".jsonl", ".csv", ".json")
SEPARATOR = "|"
"""Between several answers or document ids in a field of a CSV."""

_SHOWN = 5
_FALSE = {"false", "no", "0", "n"}
_TRUE = {"true", "yes", "1", "y", ""}


@dataclass(frozen=True)
class EvalQuestion:
    """One question to ask every arm.

    Attributes:
        id: unique in its set.
        text: what is asked.
        answers: all that count as right; none where it is not answerable.
        doc_ids: documents that answer it, where known.
        answerable: whether the corpus answers it.
        synthetic: written from the corpus, not asked by a person.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    doc_ids: tuple[str, ...] = ()
    answerable: bool = True
    synthetic: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """Questions of a file, its rows that are none: (line, reason), and how many were not drawn."""

    questions: tuple[EvalQuestion, ...]
    problems: tuple[tuple[int, str], ...] = ()
    left: int = 0


def load_questions(path: Path, *, strict: bool = False) -> QuestionSet:
    """Read a file of questions, by its suffix.

    `.jsonl`: `question`, `answers` (or `answer`), and if known `id`, `doc_ids`, `answerable`.
    `.csv`: the same as columns, several values separated by `|`. `.json`: LlamaIndex's
    LabelledRagDataset (`examples` with `query` and `reference_answer`).

    Args:
        path: the file.
        strict: whether a row that is no question is an error.

    Raises:
        ConfigError: no such file or format, no question left, or a bad row where `strict`.
    """
    rows = list(_rows(path))
    questions: dict[str, tuple[int, EvalQuestion]] = {}
    problems: list[tuple[int, str]] = []
    for line, row in rows:
        try:
            question = _question(row, f"q{line}")
            if question.id in questions:
                first = questions[question.id][0]
                raise _BadRowError(f"id {question.id!r} was given before, in line {first}")
            questions[question.id] = (line, question)
        except _BadRowError as error:
            problems.append((line, str(error)))
    listed = "".join(f"\n  line {line}: {reason}" for line, reason in problems[:_SHOWN])
    if not questions or (strict and problems):
        raise ConfigError(
            f"{path}: {len(problems)} of {len(rows)} rows are no questions; give "
            f'{{"question": "…", "answers": ["…"]}} on each line{listed}'
        )
    return QuestionSet(tuple(q for _, q in questions.values()), tuple(problems))


def drawn(rows: Sequence[Row], most: int, seed: int) -> tuple[Row, ...]:
    """So many of the rows at most, by chance and in their order; 0: all.

    The first ones of a file are about its first documents.
    """
    if not most or len(rows) <= most:
        return tuple(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), most, replace=False)
    return tuple(rows[number] for number in sorted(chosen.tolist()))


def written_questions(
    documents: Sequence[Document],
    number: int,
    *,
    writer: str = "rules",
    seed: int = 0,
    exclude: Iterable[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> list[EvalQuestion]:
    """So many questions written from the corpus, spread over its documents.

    Args:
        documents: what is asked about.
        number: how many at most.
        writer: `rules`, or a jsonl file of questions.
        seed: of the choice.
        exclude: texts of questions that are not to be among them.
        on_progress: called often.

    Raises:
        CorpusError: no question could be written.
    """
    unwanted = set(exclude)
    answers: dict[str, dict[str, None]] = {}
    homes: dict[str, str] = {}
    for question in write_questions([writer], documents, None, on_progress=on_progress):
        if question.text not in unwanted:
            answers.setdefault(question.text, {})[question.answer] = None
            homes.setdefault(question.text, question.document)
    chosen = _spread(homes, number, seed)
    return [
        EvalQuestion(
            id=f"written-{n:04d}",
            text=text,
            answers=tuple(answers[text]),
            doc_ids=(homes[text],) if homes[text] else (),
            synthetic=True,
        )
        for n, text in enumerate(chosen, 1)
    ]


def _spread(homes: Mapping[str, str], number: int, seed: int) -> list[str]:
    """Questions in rounds: one of each document in turn, both in random order."""
    generator = np.random.default_rng(seed)
    by_document: dict[str, list[str]] = {}
    for text in generator.permutation(np.array(list(homes), dtype=object)).tolist():
        by_document.setdefault(homes[text], []).append(text)
    rounds = [(place, text) for texts in by_document.values() for place, text in enumerate(texts)]
    return [text for _, text in sorted(rounds, key=lambda pair: pair[0])][:number]


def question_rows(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a file as they stand, those left out that cannot be read.

    Raises:
        ConfigError: no such file or format.
    """
    return [row for _, row in _rows(path) if row is not None]


class _BadRowError(Exception):
    """Why a row is no question."""


_Row = Mapping[str, Any] | None


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """Line numbers and rows; None for a line that cannot be read."""
    readers: dict[str, Callable[[str], Iterable[tuple[int, _Row]]]] = {
        ".jsonl": _jsonl_rows,
        ".csv": _csv_rows,
        ".json": _dataset_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"questions {path}: the format {path.suffix!r} is not known; allowed are "
            f"{', '.join(FORMATS)}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"questions {path} cannot be read ({error.strerror or error}); give a file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"questions {path} is no UTF-8 text ({error}); save it as UTF-8"
        ) from error
    yield from reader(text)


def _jsonl_rows(text: str) -> Iterator[tuple[int, _Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _object(line)


def _object(text: str) -> _Row:
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _csv_rows(text: str) -> Iterator[tuple[int, _Row]]:
    read = 0  # csv's own count leaves out damaged lines

    def lines() -> Iterator[str]:
        nonlocal read
        for line in io.StringIO(text, newline=""):
            read += 1
            yield line

    reader = csv.DictReader(lines(), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error:  # the next line is read all the same
            yield read, None
            continue
        if row is None:
            return
        fields = {name: value for name, value in row.items() if name and value is not None}
        lists = {
            name: [part.strip() for part in fields[name].split(SEPARATOR) if part.strip()]
            for name in ("answers", "answer", "doc_ids")
            if name in fields
        }
        yield read, {**fields, **lists}


def _dataset_rows(text: str) -> Iterator[tuple[int, _Row]]:
    content = _object(text)
    examples = content.get("examples") if content is not None else None
    if not isinstance(examples, list):
        yield 1, None
        return
    for number, example in enumerate(examples, 1):
        known = isinstance(example, dict)
        yield (
            number,
            {"question": example.get("query"), "answers": example.get("reference_answer")}
            if known
            else None,
        )


def _question(row: _Row, default_id: str) -> EvalQuestion:
    if row is None:
        raise _BadRowError("no JSON object, or a damaged row")
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise _BadRowError("no question")
    answerable = _answerable(row.get("answerable", True))
    answers = _texts(row, "answers") or _texts(row, "answer")
    if answerable and not answers:
        raise _BadRowError("no answers; give some, or answerable: false")
    id_ = row.get("id")
    question = EvalQuestion(
        id=default_id if id_ in (None, "") else str(id_),
        text=text.strip(),
        answers=answers if answerable else (),
        doc_ids=_texts(row, "doc_ids"),
        answerable=answerable,
    )
    try:
        "".join([question.id, question.text, *question.answers, *question.doc_ids]).encode()
    except UnicodeEncodeError as error:  # JSON can escape what is no text
        raise _BadRowError(f"half of a character, {error.object[error.start]!r}") from error
    return question


def _answerable(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise _BadRowError(f"answerable is {value!r}; allowed are true and false")


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts; a single text or number counts as one."""
    value = row.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(item, str | int | float) for item in values):
        raise _BadRowError(f"{name} is {value!r}; allowed is a list of texts")
    return tuple(text for item in values if (text := str(item).strip()))
