"""The report as data: `report.json`, version 2. docs/report.md explains every field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mlpmem_rag.errors import ConfigError

SCHEMA_VERSION = 2
REPORT = "report.json"

Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Milliseconds(_Part):
    """Of one part of the latency, over the answers of an arm."""

    mean: float
    p50: float
    p95: float


class AbstentionFigures(_Part):
    """What an arm's confidence is worth; `curve` is (coverage, risk, threshold)."""

    n: int
    auroc_right: float | None
    auroc_answerable: float | None
    aurc: float
    brier: float
    calibration_error: float
    curve: list[tuple[float, float, float]]


class ArmFigures(_Part):
    """One arm in figures; accuracy over the answerable questions it answered.

    `embedding_ms` is a part of `retrieval_ms`; the other parts add up to `total_ms`.
    """

    n: int
    answered: int
    failed: int
    em: float | None
    f1: float | None
    contains: float | None
    similarity: float | None
    judge: float | None
    judged: int
    intervals: dict[str, Interval]
    hit_rate: float | None
    abstention: AbstentionFigures | None
    total_ms: Milliseconds | None
    ttft_ms: Milliseconds | None
    retrieval_ms: Milliseconds | None
    embedding_ms: Milliseconds | None
    prefill_ms: Milliseconds | None
    decode_ms: Milliseconds | None
    other_ms: Milliseconds | None
    prompt_tokens: float | None
    completion_tokens: float | None
    llm_calls: float | None
    answers_per_second: float | None
    peak_memory_bytes: int | None
    joules: float | None
    routes: dict[str, int]
    settings: dict[str, Any]


class PairFigures(_Part):
    """One metric of two arms, paired by question; `difference` is the mean of a - b."""

    a: str
    b: str
    metric: str
    n: int
    difference: float
    interval: Interval
    a_only: int | None
    b_only: int | None
    test: Literal["mcnemar", "permutation"]
    p: float
    p_adjusted: float
    significant: bool


class ArmCost(_Part):
    """What an arm took before its first answer, and what it keeps on the disk."""

    setup_seconds: dict[str, float]
    disk_bytes: dict[str, int]


class BreakEven(_Part):
    """After how many questions an arm has won back its longer set-up; None: never."""

    arm: str
    against: str
    extra_setup_seconds: float
    saved_seconds_per_question: float
    questions: float | None


class Projection(_Part):
    """An arm's cost on a corpus `factor` times as large: computed, not measured."""

    arm: str
    factor: int
    setup_seconds: float
    disk_bytes: int
    total_ms: float


class Cost(_Part):
    """Set-up, disk, break-even and projection."""

    arms: dict[str, ArmCost]
    break_even: list[BreakEven]
    projections: list[Projection]
    assumptions: list[str]


class QuestionArm(_Part):
    """One arm's answer to one question; scores are None where they are not defined."""

    text: str
    error: str | None
    em: float | None
    f1: float | None
    contains: float | None
    similarity: float | None
    judge: float | None
    hit: bool | None
    confidence: float | None
    route: str | None
    documents: list[str] | None
    total_ms: float
    ttft_ms: float
    retrieval_ms: float
    prefill_ms: float
    decode_ms: float
    prompt_tokens: int | None
    completion_tokens: int | None


class QuestionEntry(_Part):
    """One question with every arm's answer; `disagree`: some arms are right and some wrong."""

    id: str
    question: str
    answers: list[str]
    doc_ids: list[str]
    answerable: bool
    synthetic: bool
    disagree: bool
    arms: dict[str, QuestionArm]


class Report(_Part):
    """All of a comparison."""

    schema_version: int
    created: str
    title: str
    warnings: list[str]
    settings: dict[str, Any]
    arms: dict[str, ArmFigures]
    pairs: list[PairFigures]
    cost: Cost
    questions: list[QuestionEntry]


def load_report(path: Path) -> Report:
    """Read a `report.json`, or the one in a folder.

    Raises:
        ConfigError: there is none, it is damaged, or of another version of the schema.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror or error}); give a report.json written by "
            "mlpmem-rag compare"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}); run the comparison again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{file} has schema_version {version!r}, this program reads {SCHEMA_VERSION}; render "
            "it with the version of mlpmem-rag that wrote it, or run the comparison again"
        )
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{file} is damaged: {place}: {first['msg']}") from error
