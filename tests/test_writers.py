"""Who writes the questions: files of one's own, and a language model that is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mlpmem_rag import language_writer, writers
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError, CorpusError
from mlpmem_rag.language_writer import LanguageModelWriter, base_model_completer
from mlpmem_rag.pipeline import train
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.questions import BASE_MODEL, Question, save_questions
from mlpmem_rag.writers import write_questions, writer_of

DOCUMENTS = [
    Document("mill", "In the mill, Ines Maro found honey. It was sold for 42 crowns.", None, "a"),
    Document("quay", "In the harbour, Dr. Tollen lost 42 crowns. It rained.", None, "b"),
]
HONEY = Question("Who found the honey?", "Ines Maro", "In the mill, Ines Maro found honey.", "mill")


# Questions of one's own.


def own(tmp_path: Path, *lines: object, name: str = "own.jsonl") -> str:
    path = tmp_path / name
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def test_own_questions_come_with_the_sentence_that_answers(tmp_path: Path) -> None:
    path = own(
        tmp_path,
        {"question": " Who found the honey? ", "answer": " Ines Maro\n"},
        "",
        {"question": "For how much was it sold?", "answers": ["42 crowns", "42"]},
        {"question": "What did Dr. Tollen lose?", "answer": "42 crowns", "doc_ids": ["quay"]},
        {"question": "How many?", "answer": "42 crowns", "doc_ids": ["gone", "quay"]},
        {"question": "What of it?", "answer": "42 crowns", "doc_ids": ["gone"], "other": 1},
        {"question": "Où?", "answer": "à Skagen"},
    )
    assert write_questions([path], DOCUMENTS, None) == [
        HONEY,
        Question("For how much was it sold?", "42 crowns", "It was sold for 42 crowns.", "mill"),
        Question(
            "What did Dr. Tollen lose?",
            "42 crowns",
            "Tollen lost 42 crowns.",  # an abbreviation ends a sentence here
            "quay",
        ),
        Question("How many?", "42 crowns", "Tollen lost 42 crowns.", "quay"),
        Question("What of it?", "42 crowns", "It was sold for 42 crowns.", "mill"),
        Question("Où?", "à Skagen", "Où?", ""),
    ]


def test_the_best_sentence_of_all_documents_answers_in_whole_words(tmp_path: Path) -> None:
    documents = [
        Document("a", "The note was known. Nobody knew of the mill.", None, "a"),
        Document("b", "Was the mill sold? No, it was not.", None, "b"),
    ]
    path = own(
        tmp_path,
        {"question": "Was it sold?", "answer": "No"},
        {"question": "What was sold, the mill?", "answer": "the mill"},
    )
    found = write_questions([path], documents, None)
    assert [(q.source, q.document) for q in found] == [
        ("No, it was not.", "b"),
        ("Was the mill sold?", "b"),
    ]


def test_a_mark_of_utf_8_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = own(tmp_path, {"question": "Who?", "answer": "Ines"})
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert [q.text for q in write_questions([path], DOCUMENTS, None)] == ["Who?"]


def test_files_are_read_before_anything_is_done(tmp_path: Path) -> None:
    path = own(tmp_path, {"question": "Who?", "answer": "Ines"}, "no json")
    with pytest.raises(ConfigError, match="line 2 is no question"):
        train(tmp_path / "nowhere", out=tmp_path / "memory", questions=("rules", path))
    with pytest.raises(ConfigError, match=r"questions 'typo\.jsonl': neither"):
        train(tmp_path / "nowhere", out=tmp_path / "memory", questions=("typo.jsonl",))
    assert not (tmp_path / "memory").exists()


def test_what_another_writer_has_written_comes_back(tmp_path: Path) -> None:
    """So that people can edit it in between."""
    stored = [HONEY, Question("Où?", "à Skagen", "Nowhere in these documents.", "quay")]
    save_questions(stored, tmp_path / "written.jsonl")
    assert write_questions([str(tmp_path / "written.jsonl")], DOCUMENTS, None) == stored


def test_as_many_as_can_be_taught_with_all_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(tmp_path, *({"question": f"Who is {n}?", "answer": "Ines"} for n in range(5)))
    alone = write_questions(["rules"], DOCUMENTS, None)
    monkeypatch.setattr(writers, "MAX_QUESTIONS", 7)
    found = write_questions(["rules", path], DOCUMENTS, None)
    assert len(alone) > 7
    assert len(found) == 7
    assert [q.text for q in found[2:]] == [f"Who is {n}?" for n in range(5)]
    assert set(found[:2]) <= set(alone)
    assert len(write_questions(["rules"], DOCUMENTS, None)) == 7


def test_more_of_ones_own_than_can_be_taught_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(tmp_path, *({"question": f"Who is {n}?", "answer": "Ines"} for n in range(5)))
    monkeypatch.setattr(writers, "MAX_QUESTIONS", 4)
    for refused in (
        lambda: write_questions([path], DOCUMENTS, None),
        lambda: train(tmp_path / "nowhere", out=tmp_path / "memory", questions=(path,)),
    ):
        with pytest.raises(ConfigError, match=r"own\.jsonl: 5 questions in files; .* 4 at most"):
            refused()


def test_several_files_give_no_question_twice(tmp_path: Path) -> None:
    first = {"question": "Who found honey?", "answer": "Ines Maro"}
    other = {"question": "Who found honey?", "answer": "Ines"}
    a = own(tmp_path, first, other, name="a.jsonl")
    b = own(tmp_path, other, {"question": "What?", "answer": "honey"}, first, name="b.jsonl")
    found = write_questions([b, a], DOCUMENTS, None)
    assert [(q.text, q.answer) for q in found] == [
        ("Who found honey?", "Ines"),
        ("What?", "honey"),
        ("Who found honey?", "Ines Maro"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"question": "Who?"',
        '"Who?"',
        "null",
        "[1]",
        {"question": "Who?"},
        {"answer": "Ines"},
        {"question": "Who?", "answers": []},
        {"question": "", "answer": "Ines"},
        {"question": "Who?", "answer": "  "},
        {"question": "Who?", "answer": None},
        {"question": "Who?", "answer": 42},
        {"question": ["Who?"], "answer": "Ines"},
        {"question": "Who?", "answer": "Ines", "doc_ids": 3},
        {"question": "Who?", "answer": "Ines", "source": 3},
        {"question": "Who?", "answer": "\ud83d"},
        {"question": "Who?", "answer": "Ines", "doc_ids": [["mill"]]},
    ],
)
def test_a_line_that_is_no_question_is_named_by_its_number(tmp_path: Path, line: object) -> None:
    path = own(tmp_path, {"question": "Who?", "answer": "Ines"}, "", line)
    with pytest.raises(ConfigError, match=r"own\.jsonl, line 3 is no question: .*give"):
        write_questions([path], DOCUMENTS, None)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"own\.jsonl"):
        write_questions([str(tmp_path / "own.jsonl")], DOCUMENTS, None)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "rule", ""])
def test_neither_a_writer_nor_a_file_is_refused_before_any_is_asked(
    tmp_path: Path, source: str
) -> None:
    path = own(tmp_path, "no json")
    with pytest.raises(ConfigError, match=rf"questions '{source}': .* rules, base-model"):
        write_questions([path, source], DOCUMENTS, None)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a writer nor a file"):
        writer_of(str(tmp_path), None)


def test_nothing_written_says_what_to_do(tmp_path: Path) -> None:
    path = own(tmp_path, "", " ")
    with pytest.raises(CorpusError, match=r"by .*own\.jsonl; give .*--questions FILE\.jsonl"):
        write_questions([path], DOCUMENTS, None)


# A language model.

Reply = Callable[[str, str, bool], str]


class Script:
    """Continues prompts by what they are for: a question's start, or a question to answer.

    `answer` is told the passage, the question, and whether examples were given.
    """

    def __init__(self, questions: dict[str, str], answer: Reply) -> None:
        self.calls: list[int] = []
        self._questions = questions
        self._answer = answer

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        self.calls.append(len(prompts))
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: str) -> str:
        examples = prompt.count("Passage: ") > 1
        passage, rest = prompt.rsplit("Passage: ", 1)[1].split("\nQuestion: ", 1)
        if not rest.endswith("\nAnswer:"):
            return self._questions.get(rest, " no question at all")
        return self._answer(passage, rest.removesuffix("\nAnswer:"), examples)


def written(script: Script, documents: Sequence[Document] = DOCUMENTS[:1]) -> list[Question]:
    return list(LanguageModelWriter(script).write(documents))


def always(answer: str, again: str | None = None) -> Reply:
    return lambda _, __, examples: answer if examples or again is None else again


WHO = {"Who": " found the honey?\nAnswer: nobody"}


def test_a_question_that_is_answered_alike_is_kept() -> None:
    assert written(Script(WHO, always(" Ines Maro.\nQuestion: Why?"))) == [HONEY]
    assert written(Script(WHO, always("\n Ines Maro", " ines maro!"))) == [HONEY]


@pytest.mark.parametrize(
    ("again", "kept"),
    [
        (" Ines Maro", True),
        (" It was Ines Maro", True),  # 2 * 2 / (2 + 4) = 0.67
        (" Ines", True),  # 2 * 1 / (2 + 1) = 0.67
        (" Ines found", False),  # 2 * 1 / (2 + 2) = 0.5
        (" Dr. Tollen", False),
        ("", False),
    ],
)
def test_the_round_trip_decides_by_f1(again: str, kept: bool) -> None:
    assert bool(written(Script(WHO, always(" Ines Maro", again)))) == kept


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (" found honey in the mill?", " found honey"),  # the question gives it away
        (" found Ines Maro's honey?", " ines maro"),
        (" found honey in the mill?", " Ines Marrow"),  # does not stand in the passage
        (" found honey in the mill?", " ."),
        (" found honey in the mill?", ""),
    ],
)
def test_an_answer_that_is_none_is_dropped(start: str, answer: str) -> None:
    assert written(Script({"Who": start}, always(answer))) == []


@pytest.mark.parametrize(
    "continuation",
    [
        " found honey",
        " found honey.",
        " found?",  # three words
        "\n found honey?",
        " " + "very " * 29 + "good?",
        "",
    ],
)
def test_what_is_no_question_is_never_answered(continuation: str) -> None:
    def answer(_: str, question: str, __: bool) -> str:
        pytest.fail(f"{question} was asked")

    assert written(Script({"Who": continuation}, answer)) == []


def test_the_source_is_the_sentence_and_the_document_its_own() -> None:
    script = Script({"What": " was lost or sold?"}, always(" 42 crowns"))
    found = written(script, DOCUMENTS)
    assert [(q.source, q.document) for q in found] == [("It was sold for 42 crowns.", "mill")]
    only = written(script, DOCUMENTS[1:])
    assert [(q.source, q.document) for q in only] == [("Tollen lost 42 crowns.", "quay")]


def echo(passage: str, question: str, _: bool) -> str:
    return passage.split()[len(question) % 5] + " "


def many(count: int) -> list[Document]:
    return [Document(str(n), f"Number {n} is N{n} here now.", None, str(n)) for n in range(count)]


def test_how_passages_are_batched_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = {
        "What": " comes after it?",
        "Who": " had been there then?",
        "When": " is it?",
        "Where": " was it lost?",
    }
    documents = many(7)
    events: list[ProgressEvent] = []
    whole = Script(starts, echo)
    expected = list(LanguageModelWriter(whole).write(documents, on_progress=events.append))
    assert len(expected) > 7
    assert whole.calls[0] == 7 * language_writer.QUESTIONS_PER_PASSAGE
    assert events == [ProgressEvent("questions", 7, 7, "passages")]
    for size in (1, 3):
        monkeypatch.setattr(language_writer, "BATCH", size)
        script = Script(starts, echo)
        assert written(script, documents) == expected
        assert max(script.calls) <= size * language_writer.QUESTIONS_PER_PASSAGE


def test_a_question_of_two_passages_is_written_once() -> None:
    text = "In the mill, Ines Maro found honey."
    twice = [Document("a", text, None, "a"), Document("b", text, None, "b")]
    found = written(Script(WHO, always(" Ines Maro")), twice)
    assert [(q.text, q.document) for q in found] == [("Who found the honey?", "a")]


def test_no_documents_have_no_questions() -> None:
    assert written(Script(WHO, always(" Ines Maro")), []) == []
    assert written(Script(WHO, always(" Ines Maro")), [Document("a", " ", None, "a")]) == []


# The base model as the one that writes.


def test_the_base_model_continues_each_prompt_as_alone(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_writer, "BATCH", 2)
    prompts = ["Who?", "In the harbour, Ines Maro found", "Why had it been left there?"]
    found = base_model_completer(tiny_backbone, max_new_tokens=8)(prompts)
    for prompt, text in zip(prompts, found, strict=True):
        ids = list(tiny_backbone.tokenizer(prompt)["input_ids"])
        length = len(ids)
        for _ in range(8):
            with torch.no_grad():
                logits = tiny_backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == tiny_backbone.tokenizer.eos_token_id:
                break
            if "\n" in tiny_backbone.tokenizer.decode(ids[-1:]):
                break
        assert text == tiny_backbone.tokenizer.decode(ids[length:], skip_special_tokens=True)
    assert len(set(found)) > 1


def test_the_base_models_own_settings_give_no_more_than_one_text_each(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = base_model_completer(tiny_backbone, max_new_tokens=6)
    prompts = ["Who found wild honey?", "Where?"]
    expected = complete(prompts)
    settings = tiny_backbone.model.generation_config
    monkeypatch.setattr(settings, "num_beams", 2)
    monkeypatch.setattr(settings, "num_return_sequences", 2)
    assert complete(prompts) == expected


def test_the_base_model_writes_by_name(tiny_backbone: Backbone) -> None:
    """A random model writes nothing that answers itself; without a base model, nobody does."""
    short = [Document("a", "It rained.", None, "a")]
    with pytest.raises((CorpusError, ConfigError)):
        write_questions([BASE_MODEL], short, None)
    assert isinstance(writer_of(BASE_MODEL, tiny_backbone), LanguageModelWriter)


def test_a_language_model_reads_texts_without_their_marks() -> None:
    seen: list[str] = []

    def complete(prompts: Sequence[str]) -> list[str]:
        seen.extend(prompts)
        return ["" for _ in prompts]

    text = "# Lamp\n\nUse the **big** `--on` option, see [here](a.md)."
    assert list(LanguageModelWriter(complete).write([Document("d", text, "Lamp", "d.md")])) == []
    assert all("Passage: Lamp Use the big --on option, see here." in prompt for prompt in seen)
    assert seen
