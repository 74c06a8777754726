"""Figures as people read them, the same in the page, in Markdown and in the terminal."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from mlpmem_eval.schema import BreakEven, Milliseconds, QuestionArm, Report

NOTHING = "–"


def decimals(value: float | None) -> str:
    """`0.4567` -> `0.457`."""
    return NOTHING if value is None else f"{value:.3f}"


def significant(value: float | None) -> str:
    """Three significant digits; small values as `<0.001`."""
    if value is None:
        return NOTHING
    return "<0.001" if 0 < value < 0.001 else f"{value:.3g}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    if value == 0:
        return "0"
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+,.0f}"


def whole(value: float | None) -> str:
    """Without decimals."""
    return NOTHING if value is None else f"{value:,.0f}"


def times(value: Milliseconds | None) -> str:
    """`p50 / p95`."""
    return NOTHING if value is None else f"{value.p50:,.0f} / {value.p95:,.0f}"


def between(interval: tuple[float, float] | None) -> str:
    """An interval in brackets, to put behind a value."""
    return "" if interval is None else f" ({interval[0]:.3f}–{interval[1]:.3f})"


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(number_of_bytes: float | None) -> str:
    """`1234567` -> `1.23 MB`."""
    if number_of_bytes is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if number_of_bytes < 1000:
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.3g} TB"


METRIC_NAMES = {
    "em": "EM",
    "f1": "F1",
    "total_ms": "answer, ms",
    "ttft_ms": "first token, ms",
}


def metric_name(metric: str) -> str:
    """A metric as the tables call it."""
    return METRIC_NAMES.get(metric, metric)


def moment(created: str) -> str:
    """`2026-01-31T12:00:59+00:00` -> `2026-01-31 12:00 UTC`."""
    return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def verdict(answer: QuestionArm) -> str:
    """`failed`, `right`, `wrong`, or `unscored` where there is nothing to compare with."""
    if answer.error is not None:
        return "failed"
    return "unscored" if answer.em is None else "right" if answer.em else "wrong"


def escaped_markdown(text: str) -> str:
    """Plain text that Markdown and HTML leave as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def break_even_line(line: BreakEven) -> str:
    """When a training pays, in a sentence."""
    if line.questions is None:
        return (
            f"{line.arm} never wins back its set-up against {line.against}: it takes "
            f"{-line.saved_seconds_per_question * 1000:,.0f} ms more a question."
        )
    if line.questions == 0:
        return f"{line.arm} needs no longer set-up than {line.against}."
    return (
        f"{line.arm} wins back its longer set-up against {line.against} "
        f"({duration(line.extra_setup_seconds)}) after {line.questions:,.0f} questions, at "
        f"{line.saved_seconds_per_question * 1000:,.0f} ms saved on each."
    )


def summary(report: Report) -> list[str]:
    """Each memory arm against each retrieving arm: as right, and how much faster?"""
    retrieving = [n for n, arm in report.arms.items() if arm.retrieval_ms and arm.retrieval_ms.p50]
    lines = []
    for pair in report.pairs:
        names = {pair.a, pair.b}
        if pair.metric != "f1" or "memory" not in names or not names & set(retrieving):
            continue
        other = (names - {"memory"}).pop()
        sign = 1 if pair.a == "memory" else -1
        verb = "differs" if pair.significant else "does not differ significantly"
        low, high = sorted(sign * end for end in pair.interval)
        lines.append(
            f"memory against {other}: F1 {verb} ({signed(sign * pair.difference)}, 95 % "
            f"{signed(low)} to {signed(high)}); "
            f"{_speed(report, 'memory', other)}."
        )
    return lines


def _speed(report: Report, arm: str, other: str) -> str:
    mine, theirs = report.arms[arm].total_ms, report.arms[other].total_ms
    if mine is None or theirs is None or not mine.p50 or not theirs.p50:
        return "times cannot be compared"
    ratio = theirs.p50 / mine.p50
    told = f"{ratio:.2g}× as fast" if ratio >= 1 else f"{1 / ratio:.2g}× as slow"
    return f"median answer {told} ({mine.p50:,.0f} ms, {theirs.p50:,.0f} ms)"
