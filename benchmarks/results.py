"""Result files: one a machine, one entry a suite; a run replaces the entries it has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.figures import Ceilings, Figure, Goal, Needs
from benchmarks.rounds import Ratio
from mlpmem_rag.storage import write_json

RESULTS = Path(__file__).parent / "results"


def merge(path: Path, about: Mapping[str, Any], suites: Mapping[str, Any]) -> None:
    """Write what was measured beside what the file holds of other suites."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "suites": {**old.get("suites", {}), **suites}})


def read(folder: Path) -> list[dict[str, Any]]:
    """All machines' results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def entry(
    figures: Sequence[Figure], ceilings: Ceilings, took: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """A suite's place in the file."""
    return {
        **about,
        "seconds": round(took, 1),
        "ceilings": asdict(ceilings),
        "figures": [_stored(figure, ceilings) for figure in figures],
    }


def _stored(figure: Figure, ceilings: Ceilings) -> dict[str, Any]:
    derived: dict[str, Any] = {"reached": figure.reached}
    if (fraction := figure.fraction(ceilings)) is not None and figure.needs is not None:
        derived |= {"of_ceiling": fraction, "bound": figure.needs.bound(ceilings)}
    return {**asdict(figure), **derived}


def figures_of(suite: Mapping[str, Any]) -> list[Figure]:
    """Back from the file."""
    return [
        Figure(
            **{n: v for n, v in stored.items() if n not in ("reached", "of_ceiling", "bound")}
            | {
                "ratio": Ratio(**stored["ratio"]) if stored["ratio"] else None,
                "goal": Goal(**stored["goal"]),
                "needs": Needs(**stored["needs"]) if stored["needs"] else None,
            }
        )
        for stored in suite["figures"]
    ]


def table(name: str, figures: Sequence[Figure], ceilings: Ceilings) -> Table:
    """For people at a terminal."""
    shown = Table("what", "ours", "against", "", "ratio", "goal", "of the ceiling", title=name)
    for figure in figures:
        shown.add_row(*cells(figure, ceilings), style="red" if figure.reached is False else None)
    return shown


def cells(figure: Figure, ceilings: Ceilings) -> tuple[str, ...]:
    """A row of a table."""
    ratio, fraction = figure.ratio, figure.fraction(ceilings)
    return (
        figure.what,
        f"{number(figure.ours)} {figure.unit}",
        figure.against,
        "" if figure.other is None else f"{number(figure.other)} {figure.unit}",
        "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        str(figure.goal),
        "" if fraction is None else f"{100 * fraction:.0f} %",
    )


def number(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
