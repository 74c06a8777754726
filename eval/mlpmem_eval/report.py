"""Rows become a report: scores, figures of every arm, and what differs between any two."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpmem_eval.cost import Setup, cost_of
from mlpmem_eval.metrics import abstention, retrieval_hit, score, similarities
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rows import Row
from mlpmem_eval.schema import (
    SCHEMA_VERSION,
    AbstentionFigures,
    ArmFigures,
    Milliseconds,
    PairFigures,
    QuestionArm,
    QuestionEntry,
    Report,
)
from mlpmem_eval.statistics import MARGIN, Pair, compare_pair, holm, mean_interval
from mlpmem_rag.query import QueryEncoder

ACCURACY = ("em", "f1", "contains", "similarity", "judge")
COMPARED = (*ACCURACY, "total_ms", "ttft_ms")
"""What every pair of arms is compared by."""

Judgements = Mapping[tuple[str, str], float]
"""(arm, question) -> 0 to 1."""

Floats = npt.NDArray[np.float64]


def build_report(
    questions: Sequence[EvalQuestion],
    rows: Sequence[Row],
    *,
    arm_settings: Mapping[str, dict[str, Any]],
    setups: Mapping[str, Setup],
    settings: dict[str, Any],
    warnings: Sequence[str] = (),
    encoder: QueryEncoder | None = None,
    judgements: Judgements | None = None,
    title: str = "Memory and RAG, head to head",
    seed: int = 0,
) -> Report:
    """All that can be said about a comparison.

    Args:
        questions: what was asked.
        rows: one for every arm and question.
        arm_settings: settings of each arm, in the order in which they are shown.
        setups: what each arm took before its first answer.
        settings: everything else that is needed to repeat the run.
        warnings: what a reader has to know.
        encoder: for the semantic similarity; None leaves it out.
        judgements: of an LLM that judged the answers.
        title: of the report.
        seed: of the bootstrap.
    """
    entries = _entries(questions, rows, list(arm_settings), encoder, judgements or {})
    by_arm = {name: [row for row in rows if row.arm == name] for name in arm_settings}
    figures = {
        name: _figures(entries, name, by_arm[name], arm_settings[name], seed)
        for name in arm_settings
    }
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=title,
        warnings=[*warnings, *_remarks(entries, figures)],
        settings=settings,
        arms=figures,
        pairs=_pairs(entries, list(arm_settings), seed),
        cost=cost_of({name: setups.get(name, Setup()) for name in arm_settings}, figures),
        questions=entries,
    )


def _entries(
    questions: Sequence[EvalQuestion],
    rows: Sequence[Row],
    arms: Sequence[str],
    encoder: QueryEncoder | None,
    judgements: Judgements,
) -> list[QuestionEntry]:
    by_place = {(row.arm, row.question): row for row in rows}
    alike = _similarities(questions, by_place, encoder)
    entries = []
    for question in questions:
        answers = {
            arm: _answer(question, by_place[arm, question.id], alike, judgements) for arm in arms
        }
        scored = {answer.em for answer in answers.values() if answer.em is not None}
        entries.append(
            QuestionEntry(
                id=question.id,
                question=question.text,
                answers=list(question.answers),
                doc_ids=list(question.doc_ids),
                answerable=question.answerable,
                synthetic=question.synthetic,
                disagree=len(scored) > 1,
                arms=answers,
            )
        )
    return entries


def _similarities(
    questions: Sequence[EvalQuestion],
    rows: Mapping[tuple[str, str], Row],
    encoder: QueryEncoder | None,
) -> dict[tuple[str, str], float]:
    if encoder is None:
        return {}
    references = {q.id: q.answers for q in questions if q.answerable}
    places = [p for p, row in rows.items() if row.error is None and p[1] in references]
    if not places:
        return {}
    values = similarities(
        [rows[p].text for p in places], [references[p[1]] for p in places], encoder
    )
    return dict(zip(places, values.tolist(), strict=True))


def _answer(
    question: EvalQuestion,
    row: Row,
    alike: Mapping[tuple[str, str], float],
    judgements: Judgements,
) -> QuestionArm:
    scored = row.error is None and question.answerable
    scores = score(row.text, question.answers) if scored else None
    place = (row.arm, question.id)
    found = row.documents
    return QuestionArm(
        text=row.text,
        error=row.error,
        em=None if scores is None else scores.em,
        f1=None if scores is None else scores.f1,
        contains=None if scores is None else scores.contains,
        similarity=alike.get(place),
        judge=judgements.get(place) if scored else None,
        hit=None if found is None else retrieval_hit(found, question.doc_ids),
        confidence=row.confidence,
        route=row.route,
        documents=None if found is None else list(found),
        total_ms=row.total * 1000,
        ttft_ms=row.ttft * 1000,
        retrieval_ms=row.retrieval * 1000,
        prefill_ms=row.prefill * 1000,
        decode_ms=row.decode * 1000,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
    )


def _figures(
    entries: Sequence[QuestionEntry],
    name: str,
    rows: Sequence[Row],
    settings: dict[str, Any],
    seed: int,
) -> ArmFigures:
    answers = [entry.arms[name] for entry in entries]
    given = [answer for answer in answers if answer.error is None]
    accuracy = {metric: _values(given, metric) for metric in ACCURACY}
    hits = [float(answer.hit) for answer in given if answer.hit is not None]
    good = [row for row in rows if row.error is None]
    busy = sum(row.share for row in good)
    return ArmFigures(
        n=len(accuracy["em"]),
        answered=len(given),
        failed=len(answers) - len(given),
        em=_mean(accuracy["em"]),
        f1=_mean(accuracy["f1"]),
        contains=_mean(accuracy["contains"]),
        similarity=_mean(accuracy["similarity"]),
        judge=_mean(accuracy["judge"]),
        judged=len(accuracy["judge"]),
        intervals={
            metric: mean_interval(values, seed=seed)
            for metric, values in accuracy.items()
            if len(values)
        },
        hit_rate=_mean(np.array(hits)),
        abstention=_abstention(entries, name),
        total_ms=_milliseconds([row.total for row in good]),
        ttft_ms=_milliseconds([row.ttft for row in good]),
        retrieval_ms=_milliseconds([row.retrieval for row in good]),
        embedding_ms=_milliseconds([row.embedding for row in good]),
        prefill_ms=_milliseconds([row.prefill for row in good]),
        decode_ms=_milliseconds([row.decode for row in good]),
        other_ms=_milliseconds(
            [row.total - row.retrieval - row.prefill - row.decode for row in good]
        ),
        prompt_tokens=_mean(_values(given, "prompt_tokens")),
        completion_tokens=_mean(_values(given, "completion_tokens")),
        llm_calls=_mean(np.array([row.llm_calls for row in good], dtype=np.float64)),
        answers_per_second=len(good) / busy if busy else None,
        peak_memory_bytes=max(
            (r.peak_bytes for r in good if r.peak_bytes is not None), default=None
        ),
        joules=_mean(np.array([row.joules for row in good if row.joules is not None])),
        routes=dict(Counter(row.route for row in good if row.route is not None)),
        settings=settings,
    )


def _values(answers: Sequence[QuestionArm], field: str) -> Floats:
    found = [getattr(answer, field) for answer in answers]
    return np.array([value for value in found if value is not None], dtype=np.float64)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _milliseconds(seconds: Sequence[float]) -> Milliseconds | None:
    if not seconds:
        return None
    values = np.array(seconds) * 1000
    p50, p95 = np.quantile(values, (0.5, 0.95)).tolist()
    return Milliseconds(mean=float(values.mean()), p50=p50, p95=p95)


def _abstention(entries: Sequence[QuestionEntry], name: str) -> AbstentionFigures | None:
    told = [
        (entry, answer)
        for entry in entries
        if (answer := entry.arms[name]).error is None and answer.confidence is not None
    ]
    found = abstention(
        [answer.confidence or 0.0 for _, answer in told],
        [answer.em == 1.0 for _, answer in told],
        [entry.answerable for entry, _ in told],
    )
    return None if found is None else AbstentionFigures.model_validate(dataclasses.asdict(found))


def _pairs(entries: Sequence[QuestionEntry], arms: Sequence[str], seed: int) -> list[PairFigures]:
    corrected: list[Pair] = []
    for metric in COMPARED:
        pairs = [
            compare_pair(
                a,
                b,
                metric,
                ours,
                theirs,
                margin=MARGIN if metric.endswith("_ms") else 0.0,
                seed=seed,
            )
            for a, b in combinations(arms, 2)
            for ours, theirs in [_both(entries, a, b, metric)]
            if len(ours)
        ]
        corrected += holm(pairs)
    return [_pair_figures(pair) for pair in corrected]


def _pair_figures(pair: Pair) -> PairFigures:
    values = dataclasses.asdict(pair) | {"significant": pair.significant}
    values.pop("beyond_margin")
    return PairFigures.model_validate(values)


def _both(entries: Sequence[QuestionEntry], a: str, b: str, metric: str) -> tuple[Floats, Floats]:
    """Values of the questions that both arms answered. *Shapes:* (N,), (N,)."""
    pairs = [
        (getattr(entry.arms[a], metric), getattr(entry.arms[b], metric))
        for entry in entries
        if entry.arms[a].error is None and entry.arms[b].error is None
    ]
    there = [(x, y) for x, y in pairs if x is not None and y is not None]
    both = np.array(there, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _remarks(entries: Sequence[QuestionEntry], figures: Mapping[str, ArmFigures]) -> list[str]:
    """What the figures themselves have to warn of."""
    remarks = [
        f"{name} failed on {arm.failed} of {len(entries)} questions; its n is {arm.n}"
        for name, arm in figures.items()
        if arm.failed
    ]
    synthetic = sum(entry.synthetic for entry in entries)
    if synthetic:
        remarks.append(
            f"{synthetic} of {len(entries)} questions are synthetic: written from the corpus, not "
            "asked by people"
        )
    return remarks
