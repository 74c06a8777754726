"""The page and the Markdown: whole, safe, and with the report's own numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from lxml import html as lxml_html
from lxml.html import HtmlElement

from mlpmem_eval import wording
from mlpmem_eval.charts import LABEL_GAP, Scale, _spread_labels, nice, risk_coverage
from mlpmem_eval.render import html, markdown
from mlpmem_eval.report import build_report
from mlpmem_eval.rows import Row
from mlpmem_eval.schema import Report

from .fakes import EVIL, question


@pytest.fixture(scope="module")
def page(report: Report) -> HtmlElement:
    return lxml_html.document_fromstring(html(report))


def test_the_page_loads_nothing(report: Report, page: HtmlElement) -> None:
    for name in ("src", "href", "action", "srcset", "poster", "data"):
        for value in page.xpath(f"//@{name}"):
            assert value.startswith("data:")
    assert not page.xpath("//iframe | //object | //embed | //base | //form")
    style = "".join(page.xpath("//style/text()"))
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none'")


def test_texts_of_arms_and_people_stay_texts(report: Report, page: HtmlElement) -> None:
    assert len(page.xpath("//script")) == 1
    assert not page.xpath("//img")
    assert not page.xpath("//b")
    cells = page.xpath("//tr[@data-id='q1']/td[@data-arm='base']")
    assert EVIL in cells[0].text_content()
    assert any(EVIL in li.text_content() for li in page.xpath("//section[@class='warning']//li"))
    assert 'alert("1")' not in "".join(page.xpath("//script/text()"))


def test_the_tables_hold_every_arm_pair_and_question(report: Report, page: HtmlElement) -> None:
    assert page.xpath("//table[@id='accuracy']/tbody/tr/@data-arm") == list(report.arms)
    assert page.xpath("//table[@id='speed']/tbody/tr/@data-arm") == list(report.arms)
    assert len(page.xpath("//table[@id='pairs']/tbody/tr")) == len(report.pairs)
    assert page.xpath("//table[@id='questions']/tbody/tr/@data-id") == [
        entry.id for entry in report.questions
    ]
    (em,) = page.xpath("//table[@id='accuracy']//tr[@data-arm='memory']/td[@data-metric='em']")
    assert em.text_content().startswith("0.800")


def test_charts_carry_the_numbers_of_the_report(report: Report, page: HtmlElement) -> None:
    marks = page.xpath("//figure[@id='chart-scatter']//g[@data-arm]")
    assert [mark.get("data-arm") for mark in marks] == list(report.arms)
    for mark in marks:
        arm = report.arms[mark.get("data-arm")]
        assert arm.total_ms is not None
        assert float(mark.get("data-f1")) == arm.f1
        assert float(mark.get("data-p50")) == arm.total_ms.p50
        assert float(mark.get("data-p95")) == arm.total_ms.p95
    for bar in page.xpath("//figure[@id='chart-parts']//rect[@data-arm]"):
        figures = getattr(report.arms[bar.get("data-arm")], f"{bar.get('data-part')}_ms")
        assert float(bar.get("data-ms")) == figures.mean
    curves = page.xpath("//figure[@id='chart-risk']//path[@data-arm]")
    assert [curve.get("data-arm") for curve in curves] == ["memory"]
    memory = report.arms["memory"].abstention
    assert memory is not None
    assert float(curves[0].get("data-aurc")) == memory.aurc


def test_bars_are_as_long_as_their_times(report: Report, page: HtmlElement) -> None:
    bars = page.xpath("//figure[@id='chart-parts']//rect[@data-arm='rag']")
    widths = [float(bar.get("width")) for bar in bars]
    times = [float(bar.get("data-ms")) for bar in bars]
    per_ms = widths[1] / times[1]
    assert widths == pytest.approx([ms * per_ms for ms in times], abs=0.2)


def test_the_curve_of_risk_goes_through_its_points(report: Report) -> None:
    drawn = risk_coverage(report)
    assert drawn is not None
    (path,) = [e for e in ET.fromstring(drawn).iter() if e.tag.endswith("path")]
    points = [tuple(map(float, pair.split(","))) for pair in path.attrib["d"][1:].split("L")]
    memory = report.arms["memory"].abstention
    assert memory is not None
    x = Scale(0, 1, points[0][0] - (points[-1][0] - points[0][0]) / 6, points[-1][0])
    assert [p[0] for p in points] == pytest.approx([x(c) for c, _, _ in memory.curve], abs=0.2)
    assert len({p[1] for p in points[:4]}) == 1  # no risk at first
    assert points[-1][1] < points[0][1]  # upwards is less in SVG


def test_scales_by_hand() -> None:
    linear = Scale(0.0, 10.0, 100.0, 200.0)
    assert (linear(0), linear(5), linear(10), linear(99)) == (100, 150, 200, 200)
    assert linear.ticks() == [0, 2, 4, 6, 8, 10]
    log = Scale(10.0, 1000.0, 0.0, 100.0, log=True)
    assert log(100) == pytest.approx(50)
    assert log.ticks() == pytest.approx([10, 20, 50, 100, 200, 500, 1000])
    assert [nice(v) for v in (0.013, 0.2, 3, 70)] == pytest.approx([0.02, 0.2, 5, 100])


def test_labels_near_each_other_do_not_cover_one_another() -> None:
    heights = _spread_labels([(100.0, 50.0), (120.0, 52.0), (400.0, 51.0), (110.0, 90.0)])
    assert heights == [50.0, 50.0 + LABEL_GAP, 51.0, 90.0]


def test_moments_and_metrics_read_well(report: Report, page: HtmlElement) -> None:
    assert wording.moment("2026-01-31T13:00:59+01:00") == "2026-01-31 12:00 UTC"
    assert wording.moment(report.created) in page.xpath("string(//header)")
    metrics = page.xpath("//table[@id='pairs']//tr/td[3]/text()")
    assert {"EM", "F1", "answer, ms", "first token, ms", "contains"} <= set(metrics)


def test_markdown_tables_survive_what_is_in_them(report: Report) -> None:
    text = markdown(report)
    assert "<script" not in re.sub(r"\\<", "", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1
    assert len(tables) == 2
    assert "| memory | 5 (1 failed) | 0.800" in text


def test_a_report_without_any_answer_is_still_a_page() -> None:
    questions = [question(n) for n in range(3)]
    rows = [Row("broken", q.id, "k", error="RuntimeError: no") for q in questions]
    report = build_report(questions, rows, arm_settings={"broken": {}}, setups={}, settings={})
    page = lxml_html.document_fromstring(html(report))
    assert not page.xpath("//figure")
    assert "3 failed" in page.xpath("string(//table[@id='accuracy'])")
    assert "| broken | 0 (3 failed) |" in markdown(report)
