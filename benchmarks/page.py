"""The tables of docs/performance.md, filled from the result files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import Ceilings, best_of
from benchmarks.results import RESULTS, cells, figures_of, number, read

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEAD = ("what", "ours", "against", "", "ratio", "goal", "of the ceiling")


def fill(page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Replace what stands between the marks by the tables of all machines."""
    text = page.read_text(encoding="utf-8")
    found = read(folder)
    tables = "\n\n".join(section(results) for results in found) or "Not yet measured."
    if not any(results["machine"]["device"].startswith("cuda") for results in found):
        tables += "\n\n### GPU\n\nNot yet measured."
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert marked.search(text), f"{page} has lost its marks {BEGIN} and {END}"
    page.write_text(marked.sub(lambda _: f"{BEGIN}\n{tables}\n{END}", text), encoding="utf-8")


def section(results: Mapping[str, Any]) -> str:
    """One machine: the most it was measured to do, and its suites in one table."""
    about, suites = results["machine"], results["suites"].values()
    ceilings = best_of([Ceilings(**suite["ceilings"]) for suite in suites])
    gpu = about["device"].startswith("cuda")
    cpu = f"{about['processor']} with {about['instructions']}, {about['torch_threads']} threads"
    name = about["gpu"] if gpu else cpu
    rows = []
    for suite in suites:
        rows += [_bold(cells(f, ceilings), f.reached) for f in figures_of(suite)]
    days = sorted({suite["measured"][:10] for suite in suites})
    measured = f"Measured on {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    lines = [f"### {name}", "", f"{limits(ceilings)} {measured}", ""]
    return "\n".join([*lines, line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)])


def limits(ceilings: Ceilings) -> str:
    """The measured ceilings in words."""
    products = ", ".join(f"{number(r / 1e9)} GFLOP/s in {n}" for n, r in ceilings.flops.items())
    return (
        f"Ceilings: matrix products {products}; main memory "
        f"{number(ceilings.bytes_per_second / 1e9)} GB/s; disk "
        f"{number(ceilings.disk_bytes_per_second / 1e9)} GB/s."
    )


def line(row: Any) -> str:  # noqa: ANN401
    """Of a Markdown table."""
    return f"| {' | '.join(row)} |"


def _bold(row: tuple[str, ...], reached: bool | None) -> tuple[str, ...]:
    """A ratio that does not reach its goal says so."""
    return row if reached is not False else (*row[:5], f"{row[5]} (not reached)", *row[6:])
