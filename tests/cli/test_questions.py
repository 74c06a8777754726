"""`mlpmem-rag questions`, through the command's own error boundary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mlpmem_cli.app import main
from mlpmem_rag.questions import load_questions

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
