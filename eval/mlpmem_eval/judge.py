"""How right an answer is, as an LLM sees it, by LlamaIndex's CorrectnessEvaluator.

A judge that cannot be reached costs its scores and nothing else: what it said is kept, and the
same comparison asks for the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_index.core.async_utils import asyncio_run
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.llms import LLM

from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rows import Row, append_lines, read_lines
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress

STAGE = "judge"
LOWEST, HIGHEST = 1.0, 5.0
"""What CorrectnessEvaluator asks for; reported from 0 to 1."""
GIVEN_UP = 3
"""Failures one after the other, after which a judge counts as unreachable."""

Place = tuple[str, str]
"""Arm and question."""


@dataclass(frozen=True)
class Judge:
    """An LLM with the name under which its judgements are kept.

    Attributes:
        name: as the report says it.
        llm: is asked.
        source: a fingerprint of the program that makes it; with another, all is asked anew.
    """

    name: str
    llm: LLM
    source: str = ""


@dataclass(frozen=True)
class Judgements:
    """What a judge said.

    Attributes:
        scores: of answers, 0 to 1.
        wanted: answers that there were to judge.
        problem: why some have none; None: all have one.
    """

    scores: Mapping[Place, float]
    wanted: int
    problem: str | None = None


@dataclass(frozen=True)
class _Case:
    """One text to judge; arms that say the same share it."""

    key: str
    question: str
    text: str
    reference: str


def judged(
    judge: Judge,
    questions: Sequence[EvalQuestion],
    rows: Sequence[Row],
    path: Path,
    *,
    on_progress: OnProgress = ignore_progress,
) -> Judgements:
    """Scores of all answers to answerable questions; empty answers have 0.

    Args:
        judge: who is asked.
        questions: what the arms were asked.
        rows: their answers.
        path: file of judgements; what it holds is not asked for again.
        on_progress: called after every judgement.
    """
    by_id = {question.id: question for question in questions if question.answerable}
    cases = {
        (row.arm, row.question): _case(judge, by_id[row.question], row.text)
        for row in rows
        if row.error is None and row.question in by_id
    }
    known = _read(path)
    known.update({case.key: 0.0 for case in cases.values() if not case.text})
    missing = {case.key: case for case in cases.values() if case.key not in known}
    asking = _Asking(judge.llm, path, known, on_progress)
    if missing:
        asyncio_run(asking.all(list(missing.values())))
    scores = {place: known[case.key] for place, case in cases.items() if case.key in known}
    return Judgements(scores, len(cases), _problem(judge, asking, len(scores), len(cases)))


def _case(judge: Judge, question: EvalQuestion, text: str) -> _Case:
    reference = question.answers[0]
    if len(question.answers) > 1:
        reference = "any one of these: " + "; ".join(question.answers)
    asked = [judge.name, judge.source, question.text, text, reference]
    content = json.dumps(asked, ensure_ascii=False)
    return _Case(hashlib.sha256(content.encode()).hexdigest(), question.text, text, reference)


class _Asking:
    """Asks case by case, in one event loop, as clients of services want it."""

    def __init__(
        self, llm: LLM, path: Path, known: dict[str, float], on_progress: OnProgress
    ) -> None:
        self._evaluator = CorrectnessEvaluator(llm, parser_function=parsed)
        self._path, self._known, self._on_progress = path, known, on_progress
        self.failures = 0
        self.last_error: str | None = None

    async def all(self, cases: Sequence[_Case]) -> None:
        for done, case in enumerate(cases, 1):
            await self._one(case)
            if self.failures >= GIVEN_UP:
                return
            self._on_progress(ProgressEvent(STAGE, done, len(cases), "answers"))

    async def _one(self, case: _Case) -> None:
        try:
            result = await self._evaluator.aevaluate(
                query=case.question, response=case.text, reference=case.reference
            )
        except Exception as error:  # whatever a service raises
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return
        self.failures = 0
        if result.score is None:
            self.last_error = f"no score from 1 to 5 in its reply ({result.feedback})"
            return
        self._known[case.key] = (result.score - LOWEST) / (HIGHEST - LOWEST)
        append_lines(self._path, [{"key": case.key, "score": self._known[case.key]}])


def parsed(reply: str) -> tuple[float | None, str]:
    """The first number of a reply if it is a score, and the reply, shortened."""
    told = " ".join(reply.split())[:200]
    number = re.search(r"-?\d+(\.\d+)?", reply)
    score = float(number.group()) if number else None
    return score if score is not None and LOWEST <= score <= HIGHEST else None, told


def _problem(judge: Judge, asking: _Asking, judged: int, wanted: int) -> str | None:
    if judged == wanted:
        return None
    reached = "could not be reached" if asking.failures >= GIVEN_UP else "gave no score for some"
    return (
        f"the judge {judge.name} {reached}: {judged} of {wanted} answers are judged; "
        f"{asking.last_error}. The same command asks it for the rest"
    )


def _read(path: Path) -> dict[str, float]:
    """Judgements of an earlier run."""
    return {str(entry["key"]): float(entry["score"]) for entry in read_lines(path)}
