"""A whole comparison on a tiny memory: its folder, its warnings, and going on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlpmem_eval.answerers import QueryEngineAnswerer
from mlpmem_eval.arms import Arm
from mlpmem_eval.folder import ROWS, is_report, report_folder
from mlpmem_eval.headtohead import CompareConfig, compare, questions_of
from mlpmem_eval.rows import read_rows
from mlpmem_eval.schema import load_report
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.errors import ArtifactError, ConfigError, OutputError
from mlpmem_rag.progress import ProgressEvent

from .fakes import FakeClock, SlowLLM, letter_index

ROWS_OF_QUESTIONS = [
    {"id": "a", "question": "What did Ines Maro find?", "answers": ["wild honey"]},
    {"id": "b", "question": "What did Dr. Tollen find?", "answers": ["a map of the tunnels"]},
    {"id": "c", "question": "Who is the mayor?", "answers": [], "answerable": False},
]


def documents_file(documents: list[Document], path: Path) -> str:
    lines = [json.dumps({"doc_id": d.id, "text": d.text}) for d in documents]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def config(
    tiny_memory: Path, tiny_documents: list[Document], tmp_path: Path, letters: None
) -> CompareConfig:
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(json.dumps(row) for row in ROWS_OF_QUESTIONS))
    return CompareConfig(
        tiny_memory,
        tmp_path / "report",
        questions=questions,
        corpus=documents_file(tiny_documents, tmp_path / "corpus.jsonl"),
        arms=("base", "memory"),
        max_new_tokens=4,
        warm_up=0,
        device="cpu",
        dtype="float32",
        command="mlpmem-rag compare …",
    )


def test_everything_is_written_and_can_be_repeated(config: CompareConfig) -> None:
    events: list[ProgressEvent] = []
    report = compare(config, on_progress=events.append)
    assert load_report(config.out).model_dump(mode="json") == report.model_dump(mode="json")
    assert {p.name for p in config.out.iterdir()} == {
        "report.json", "report.html", "report.md", "work",
    }  # fmt: skip
    assert [e.done for e in events if e.stage == "comparison"] == list(range(7))
    settings = report.settings
    assert settings["command"] == "mlpmem-rag compare …"
    assert settings["options"]["seed"] == 0
    assert settings["options"]["questions"] == str(config.questions)
    assert settings["model"]["device"] == "cpu"
    assert settings["versions"]["llama-index-core"]
    assert len(settings["questions_sha256"]) == 64
    assert (report.arms["base"].n, report.arms["base"].answered) == (2, 3)


def test_an_arm_of_ones_own_takes_part(config: CompareConfig, clock: FakeClock) -> None:
    llm = SlowLLM(clock, lambda _: "wild honey", prefill=0.0, decode=0.0)
    engine = letter_index(clock, 0.0, ["one text"]).as_query_engine(llm=llm, streaming=True)
    mine = Arm(QueryEngineAnswerer("mine", engine, {"k": 1}))
    report = compare(config, own=[mine])
    assert list(report.arms) == ["base", "memory", "mine"]
    assert (report.arms["mine"].em, report.arms["mine"].settings) == (0.5, {"k": 1})
    assert {(p.a, p.b) for p in report.pairs} >= {("base", "mine"), ("memory", "mine")}
    with pytest.raises(ConfigError, match="each name once"):
        compare(config, own=[mine, mine])


def test_an_interrupted_comparison_goes_on(config: CompareConfig) -> None:
    first = compare(config)
    path = config.out / "work" / ROWS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])
    asked: list[ProgressEvent] = []
    second = compare(config, on_progress=asked.append)
    assert [e.done for e in asked if e.stage == "comparison"] == [4, 5, 6]
    texts = [[(a, q.arms[a].text) for a in q.arms] for q in first.questions]
    assert [[(a, q.arms[a].text) for a in q.arms] for q in second.questions] == texts
    assert len(read_rows(path)) == 6
    compare(replace(config, max_new_tokens=3))
    assert len(read_rows(path)) == 12  # other answers: all are asked again


def test_other_documents_than_the_memorys_are_warned_of(
    config: CompareConfig, tiny_documents: list[Document], tmp_path: Path
) -> None:
    same = compare(config)
    assert not any("fingerprint" in warning for warning in same.warnings)
    fewer = documents_file(tiny_documents[1:], tmp_path / "fewer.jsonl")
    other = compare(replace(config, corpus=fewer))
    (warning,) = [w for w in other.warnings if "fingerprint" in w]
    assert warning.startswith("the documents are not those that the memory was trained on")
    assert "fingerprint is" in (config.out / "report.html").read_text()


def test_bad_rows_stand_in_the_report_with_their_lines(config: CompareConfig) -> None:
    assert config.questions is not None
    with config.questions.open("a") as file:
        file.write('\n{"id": "a", "question": "Twice?", "answers": ["yes"]}')
        file.write('\n{"question": "Without answers?", "answers": []}')
    report = compare(config)
    assert [entry.id for entry in report.questions] == ["a", "b", "c"]
    twice, without = (w for w in report.warnings if "left out" in w)
    assert "line 4: left out, id 'a' was given before, in line 1" in twice
    assert "line 5: left out, no answers" in without
    with pytest.raises(ConfigError, match="2 of 5 rows are no questions"):
        compare(replace(config, strict=True))


def test_questions_can_be_limited_and_written(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The hobby of Ada Morris is chess.\nThe father of Ada Morris is Tom Orr."
    corpus = Corpus((Document("d", text, None, "d.txt"),))
    found = questions_of(replace(config, limit=1, write=2), corpus)
    assert [q.synthetic for q in found.questions] == [False, True, True]
    taken = {
        questions_of(replace(config, limit=1, seed=seed), None).questions[0].id
        for seed in range(20)
    }
    assert taken == {"a", "b", "c"}
    report = compare(replace(config, limit=1, seed=1))
    (warning,) = [w for w in report.warnings if "were not asked" in w]
    assert warning.startswith("2 questions of ")
    assert warning.endswith("1 were drawn by chance, with seed 1")
    assert config.questions is not None
    row = {
        "id": found.questions[1].id,
        "question": found.questions[0].text,
        "answers": ["something"],
    }
    config.questions.write_text(json.dumps(row))
    again = questions_of(replace(config, write=2), corpus)
    assert [q.text for q in again.questions] == [q.text for q in found.questions]
    assert len({q.id for q in again.questions}) == 3
    none = replace(config, questions=None)
    with pytest.raises(ConfigError, match="give a file with --questions, or --write N"):
        questions_of(none, corpus)
    with pytest.raises(ConfigError, match="--write 3 needs the documents"):
        questions_of(replace(none, write=3), None)


def test_what_is_missing_is_told_before_anything_is_loaded(
    config: CompareConfig, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        compare(replace(config, memory=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="allowed are base, rag"):
        compare(replace(config, arms=("best",)))
    with pytest.raises(ConfigError, match="'rag' needs the documents"):
        compare(replace(config, arms=("rag",), corpus=None))
    with pytest.raises(ConfigError, match="cannot be imported"):
        compare(replace(config, judge="no_such_module:LLM", out=tmp_path / "judged"))
    assert not (tmp_path / "judged").exists()


def test_a_judge_that_is_away_does_not_lose_the_run(config: CompareConfig, tmp_path: Path) -> None:
    (tmp_path / "away.py").write_text(
        "from llama_index.core.llms import MockLLM\n"
        "class Away(MockLLM):\n"
        "    def complete(self, *a, **k): raise ConnectionError('nobody at home')\n"
    )
    report = compare(replace(config, judge=f"{tmp_path / 'away.py'}:Away"))
    assert (report.arms["base"].judged, report.arms["base"].judge) == (0, None)
    assert report.arms["base"].em is not None
    (warning,) = [w for w in report.warnings if "judge" in w]
    assert "could not be reached: 0 of 4 answers are judged" in warning
    assert "nobody at home" in warning
    (tmp_path / "back.py").write_text(
        "from llama_index.core.llms import MockLLM\n"
        "from llama_index.core.base.llms.types import CompletionResponse\n"
        "class Back(MockLLM):\n"
        "    def complete(self, *a, **k): return CompletionResponse(text='4')\n"
    )
    again = compare(replace(config, judge=f"{tmp_path / 'back.py'}:Back"))
    assert (again.arms["memory"].judged, again.arms["memory"].judge) == (2, 0.75)
    assert again.questions[0].arms["memory"].judge == 0.75
    assert [w for w in again.warnings if "judge" in w] == []


# The folder.


def test_the_folder_is_ours_or_nobodys(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_report(tmp_path)
    with report_folder(out) as work:
        assert work.is_dir()
        assert is_report(out)  # interrupted now, it would be recognised
        with pytest.raises(OutputError, match="another run is writing"), report_folder(out):
            pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("secret")
    with (
        pytest.raises(OutputError, match="holds no comparison"),
        report_folder(tmp_path / "mine"),
    ):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"), report_folder(tmp_path / "file"):
        pass
