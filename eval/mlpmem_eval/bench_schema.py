"""The paper's protocols as data: `bench.json`, version 1. docs/report.md explains every field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mlpmem_eval.wording import escaped_markdown

BENCH_VERSION = 1
BENCH = "bench.json"
BENCH_TABLE = "bench.md"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(_Part):
    """One figure beside the paper's; `interval` is the 95 % one, over `n` of what `unit` counts."""

    what: str
    value: float
    interval: tuple[float, float] | None = None
    n: int | None = None
    published: float | None = None


class Section(_Part):
    """One protocol: what was measured, in which unit, and what differs from the paper."""

    name: str
    title: str
    unit: str
    lines: list[Line]
    settings: dict[str, Any]
    differs: list[str]


class Bench(_Part):
    """All that was measured, and what was not, with the reason."""

    schema_version: int
    created: str
    settings: dict[str, Any]
    warnings: list[str]
    sections: list[Section]
    not_run: list[str]


def markdown(bench: Bench) -> str:
    """Tables for reading and for a pull request."""
    parts = [f"## The paper's protocols, {bench.created}"]
    for section in bench.sections:
        rows = [
            f"| {line.what} | {number(line.value)}{between(line)} | "
            f"{'–' if line.n is None else f'{line.n:,}'} | {number(line.published)} |"
            for line in section.lines
        ]
        head = f"| {section.unit} | here (95 %) | n | paper |\n|---|---|---|---|"
        notes = [f"- {note}" for note in section.differs]
        parts.append("\n".join([f"### {section.title}", "", head, *rows, "", *notes]))
    if bench.not_run:
        parts.append("\n".join(["### Not run", "", *[f"- {reason}" for reason in bench.not_run]]))
    if bench.warnings:
        parts.append(
            "\n".join(
                ["Note:", "", *[f"- {escaped_markdown(warning)}" for warning in bench.warnings]]
            )
        )
    return "\n\n".join(parts) + "\n"


def number(value: float | None) -> str:
    """Four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def between(line: Line) -> str:
    """The interval in brackets, to put behind the value."""
    if line.interval is None:
        return ""
    return f" ({number(line.interval[0])}–{number(line.interval[1])})"
