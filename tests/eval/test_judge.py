"""A judge by name, what it says, and what happens when it is away."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback

from mlpmem_eval.judge import Judge, judged, parsed
from mlpmem_eval.named_llm import load_llm, source_of
from mlpmem_eval.render import html, markdown
from mlpmem_eval.report import build_report
from mlpmem_eval.rows import Row
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import ProgressEvent

from .fakes import question

QUESTIONS = [question(0), question(1), question(2, answerable=False), question(3)]


class Strict(CustomLLM):
    """Gives the best mark to the expected words and the worst to others; notes what it read."""

    _read: list[str] = PrivateAttr(default_factory=list)
    _says: Callable[[str], str] = PrivateAttr()

    def __init__(self, says: Callable[[str], str] | None = None) -> None:
        super().__init__()
        self._says = says or mark

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="strict")

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: object) -> CompletionResponse:
        self._read.append(prompt)
        return CompletionResponse(text=self._says(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **_: object) -> Any:  # noqa: ANN401
        raise NotImplementedError


def mark(prompt: str) -> str:
    found = re.search(r"## Reference Answer\n(.*)\n\n## Generated Answer\n(.*)\n", prompt)
    assert found is not None
    return "5.0\nAs it should be." if found[1] == found[2] else "Score: 2\nHardly."


def rows() -> list[Row]:
    said = {"a": ["answer 0", "answer 1", "x", "wrong"], "b": ["answer 0", "", "x", "answer 3"]}
    found = [
        Row(arm, asked.id, "k", text=text)
        for arm, texts in said.items()
        for asked, text in zip(QUESTIONS, texts, strict=True)
    ]
    found[3] = Row("a", "q3", "k", error="ValueError: broken")
    return found


def test_scores_are_the_judges_marks_from_0_to_1(tmp_path: Path) -> None:
    llm, events = Strict(), list[ProgressEvent]()
    found = judged(
        Judge("strict", llm), QUESTIONS, rows(), tmp_path / "j", on_progress=events.append
    )
    assert found.scores == {
        ("a", "q0"): 1.0,
        ("b", "q0"): 1.0,
        ("a", "q1"): 1.0,
        ("b", "q1"): 0.0,  # nothing was said: nobody has to be asked
        ("b", "q3"): 1.0,
    }
    assert (found.wanted, found.problem) == (5, None)
    assert len(llm._read) == 3  # what two arms say alike is judged once
    assert "## User Query\nquestion 0?" in llm._read[0]
    assert [(e.done, e.total) for e in events] == [(1, 3), (2, 3), (3, 3)]


def test_a_partly_right_mark_lies_between(tmp_path: Path) -> None:
    found = judged(
        Judge("x", Strict(lambda _: "2")), QUESTIONS[:1], rows()[:1], tmp_path / "judgements"
    )
    assert found.scores == {("a", "q0"): pytest.approx(0.25)}


def test_all_references_are_shown(tmp_path: Path) -> None:
    llm = Strict(lambda _: "3\nWell.")
    asked = [replace(QUESTIONS[0], answers=("one", "the other"))]
    judged(Judge("x", llm), asked, rows()[:1], tmp_path / "j")
    assert "any one of these: one; the other" in llm._read[0]


def test_a_judge_that_is_away_costs_its_scores_only(tmp_path: Path) -> None:
    asked = [question(n) for n in range(8)]
    said = [Row("a", q.id, "k", text=f"text {q.id}") for q in asked]
    calls: list[str] = []

    def fails_from_the_third_on(prompt: str) -> str:
        calls.append(prompt)
        if len(calls) > 2:
            raise ConnectionError("nobody  at\nhome")
        return "4\nFine."

    path = tmp_path / "judgements"
    first = judged(Judge("x", Strict(fails_from_the_third_on)), asked, said, path)
    assert len(calls) == 5  # three failures in a row, and it is left in peace
    assert first.scores == {("a", "q0"): 0.75, ("a", "q1"): 0.75}
    assert first.problem is not None
    assert "x could not be reached: 2 of 8 answers are judged" in first.problem
    assert "ConnectionError: nobody at home" in first.problem

    report = build_report(
        asked, said, arm_settings={"a": {}}, setups={}, settings={}, judgements=first.scores,
        warnings=[first.problem],
    )  # fmt: skip
    assert (report.arms["a"].n, report.arms["a"].judged, report.arms["a"].judge) == (8, 2, 0.75)
    assert report.questions[1].arms["a"].judge == 0.75
    assert report.questions[2].arms["a"].judge is None
    assert "could not be reached" in html(report)

    back = Strict(lambda _: "1\nNo.")
    with path.open("a") as file:
        file.write('{"key": "cut sh')
    second = judged(Judge("x", back), asked, said, path)
    assert len(back._read) == 6
    assert second.scores == dict(first.scores) | {("a", f"q{n}"): 0.0 for n in range(2, 8)}
    assert second.problem is None
    other = Strict(lambda _: "5\nYes.")
    assert set(judged(Judge("another", other), asked, said, path).scores.values()) == {1.0}
    assert set(judged(Judge("x", other, "changed"), asked, said, path).scores.values()) == {1.0}


def test_a_reply_without_a_mark_is_no_score(tmp_path: Path) -> None:
    replies = iter(["I cannot tell.", "5\nRight."])
    found = judged(
        Judge("x", Strict(lambda _: next(replies))), QUESTIONS, rows()[:2], tmp_path / "j"
    )
    assert found.scores == {("a", "q1"): 1.0}
    assert found.problem is not None
    assert "gave no score for some: 1 of 2" in found.problem
    assert "I cannot tell." in found.problem


@pytest.mark.parametrize(
    ("reply", "score"),
    [("4.0\nGood.", 4), ("Score: 3", 3), ("10", None), ("0", None), ("-1", None), ("none", None)],
)
def test_marks_are_read_from_the_beginning_of_a_reply(reply: str, score: float | None) -> None:
    assert parsed(reply)[0] == score


def test_pairs_and_tables_know_the_judge(tmp_path: Path) -> None:
    found = judged(Judge("strict", Strict()), QUESTIONS, rows(), tmp_path / "j")
    report = build_report(
        QUESTIONS, rows(), arm_settings={"a": {}, "b": {}}, setups={}, settings={},
        judgements=found.scores,
    )  # fmt: skip
    (pair,) = [p for p in report.pairs if p.metric == "judge"]
    assert (pair.n, pair.difference, pair.a_only, pair.b_only) == (2, 0.5, 1, 0)
    assert report.arms["b"].judge == pytest.approx(2 / 3)
    low, high = report.arms["b"].intervals["judge"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert "<th>judge</th>" in html(report)
    assert "| judge (95 %) |" in markdown(report)
    silent = build_report(QUESTIONS, rows(), arm_settings={"a": {}}, setups={}, settings={})
    assert "judge" not in markdown(silent)


# Names.


def test_an_llm_by_its_class_and_arguments() -> None:
    llm = load_llm("llama_index.core.llms:MockLLM?max_tokens=7")
    assert isinstance(llm, MockLLM)
    assert llm.max_tokens == 7


def test_an_llm_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "from llama_index.core.llms import MockLLM\n"
        "ready = MockLLM(max_tokens=3)\n"
        "def make(name='x', n=1):\n"
        "    assert name == 'a b' and n == 2, (name, n)\n"
        "    return MockLLM(max_tokens=n)\n"
        "def none(): return 'nothing'\n"
    )
    first = source_of(f"{file}:make?name=a+b&n=2")
    file.write_text(file.read_text() + "# changed\n")
    assert len({"", first, source_of(f"{file}:ready")}) == 3
    assert source_of("llama_index.core.llms:MockLLM") == ""
    ready, made = load_llm(f"{file}:ready"), load_llm(f"{file}:make?name=a+b&n=2")
    assert isinstance(ready, MockLLM)
    assert isinstance(made, MockLLM)
    assert (ready.max_tokens, made.max_tokens) == (3, 2)
    for name, told in (
        (f"{file}:none", "is a str; it has to be a LlamaIndex LLM"),
        (f"{file}:absent", "has no 'absent'"),
        (f"{file}:make?n=3", "cannot be made (AssertionError: ('x', 3))"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            load_llm(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gpt", "give MODULE:NAME or FILE.py:NAME"),
        (":x", "give MODULE:NAME"),
        ("a:b c", "give MODULE:NAME"),
        ("no_such_module:LLM", "cannot be imported (ModuleNotFoundError"),
        ("./nowhere.py:llm", "cannot be imported (FileNotFoundError"),
        ("llama_index.core.llms:MockLLM?nothing", "not of the form a=1&b=x"),
        ("llama_index.core.llms:MockLLM?api_key=x", "api_key would stand where others"),
        ("llama_index.core.llms:MockLLM?apiKey=x", "apiKey would stand where others"),
        ("llama_index.core.llms:MockLLM?accessToken=x", "accessToken would stand where"),
        ("llama_index.core.llms:MockLLM?passwd=x", "passwd would stand where others"),
        ("llama_index.core.llms:MockLLM?authorization=x", "authorization would stand where"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_llm(name)
