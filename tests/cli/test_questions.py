"""`mlpmem-rag questions`, through the command's own error boundary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mlpmem_cli.app import main
from mlpmem_rag.corpus import read_corpus
from mlpmem_rag.questions import Question, load_questions
from mlpmem_rag.writers import OwnQuestions

TEXT = "Marie Curie discovered radium in Paris. The museum contains 60 rooms."


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mlpmem-rag", "questions", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "curie.txt").write_text(TEXT)
    return tmp_path / "corpus"


def test_all_questions_as_json_and_in_the_file(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, "--json", "--show", 0, "--out", tmp_path / "q.jsonl") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {
        "text": "How many rooms does the museum contain?",
        "answer": "60",
        "source": "The museum contains 60 rooms.",
        "document": "curie.txt",
    } in printed
    stored = load_questions(tmp_path / "q.jsonl")
    assert [q.text for q in stored] == [line["text"] for line in printed]


def test_a_few_are_shown_as_a_table(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, "--show", 2) == 0
    out, err = capsys.readouterr()
    assert out.count("curie.txt") == 2
    assert "questions from 1 documents" in err


def test_text_is_shown_as_it_is(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "curie.txt").write_text("The museum [/INST] contains 60 [bold]rooms[/bold].")
    (corpus / "[a].txt").write_text(TEXT)
    assert run(corpus, "--show", 0) == 0
    assert "[a].txt" in capsys.readouterr().out


def test_a_folder_that_is_missing_is_told_beforehand(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, "--out", tmp_path / "new" / "q.jsonl") == 2
    assert "there is no folder" in " ".join(capsys.readouterr().err.split())


def test_a_missing_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere") == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ")
    assert "nowhere" in err[-1]


LLM = """
from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

class Writer(CustomLLM):
    answer: str

    @property
    def metadata(self):
        return LLMMetadata()

    def complete(self, prompt, formatted=False, **kwargs):
        if prompt.endswith("Question: Who"):
            return CompletionResponse(text=" was first to find radium?")
        return CompletionResponse(text=self.answer if prompt.endswith("Answer:") else " nothing")

    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError
"""


@pytest.mark.parametrize("beside", [[], ["--questions", "rules"]], ids=["alone", "beside rules"])
def test_a_llama_index_llm_writes_what_training_takes(
    corpus: Path, tmp_path: Path, beside: list[str]
) -> None:
    (tmp_path / "writer.py").write_text(LLM)
    name = f"{tmp_path / 'writer.py'}:Writer?answer=Marie Curie"
    assert run(corpus, *beside, "--llm", name, "--out", tmp_path / "q.jsonl") == 0
    written = load_questions(tmp_path / "q.jsonl")
    source = "Marie Curie discovered radium in Paris."
    assert written[-1] == Question(
        "Who was first to find radium?", "Marie Curie", source, "curie.txt"
    )
    assert len(written) == 1 if not beside else len(written) > 4
    assert [*OwnQuestions(tmp_path / "q.jsonl").write(read_corpus(corpus).documents)] == written


def test_an_llm_that_is_not_there_is_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, "--llm", "nowhere:Writer") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: LLM 'nowhere:")
