"""Charts of a report as SVG, without any library that a page would have to load.

Colours come from the page's style sheet (classes `s0`, `s1`, … by arm), so that they follow its
light or dark theme. Marks carry their numbers as `data-` attributes and as tooltips.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlpmem_eval.schema import Report

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44
LABEL_GAP, LABEL_WIDTH = 15, 110
PARTS = ("retrieval", "prefill", "decode", "other")
CURVE_POINTS = 200

P = TypeVar("P")


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside are put to the nearer end."""
        value = min(max(value, self.low), self.high)
        low, high = self._position(self.low), self._position(self.high)
        share = (self._position(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Round values inside the scale: about five, or 1, 2, 5 of each power of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = self.high / self.low > 200
            all_ticks = [m * 10.0**p for p in powers for m in ((1,) if wide else (1, 2, 5))]
        else:
            step = nice((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            all_ticks = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [t for t in all_ticks if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]


def nice(value: float) -> float:
    """The next 1, 2 or 5 of a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale with room around the values, which are above zero or left out."""
    there = [value for value in values if value > 0] or [1.0]
    return Scale(min(there) / 1.5, max(there) * 1.5, start, end, log=True)


def accuracy_against_latency(report: Report) -> str | None:
    """F1 (with its interval) over the median time of an answer (to its 95th percentile)."""
    points = [
        (number, name, arm.f1, arm.intervals["f1"], arm.total_ms)
        for number, (name, arm) in enumerate(report.arms.items())
        if arm.f1 is not None and arm.total_ms is not None
    ]
    if not points:
        return None
    spread = [ms for *_, total in points for ms in (total.p50, total.p95)]
    x = log_scale(spread, LEFT, WIDTH - RIGHT)
    top = min(1.0, nice(max(interval[1] for *_, interval, _ in points) or 1.0))
    y = Scale(0.0, top, HEIGHT - BOTTOM, TOP)
    svg = _canvas("F1 over the time of an answer")
    _axes(svg, x, y, "time of an answer, ms (median; line to the 95th percentile)", "F1")
    labels = _spread_labels([(x(total.p50), y(f1)) for _, _, f1, _, total in points])
    for (number, name, f1, interval, total), label_y in zip(points, labels, strict=True):
        numbers = {"arm": name, "f1": f1, "p50": total.p50, "p95": total.p95}
        group = ET.SubElement(svg, "g", _data(numbers) | {"class": f"mark s{number % 8}"})
        low, high = interval
        tooltip = (
            f"{name}: F1 {f1:.3f} ({low:.3f}–{high:.3f}), median {total.p50:.0f} ms, "
            f"95 % within {total.p95:.0f} ms"
        )
        ET.SubElement(group, "title").text = tooltip
        _line(group, x(total.p50), y(low), x(total.p50), y(high), "whisker")
        _line(group, x(total.p50), y(f1), x(total.p95), y(f1), "whisker")
        ET.SubElement(group, "circle", _numbers(cx=x(total.p50), cy=y(f1), r=5))
        right = x(total.p50) > WIDTH * 0.7
        place = x(total.p50) + (-9 if right else 9)
        _text(group, place, label_y - 6, name, "end" if right else "start", "label")
    return _written(svg)


def latency_parts(report: Report) -> str | None:
    """Mean time of an answer, stacked by what it went into."""
    arms = [(name, arm) for name, arm in report.arms.items() if arm.total_ms is not None]
    if not arms:
        return None
    longest = max(arm.total_ms.mean for _, arm in arms if arm.total_ms) or 1.0
    row = 34
    height = TOP + row * len(arms) + BOTTOM + 18
    x = Scale(0.0, longest * 1.02, 110, WIDTH - RIGHT)
    svg = _canvas("Mean time of an answer by its parts", height)
    _ticks_below(svg, x, height - BOTTOM - 18, "mean, ms")
    for number, (name, arm) in enumerate(arms):
        top = TOP + number * row
        _text(svg, 104, top + 17, name, "end", "label")
        before = 0.0
        for part in PARTS:
            figures = getattr(arm, f"{part}_ms")
            value = max(0.0, figures.mean)
            numbers = {"arm": name, "part": part, "ms": figures.mean}
            box = _numbers(x=x(before), y=top + 4, width=x(before + value) - x(before), height=20)
            rect = ET.SubElement(svg, "rect", _data(numbers) | box | {"class": f"part {part}"})
            ET.SubElement(rect, "title").text = f"{name}, {part}: {figures.mean:.1f} ms"
            before += value
    for number, part in enumerate(PARTS):
        place = 110 + number * 100
        box = _numbers(x=place, y=height - 16, width=10, height=10)
        ET.SubElement(svg, "rect", box | {"class": f"part {part}"})
        _text(svg, place + 15, height - 7, part, "start", "tick")
    return _written(svg)


def latency_distribution(report: Report) -> str | None:
    """Share of answers given within a time: one rising curve an arm."""
    times = {
        name: sorted(
            entry.arms[name].total_ms
            for entry in report.questions
            if entry.arms[name].error is None
        )
        for name in report.arms
    }
    everything = [ms for values in times.values() for ms in values]
    if not everything:
        return None
    x = log_scale(everything, LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    svg = _canvas("Share of answers given within a time")
    _axes(svg, x, y, "time of an answer, ms", "share of answers")
    for number, (name, values) in enumerate(times.items()):
        if values:
            curve = [((n + 1) / len(values), ms) for n, ms in enumerate(values)]
            points = [(x(ms), y(share)) for share, ms in _thinned(curve)]
            _curve(svg, number, name, [(points[0][0], y(0.0)), *points], {"n": len(values)})
    _legend(svg, [name for name in times if times[name]], list(report.arms))
    return _written(svg)


def risk_coverage(report: Report) -> str | None:
    """Share of wrong answers among the surest ones, for arms that tell a confidence."""
    curves = {
        name: arm.abstention.curve
        for name, arm in report.arms.items()
        if arm.abstention is not None and arm.abstention.curve
    }
    if not curves:
        return None
    x = Scale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    svg = _canvas("Risk over coverage")
    _axes(svg, x, y, "coverage: share of questions answered", "risk: share of wrong answers")
    order = list(report.arms)
    for name, curve in curves.items():
        points = [(x(coverage), y(risk)) for coverage, risk, _ in _thinned(curve)]
        figures = report.arms[name].abstention
        _curve(svg, order.index(name), name, points, {"aurc": figures.aurc if figures else None})
    _legend(svg, list(curves), order)
    return _written(svg)


def _thinned(points: Sequence[P]) -> list[P]:
    """At most so many of the points, the last one included."""
    step = max(1, -(-len(points) // CURVE_POINTS))
    return [*points[:-1:step], points[-1]]


def _spread_labels(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights for labels so that none covers another near it."""
    order = sorted(range(len(places)), key=lambda n: places[n][1])
    out = [height for _, height in places]
    for rank, number in enumerate(order):
        for above in order[:rank]:
            if abs(places[above][0] - places[number][0]) < LABEL_WIDTH:
                out[number] = max(out[number], out[above] + LABEL_GAP)
    return out


def _canvas(title: str, height: int = HEIGHT) -> ET.Element:
    box = {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-label": title}
    return ET.Element("svg", box)


def _axes(svg: ET.Element, x: Scale, y: Scale, x_name: str, y_name: str) -> None:
    for tick in y.ticks():
        _line(svg, LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        _text(svg, LEFT - 6, y(tick) + 4, f"{tick:g}", "end", "tick")
    _ticks_below(svg, x, HEIGHT - BOTTOM, x_name)
    turned = {"transform": f"rotate(-90 12 {(HEIGHT - BOTTOM + TOP) / 2:.0f})"}
    _text(svg, 12, (HEIGHT - BOTTOM + TOP) / 2, y_name, "middle", "axis", turned)


def _ticks_below(svg: ET.Element, x: Scale, bottom: float, name: str) -> None:
    _line(svg, x.start, bottom, x.end, bottom, "axis-line")
    for tick in x.ticks():
        _line(svg, x(tick), bottom, x(tick), bottom + 4, "axis-line")
        _text(svg, x(tick), bottom + 17, f"{tick:,.6g}", "middle", "tick")
    _text(svg, (x.start + x.end) / 2, bottom + 34, name, "middle", "axis")


def _curve(
    svg: ET.Element,
    number: int,
    name: str,
    points: Sequence[tuple[float, float]],
    numbers: dict[str, float | None],
) -> None:
    path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points)
    attributes = _data({"arm": name, **numbers}) | {"class": f"curve s{number % 8}", "d": path}
    ET.SubElement(ET.SubElement(svg, "path", attributes), "title").text = name


def _legend(svg: ET.Element, names: Sequence[str], order: Sequence[str]) -> None:
    for line, name in enumerate(names):
        top = TOP + 8 + line * LABEL_GAP
        box = _numbers(x=LEFT + 10, y=top - 5, width=14, height=4)
        ET.SubElement(svg, "rect", box | {"class": f"mark s{order.index(name) % 8}"})
        _text(svg, LEFT + 30, top, name, "start", "label")


def _line(parent: ET.Element, x1: float, y1: float, x2: float, y2: float, class_name: str) -> None:
    ET.SubElement(parent, "line", _numbers(x1=x1, y1=y1, x2=x2, y2=y2) | {"class": class_name})


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    text: str,
    anchor: str,
    class_name: str,
    more: dict[str, str] | None = None,
) -> None:
    attributes = _numbers(x=x, y=y) | {"text-anchor": anchor, "class": class_name} | (more or {})
    ET.SubElement(parent, "text", attributes).text = text


def _numbers(**values: float) -> dict[str, str]:
    return {name: f"{value:.1f}".removesuffix(".0") for name, value in values.items()}


def _data(values: dict[str, Any]) -> dict[str, str]:
    """Numbers for whoever reads the page by program: unrounded."""
    return {f"data-{name}": "" if v is None else str(v) for name, v in values.items()}


def _written(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode")
