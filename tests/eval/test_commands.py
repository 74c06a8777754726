"""`mlpmem-rag compare`, `report` and `bench`, through the command's own error boundary."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mlpmem_cli.app import DEBUG_VARIABLE, main
from mlpmem_eval import headtohead
from mlpmem_eval.bench_schema import Bench
from mlpmem_eval.schema import Report, load_report
from mlpmem_rag.corpus import Document


class Result(NamedTuple):
    """What a command leaves behind."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that says what was wrong."""
        assert self.code == 1
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, letters: None) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(DEBUG_VARIABLE, "")
    monkeypatch.delenv(DEBUG_VARIABLE)

    def ran(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mlpmem-rag", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return ran


@pytest.fixture
def files(tiny_documents: list[Document], tmp_path: Path) -> Path:
    rows = [
        {"question": f"What did {who} find?", "answers": ["a map"], "hallucinated_answer": "gold"}
        for who in ("Ines Maro", "Dr. Tollen")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents = [{"doc_id": d.id, "text": d.text} for d in tiny_documents]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "text.txt").write_text("\n".join(d.text for d in reversed(tiny_documents)))
    return tmp_path


TINY = ("--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def compared(tiny_memory: Path, files: Path) -> list[object]:
    """Of a comparison into a new folder."""
    given = ["--questions", files / "questions.jsonl", "--corpus", files / "corpus.jsonl"]
    return [
        "compare", tiny_memory, "--out", files / "report", *given, "--arms", "base,rag,memory",
        *TINY,
    ]  # fmt: skip


def cells(text: str) -> dict[str, list[str]]:
    """Rows of printed tables by their first cell; of several the first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        row = [cell.strip() for cell in line.split("│")[1:-1]]
        if row:
            found.setdefault(row[0], row[1:])
    return found


def test_compare_prints_tables_and_writes_the_report(
    run: Run, compared: list[object], files: Path
) -> None:
    result = run(*compared)
    assert result.code == 0
    report = load_report(files / "report")
    rows = cells(result.out)
    for name, arm in report.arms.items():
        assert rows[name][0] == str(arm.n)
        assert rows[name][1].startswith(f"{arm.em:.3f} (")
    assert "memory against rag: F1" in result.out
    for word in ("comparison", "6/6", "answers/s", "0:00:0", "written to"):
        assert word in result.err
        assert word not in result.out
    assert report.settings["command"].startswith("mlpmem-rag compare ")
    assert f"--out {files / 'report'}" in report.settings["command"]


def test_compare_as_json_is_the_report(run: Run, compared: list[object], files: Path) -> None:
    result = run(*compared, "--json", "--limit", 1, "--concurrency", 2)
    assert Report.model_validate_json(result.out) == load_report(files / "report")
    report = json.loads(result.out)
    assert report["arms"]["memory"]["n"] == 1
    assert report["settings"]["options"]["concurrency"] == 2


def test_a_judge_is_a_column(run: Run, compared: list[object], files: Path) -> None:
    (files / "judge.py").write_text(
        "from llama_index.core.base.llms.types import CompletionResponse\n"
        "from llama_index.core.llms import MockLLM\n"
        "class Kind(MockLLM):\n"
        "    def complete(self, *a, **k): return CompletionResponse(text='4\\nGood.')\n"
    )
    result = run(*compared, "--judge", f"{files / 'judge.py'}:Kind")
    assert "judge (95 %)" in result.out
    assert cells(result.out)["base"][-1] == "0.750 (0.750–0.750)"
    assert "judge" in result.err  # its progress
    assert run(*compared, "--judge", "gpt").error().startswith("error: LLM 'gpt': give MODULE:NAME")


def test_an_interrupted_compare_says_how_to_go_on(
    run: Run, compared: list[object], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(headtohead, "compare_arms", interrupt)
        result = run(*compared)
    assert (result.code, result.out) == (130, "")
    assert f"kept in {files / 'report'}, run the same command to go on" in result.err
    assert run(*compared).code == 0


def test_wrong_wishes_are_one_line(run: Run, compared: list[object], files: Path) -> None:
    assert "allowed are base, rag" in run(*compared, "--arms", "rga").error()
    assert "cannot be read" in run(*compared, "--questions", files / "none.jsonl").error()
    with (files / "questions.jsonl").open("a") as file:
        file.write('\n{"question": "Why?"}')
    assert "line 3: no answers" in run(*compared, "--strict").error()
    assert "line 3: left out" in run(*compared).err
    result = run(*compared, "--seed", -1)
    assert (result.code, "Invalid value for '--seed'" in result.err) == (2, True)


def test_report_renders_again(run: Run, compared: list[object], files: Path) -> None:
    first = run(*compared)
    page = files / "report" / "report.html"
    shown = page.read_text()
    page.unlink()
    again = run("report", files / "report")
    assert again.code == 0
    assert again.out == first.out
    assert page.read_text() == shown
    elsewhere = run("report", files / "report" / "report.json", "--out", files / "copy", "--json")
    assert (files / "copy" / "report.html").read_text() == shown
    assert Report.model_validate_json(elsewhere.out) == load_report(files / "report")


def test_a_report_of_another_name_or_place_replaces_nothing(
    run: Run, compared: list[object], files: Path
) -> None:
    run(*compared)
    old = files / "report" / "old.json"
    old.write_text((files / "report" / "report.json").read_text())
    assert "say where to write with --out" in " ".join(run("report", old).err.split())
    assert "holds no comparison" in run("report", old, "--out", files).error()
    assert run("report", old, "--out", files / "new").code == 0


def test_report_of_nothing_is_one_line(run: Run, files: Path) -> None:
    assert "cannot be read" in run("report", files / "nowhere").error()
    (files / "report.json").write_text('{"schema_version": 7}')
    assert "has schema_version 7, this program reads 2" in run("report", files).error()


def test_bench_prints_figures_beside_the_papers(run: Run, tiny_memory: Path, files: Path) -> None:
    arguments = ["bench", tiny_memory, "--data", files, "--out", files / "bench", *TINY]
    result = run(*arguments, "--tokens", 1024, "--limit", 1)
    assert result.code == 0
    found = Bench.model_validate_json((files / "bench" / "bench.json").read_text())
    rows = cells(result.out)
    speed = next(section for section in found.sections if section.name == "speed")
    line = next(line for line in speed.lines if line.what == "first token, rag / memory")
    assert rows[line.what][0].startswith(f"{line.value:.4g} (")
    assert rows[line.what][1:] == ["1", "2.5"]
    assert "not run: nine NLP tasks" in result.out
    assert "written to" in result.err
    assert "allowed" not in result.err
    (files / "empty").mkdir()
    nothing = run("bench", tiny_memory, "--data", files / "empty", "--out", files / "b2")
    assert "holds none of questions.jsonl, corpus.jsonl, text.txt" in " ".join(nothing.err.split())
    assert "nothing to measure" in run("bench", tiny_memory, "--out", files / "b2").error()
