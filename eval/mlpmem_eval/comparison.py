"""Ask every arm every question, turn by turn, and keep each answer at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlpmem_eval.answerers import Answerer, Reply
from mlpmem_eval.latency import Clock, LatencyRecorder, recording
from mlpmem_eval.meters import metered
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rows import Row, append_rows, read_rows, row_key
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress

STAGE = "comparison"
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class RunSettings:
    """How the questions are asked.

    Attributes:
        concurrency: questions that an arm has at the same time.
        warm_up: questions asked of every arm before, whose answers are thrown away.
        common: what the answers of all arms depend on besides their own settings.
        device: where the arms compute, whose memory is metered.
    """

    concurrency: int = 1
    warm_up: int = 2
    common: dict[str, Any] | None = None
    device: str = "cpu"


def run_comparison(
    arms: Sequence[Answerer],
    questions: Sequence[EvalQuestion],
    rows_path: Path,
    settings: RunSettings = RunSettings(),
    *,
    clock: Clock = time.perf_counter,
    on_progress: OnProgress = ignore_progress,
) -> list[Row]:
    """Every arm's answer to every question, arms taking turns.

    Answers that `rows_path` holds already are not asked for again, except failed ones. An arm
    that fails on a question gets a row with the error, and the run goes on.

    Raises:
        ConfigError: no arms, two of one name, no questions, or a setting outside what is allowed.
    """
    _check(arms, questions, settings)
    kept = {(row.arm, row.question, row.key): row for row in read_rows(rows_path)}
    keys = {
        (arm.name, question.id): row_key(
            {"arm": arm.settings, "common": settings.common, "at_once": settings.concurrency},
            question,
        )
        for arm in arms
        for question in questions
    }
    done = {
        (arm, question): row
        for (arm, question, key), row in kept.items()
        if row.error is None and keys.get((arm, question)) == key
    }
    total = len(arms) * len(questions)
    on_progress(ProgressEvent(STAGE, len(done), total, "answers"))
    with recording(clock) as recorder, ThreadPoolExecutor(settings.concurrency) as pool:
        _warm_up(arms, questions, done, settings.warm_up)
        for arm, group in _turns(arms, questions, settings.concurrency):
            missing = [q for q in group if (arm.name, q.id) not in done]
            if missing:
                answers = _ask_group(arm, missing, recorder, pool, settings.device)
                rows = [replace(row, key=keys[arm.name, row.question]) for row in answers]
                append_rows(rows_path, rows)
                done.update({(row.arm, row.question): row for row in rows})
                on_progress(ProgressEvent(STAGE, len(done), total, "answers"))
    return [done[arm.name, question.id] for arm in arms for question in questions]


def _check(
    arms: Sequence[Answerer], questions: Sequence[EvalQuestion], settings: RunSettings
) -> None:
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"arms {', '.join(names) or 'none'}: give one or more, each name once")
    if not questions:
        raise ConfigError("no questions to compare on; give some, or let some be written")
    if settings.concurrency < 1 or settings.warm_up < 0:
        raise ConfigError(
            f"concurrency = {settings.concurrency}, warm_up = {settings.warm_up}: allowed are 1 "
            "or more, and 0 or more"
        )


def _turns(
    arms: Sequence[Answerer], questions: Sequence[EvalQuestion], size: int
) -> Iterator[tuple[Answerer, Sequence[EvalQuestion]]]:
    """Each group of questions goes to every arm; another arm begins each time."""
    for turn, first in enumerate(range(0, len(questions), size)):
        for number in range(len(arms)):
            yield arms[(turn + number) % len(arms)], questions[first : first + size]


def _warm_up(
    arms: Sequence[Answerer],
    questions: Sequence[EvalQuestion],
    done: dict[tuple[str, str], Row],
    number: int,
) -> None:
    for arm in arms:
        missing = [q for q in questions if (arm.name, q.id) not in done]
        for question in missing[:number]:
            try:
                arm.answer(question.text)
            except Exception:  # the same failure will be recorded in its turn
                break


def _ask_group(
    arm: Answerer,
    questions: Sequence[EvalQuestion],
    recorder: LatencyRecorder,
    pool: ThreadPoolExecutor,
    device: str,
) -> list[Row]:
    alone = len(questions) == 1
    with metered(device) as reading:
        started = recorder.now()
        if alone:
            rows = [_ask(arm, questions[0], recorder, alone=True)]
        else:
            rows = list(pool.map(lambda q: _ask(arm, q, recorder, alone=False), questions))
        share = (recorder.now() - started) / len(rows)
    joules = None if reading.joules is None else reading.joules / len(rows)
    return [replace(r, share=share, peak_bytes=reading.peak_bytes, joules=joules) for r in rows]


def _ask(arm: Answerer, question: EvalQuestion, recorder: LatencyRecorder, *, alone: bool) -> Row:
    work: Callable[[], Reply] = lambda: arm.answer(question.text)  # noqa: E731
    try:
        reply, timing = recorder.timed(work, alone=alone)
    except Exception as error:  # whatever an arm raises is its result
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Row(arm.name, question.id, "", error=told[:_ERROR_CHARACTERS])
    return Row(
        arm=arm.name,
        question=question.id,
        key="",
        text=reply.text,
        confidence=reply.confidence,
        documents=reply.documents,
        route=reply.route,
        total=timing.total,
        ttft=timing.ttft,
        retrieval=timing.retrieval,
        embedding=timing.embedding,
        prefill=timing.prefill,
        decode=timing.decode,
        prompt_tokens=timing.prompt_tokens,
        completion_tokens=timing.completion_tokens,
        llm_calls=timing.llm_calls,
    )
