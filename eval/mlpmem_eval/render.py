"""A report as a self-contained page, as Markdown, and on the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlpmem_eval import charts, wording
from mlpmem_eval.schema import REPORT, Report
from mlpmem_rag.storage import replace_file

PAGE = "report.html"
MARKDOWN = "report.md"
CHARTS: tuple[tuple[str, str, Callable[[Report], str | None]], ...] = (
    ("chart-scatter", "Accuracy against latency", charts.accuracy_against_latency),
    ("chart-parts", "Where the time goes", charts.latency_parts),
    ("chart-latency", "Latency, all answers", charts.latency_distribution),
    ("chart-risk", "Right answers by confidence", charts.risk_coverage),
)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `report.html` and `report.md`, each in one step; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        REPORT: report.model_dump_json(indent=1) + "\n",
        PAGE: html(report),
        MARKDOWN: markdown(report),
    }
    for name, content in contents.items():
        _write(folder / name, content)
    return [folder / name for name in contents]


def html(report: Report) -> str:
    """One page that needs nothing else: style, script and charts are inside."""
    template = _environment(escaped=True).get_template("report.html.j2")
    return template.render(
        **_shown(report),
        css=Markup(_asset("report.css")),
        js=Markup(_asset("report.js")),
        charts=[
            (id_, caption, Markup(drawn))
            for id_, caption, draw in CHARTS
            if (drawn := draw(report)) is not None
        ],
        arm_numbers={name: number for number, name in enumerate(report.arms)},
        best={m: _best(report, m) for m in ("em", "f1", "contains", "similarity")},
        has_hits=any(arm.hit_rate is not None for arm in report.arms.values()),
        has_confidence=any(arm.abstention is not None for arm in report.arms.values()),
        has_joules=any(arm.joules is not None for arm in report.arms.values()),
        settings_text=json.dumps(
            {**report.settings, "arms": {n: a.settings for n, a in report.arms.items()}},
            indent=2,
            ensure_ascii=False,
        ),
    )


def markdown(report: Report) -> str:
    """Tables for a pull request."""
    text = _environment(escaped=False).get_template("report.md.j2").render(**_shown(report))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _shown(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "summary": wording.summary(report),
        "has_judge": any(arm.judged for arm in report.arms.values()),
        "break_even_lines": [wording.break_even_line(b) for b in report.cost.break_even],
    }


def _environment(*, escaped: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("mlpmem_eval", "templates"),
        autoescape=escaped,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters |= {
        "decimals": wording.decimals,
        "significant": wording.significant,
        "signed": wording.signed,
        "whole": wording.whole,
        "times": wording.times,
        "duration": wording.duration,
        "size": wording.size,
        "between": wording.between,
        "verdict": wording.verdict,
        "moment": wording.moment,
        "metric_name": wording.metric_name,
        "md": wording.escaped_markdown,
    }
    return environment


def _best(report: Report, metric: str) -> str | None:
    values = {n: v for n, a in report.arms.items() if (v := getattr(a, metric)) is not None}
    return max(values, key=lambda name: values[name], default=None)


def _asset(name: str) -> str:
    return files("mlpmem_eval").joinpath("templates", name).read_text(encoding="utf-8")


def _write(path: Path, content: str) -> None:
    replace_file(path, lambda beside: beside.write_text(content, encoding="utf-8"))
