"""Arms taking turns: what is asked, kept, asked again, and what a failure does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlpmem_eval.answerers import ChatAnswerer, QueryEngineAnswerer
from mlpmem_eval.comparison import RunSettings, run_comparison
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.report import build_report
from mlpmem_eval.rows import read_rows
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import ProgressEvent

from .fakes import FakeArm, FakeClock, LetterEncoder, SlowLLM, letter_index, question

QUESTIONS = [question(n) for n in range(6)]
COLD = RunSettings(warm_up=0)


def answers(questions: Sequence[EvalQuestion] = QUESTIONS) -> dict[str, str]:
    return {q.text: q.answers[0] for q in questions}


def test_every_arm_answers_every_question_in_turns(tmp_path: Path) -> None:
    order: list[str] = []
    arms = [FakeArm(name, answers(), wait=partial(order.append, name)) for name in "abc"]
    events: list[ProgressEvent] = []
    rows = run_comparison(arms, QUESTIONS, tmp_path / "rows", COLD, on_progress=events.append)
    assert [(row.arm, row.question) for row in rows] == [
        (a, q.id) for a in "abc" for q in QUESTIONS
    ]
    assert {row.text for row in rows} == {q.answers[0] for q in QUESTIONS}
    assert "".join(order) == "abcbcacababcbcacab"
    assert [(e.done, e.total) for e in events] == [(n, 18) for n in range(19)]


def test_warm_up_is_thrown_away(tmp_path: Path) -> None:
    arm = FakeArm("a", answers())
    rows = run_comparison([arm], QUESTIONS, tmp_path / "rows", RunSettings(warm_up=2))
    assert arm.asked[:2] == [QUESTIONS[0].text, QUESTIONS[1].text]
    assert len(arm.asked) == 8
    assert len(rows) == 6


def test_a_failure_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    broken = FakeArm("b", {t: a for t, a in answers().items() if not t.endswith("2?")})
    rows = run_comparison([FakeArm("a", answers()), broken], QUESTIONS, tmp_path / "rows")
    failed = [row for row in rows if row.error is not None]
    assert [(row.arm, row.question, row.text) for row in failed] == [("b", "q2", "")]
    assert failed[0].error == "KeyError: 'question 2?'"
    report = build_report(QUESTIONS, rows, arm_settings={"a": {}, "b": {}}, setups={}, settings={})
    assert (report.arms["b"].n, report.arms["b"].failed) == (5, 1)
    assert {pair.n for pair in report.pairs} == {5}
    assert any("b failed on 1 of 6 questions" in warning for warning in report.warnings)


def test_an_interrupted_comparison_asks_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows"

    def interrupt() -> None:
        if len(stopped.asked) == 4:
            raise KeyboardInterrupt

    stopped = FakeArm("a", answers(), wait=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_comparison([stopped], QUESTIONS, path, COLD)
    with path.open("a") as file:
        file.write('{"arm": "a", "question": "q4", "te')  # cut short while writing
    arm = FakeArm("a", answers())
    rows = run_comparison([arm], QUESTIONS, path, COLD)
    assert arm.asked == [q.text for q in QUESTIONS[3:]]
    assert [row.text for row in rows] == [q.answers[0] for q in QUESTIONS]
    assert len(read_rows(path)) == 6


def test_a_row_that_was_cut_within_a_character_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    run_comparison([FakeArm("a", answers())], QUESTIONS[:1], path, COLD)
    with path.open("ab") as file:
        file.write('{"arm": "a", "text": "Z\u00fc'.encode()[:-1])
    arm = FakeArm("a", answers())
    run_comparison([arm], QUESTIONS[:2], path, COLD)
    assert arm.asked == [QUESTIONS[1].text]
    assert len(read_rows(path)) == 2


def test_a_separator_of_lines_in_an_answer_is_no_end_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    said = {question.text: "one\u2028two" for question in QUESTIONS}
    run_comparison([FakeArm("a", said)], QUESTIONS, path, COLD)
    again = FakeArm("a", said)
    rows = run_comparison([again], QUESTIONS, path, COLD)
    assert again.asked == []
    assert [row.text for row in rows] == ["one\u2028two"] * 6


def test_other_settings_or_words_are_asked_again_and_failures_too(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    first = FakeArm("a", {t: a for t, a in answers().items() if not t.endswith("5?")})
    run_comparison([first], QUESTIONS, path, COLD)
    same = FakeArm("a", answers())
    run_comparison([same], QUESTIONS, path, COLD)
    assert same.asked == [QUESTIONS[5].text]
    other = FakeArm("a", answers(), settings={"k": 2})
    run_comparison([other], QUESTIONS, path, COLD)
    assert len(other.asked) == 6
    reworded = [EvalQuestion("q0", "reworded?", ("x",)), *QUESTIONS[1:]]
    again = FakeArm("a", answers() | {"reworded?": "x"}, settings={"k": 2})
    rows = run_comparison([again], reworded, path, COLD)
    assert again.asked == ["reworded?"]
    assert rows[0].text == "x"


def test_concurrency_asks_several_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)
    arm = FakeArm("a", answers(), wait=partial(barrier.wait, 5))
    rows = run_comparison([arm], QUESTIONS, tmp_path / "rows", RunSettings(3, 0))
    assert [row.question for row in rows] == [q.id for q in QUESTIONS]
    # Both groups of three took as long as their slowest, of which each answer has a third.
    assert all(row.share > 0 for row in rows)
    assert rows[0].share == rows[1].share == rows[2].share


@pytest.mark.parametrize(
    ("arms", "questions", "settings", "told"),
    [
        ([], QUESTIONS, COLD, "give one or more"),
        (["a", "a"], QUESTIONS, COLD, "each name once"),
        (["a"], [], COLD, "no questions"),
        (["a"], QUESTIONS, RunSettings(0), "concurrency = 0"),
    ],
)
def test_what_cannot_be_run_is_refused(
    tmp_path: Path,
    arms: list[str],
    questions: list[EvalQuestion],
    settings: RunSettings,
    told: str,
) -> None:
    made = [FakeArm(name, answers()) for name in arms]
    with pytest.raises(ConfigError, match=told):
        run_comparison(made, questions, tmp_path / "rows", settings)


def rag_and_memory(clock: FakeClock, says: Callable[[str], str]) -> list[Any]:
    rag_llm = SlowLLM(clock, says, prefill=0.375, decode=0.125)
    memory_llm = SlowLLM(clock, says, prefill=0.5, decode=0.125)
    index = letter_index(clock, 0.125, ["one text", "another"])
    return [
        QueryEngineAnswerer("rag", index.as_query_engine(llm=rag_llm, streaming=True)),
        ChatAnswerer("memory", memory_llm),
    ]


def test_equal_arms_differ_in_nothing(tmp_path: Path, clock: FakeClock) -> None:
    # Right and wrong by turns; retrieval and reading take as long as only reading does.
    def says(prompt: str) -> str:
        return next(f"answer {q.id[1:]}" for q in QUESTIONS if q.text in prompt and q.id != "q1")

    questions = [q for q in QUESTIONS if q.id != "q1"]
    arms = rag_and_memory(clock, says)
    rows = run_comparison(arms, questions, tmp_path / "rows", clock=clock)
    report = build_report(
        questions,
        rows,
        arm_settings={"rag": {}, "memory": {}},
        setups={},
        settings={},
        encoder=LetterEncoder(),
    )
    assert report.arms["rag"].em == 1.0
    assert report.arms["rag"].total_ms == report.arms["memory"].total_ms
    assert {pair.metric for pair in report.pairs} == {
        "em", "f1", "contains", "similarity", "total_ms", "ttft_ms"
    }  # fmt: skip
    assert not [pair.metric for pair in report.pairs if pair.significant]


def test_a_slower_arm_is_found_to_be_slower(tmp_path: Path, clock: FakeClock) -> None:
    arms = rag_and_memory(clock, lambda _: "answer 1")
    arms[1].llm._prefill = 0.25
    rows = run_comparison(arms, QUESTIONS, tmp_path / "rows", clock=clock)
    report = build_report(
        QUESTIONS, rows, arm_settings={"rag": {}, "memory": {}}, setups={}, settings={}
    )
    found = {pair.metric: pair for pair in report.pairs}
    assert found["total_ms"].significant
    assert found["total_ms"].difference == pytest.approx(250)
    assert not found["em"].significant
