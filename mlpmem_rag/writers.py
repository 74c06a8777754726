"""Who writes the questions: rules, a language model, or the user."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError, CorpusError
from mlpmem_rag.language_writer import LanguageModelWriter, base_model_completer
from mlpmem_rag.passages import SentenceIndex, sentences
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.questions import BASE_MODEL, RULES, WRITERS, Question, QuestionWriter
from mlpmem_rag.recall import MAX_QUESTIONS, varied


def write_questions(
    sources: Sequence[str | QuestionWriter],
    documents: Sequence[Document],
    backbone: Backbone | None,
    *,
    most_processes: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> list[Question]:
    """Questions of all writers, in the order they are named, none twice, no more than are taught.

    Those in files are all kept, and the other writers share what room they leave.

    Args:
        sources: `rules`, `base-model`, paths of jsonl files, or any other writer.
        documents: what the questions are about.
        backbone: the base model, where it writes.
        most_processes: that may write at once; None: what suits the corpus and the machine.
        on_progress: called often.

    Raises:
        ConfigError: a source that is neither a writer nor a file, a row that is no question, or
            more questions in files than a memory can be taught.
        CorpusError: no question could be written.
    """
    written: dict[tuple[str, str], Question] = {}
    own: set[tuple[str, str]] = set()
    names = [source for source in sources if isinstance(source, str)]
    writers = [writer_of(s, backbone, most_processes) if isinstance(s, str) else s for s in sources]
    for writer in writers:
        for question in writer.write(documents, on_progress=on_progress):
            name = question.text, question.answer
            written.setdefault(name, question)
            if isinstance(writer, OwnQuestions):
                own.add(name)
    _check_number(len(own), names)
    if not written:
        by = ", ".join(s if isinstance(s, str) else type(s).__name__ for s in sources)
        raise CorpusError(
            f"no question could be written from the corpus by {by}; give "
            "questions of your own with --questions FILE.jsonl, or train with --recipe paper"
        )
    others = [question for name, question in written.items() if name not in own]
    kept = set(varied(others, MAX_QUESTIONS - len(own)))
    return [q for name, q in written.items() if name in own or q in kept]


def writer_of(
    source: str, backbone: Backbone | None, most_processes: int | None = None
) -> QuestionWriter:
    """A writer by name, or the questions in a file.

    Raises:
        ConfigError: neither.
    """
    if source == RULES:
        from mlpmem_rag.rules import RuleWriter

        return RuleWriter(most_processes)
    if source == BASE_MODEL and backbone is not None:
        return LanguageModelWriter(base_model_completer(backbone))
    return _own(source)


def check_own(sources: Sequence[str]) -> None:
    """Read the files of questions among the sources, so that a mistake there shows at once.

    Raises:
        ConfigError: a source that is neither a writer nor a file, a row that is no question, or
            more questions than a memory can be taught.
    """
    parsed = [_own(source).parsed() for source in sources if source not in WRITERS]
    own = {(question.text, question.answer) for question, _ in chain.from_iterable(parsed)}
    _check_number(len(own), sources)


def _check_number(own: int, sources: Sequence[str]) -> None:
    if own > MAX_QUESTIONS:
        raise ConfigError(
            f"{', '.join(sources)}: {own:,} questions in files; a memory is taught "
            f"{MAX_QUESTIONS:,} at most; leave some out, or train several memories"
        )


def _own(source: str) -> OwnQuestions:
    if Path(source).is_file():
        return OwnQuestions(Path(source))
    raise ConfigError(
        f"questions {source!r}: neither a writer nor a file; allowed are {', '.join(WRITERS)} "
        'and jsonl files with {"question": …, "answer": …} on each line'
    )


@dataclass(frozen=True)
class OwnQuestions:
    """The user's own questions, or those of another writer after a person has edited them.

    One JSON object a line: `question` (or `text`), `answer` (or `answers`, the first of which is
    learned), and, where known, `document` (or `doc_ids`) and `source`, the sentence that answers.
    """

    path: Path

    def write(
        self,
        documents: Sequence[Document],
        *,
        on_progress: OnProgress = ignore_progress,
    ) -> Iterator[Question]:
        """Yield them in order; the source is the sentence of the documents that answers best.

        Raises:
            ConfigError: a line that is no question, by its number.
        """
        told = {d.id: [(sentence, d.id) for sentence in sentences(d.text)] for d in documents}
        known: dict[tuple[str, ...], _Told] = {}
        for question, ids in self.parsed():
            named = tuple(id_ for id_ in ids if id_ in told)
            if question.source and named:
                yield question
                continue
            if named not in known:
                known[named] = _Told.of(chain.from_iterable(told[id_] for id_ in named or told))
            yield _sourced(question, known[named], named)

    def parsed(self) -> list[tuple[Question, list[str]]]:
        """All questions, with the documents that they name.

        Raises:
            ConfigError: a line that is no question, by its number.
        """
        lines = enumerate(self._lines(), 1)
        return [self._parsed(line, number) for number, line in lines if line.strip()]

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.path} is no UTF-8 text ({error}); save it as UTF-8"
            ) from error

    def _parsed(self, line: str, number: int) -> tuple[Question, list[str]]:
        try:
            row = json.loads(line)
            text = row["question"] if "question" in row else row["text"]
            answer = row["answer"] if "answer" in row else row["answers"][0]
            ids = [row["document"]] if "document" in row else row.get("doc_ids", [])
            ids = [ids] if isinstance(ids, str) else list(ids)
            source = row.get("source", "")
            question = Question(text.strip(), answer.strip(), source.strip(), "".join(ids[:1]))
            "".join([text, answer, source, *ids]).encode()  # JSON can escape half a character
        except (ValueError, LookupError, TypeError, AttributeError):
            question = Question("", "", "", "")
        if not (question.text and question.answer):
            raise ConfigError(
                f"{self.path}, line {number} is no question: {line.strip()[:80]!r}; give "
                '{"question": "…", "answer": "…"}, and "doc_ids": […] where known'
            )
        return question, ids


@dataclass(frozen=True)
class _Told:
    """Sentences, the document of each, and where their words are."""

    sentences: list[str]
    documents: list[str]
    index: SentenceIndex

    @classmethod
    def of(cls, told: Iterable[tuple[str, str]]) -> _Told:
        pairs = list(told)
        texts = [sentence for sentence, _ in pairs]
        return cls(texts, [document for _, document in pairs], SentenceIndex(texts))


def _sourced(question: Question, told: _Told, named: Sequence[str]) -> Question:
    """With the sentence that answers it best and its document.

    Where none has the answer, the question itself is in its place, of the document that was named.
    """
    best = told.index.best_answering(question.text, question.answer)
    if best is None:
        return replace(question, source=question.text, document="".join(named[:1]))
    return replace(question, source=told.sentences[best], document=told.documents[best])
