"""The page in a real browser: loads silently, sorts, filters, fits on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_eval.render import write_report
from mlpmem_eval.schema import Report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page with all that the browser complained about or asked for."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str) -> None:  # noqa: ANN401
        self.noise: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.noise.append(message.text))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("dialog", lambda dialog: self.noise.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def shown(self) -> list[str]:
        script = "rows => rows.filter(r => r.offsetParent !== null).map(r => r.dataset.id)"
        ids: list[str] = self.page.eval_on_selector_all("#questions tbody tr", script)
        return ids


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(report, folder)
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_loads_in_silence_and_fits(browser: Any, file: Path, width: int, scheme: str) -> None:  # noqa: ANN401
    opened = Opened(browser, file, width, scheme)
    assert opened.noise == []
    assert opened.requests == [file.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    style = "getComputedStyle(document.body)"
    ground, ink = opened.page.evaluate(f"[{style}.backgroundColor, {style}.color]")
    assert (brightness(ground) > brightness(ink)) == (scheme == "light")
    assert abs(brightness(ground) - brightness(ink)) > 150
    for figure in ("scatter", "parts", "latency", "risk"):
        box = opened.page.locator(f"#chart-{figure} svg").bounding_box()
        assert box["width"] > 250
        assert box["x"] + box["width"] <= width


def brightness(colour: str) -> float:
    return sum(map(float, colour[4:-1].split(","))) / 3


def test_it_sorts_by_question_and_by_score(browser: Any, file: Path, report: Report) -> None:  # noqa: ANN401
    opened = Opened(browser, file, 1280, "light")
    assert opened.shown() == [entry.id for entry in report.questions]
    header = opened.page.locator("#questions th", has_text="rag")
    f1 = {
        entry.id: -1.0 if (value := entry.arms["rag"].f1) is None else value
        for entry in report.questions
    }
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert [f1[id_] for id_ in opened.shown()] == sorted(f1.values())
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert [f1[id_] for id_ in opened.shown()] == sorted(f1.values(), reverse=True)
    first = opened.page.locator("#questions th").first
    first.locator("button").click()
    texts = {entry.id: entry.question for entry in report.questions}
    shown = [texts[id_] for id_ in opened.shown()]
    assert shown == sorted(texts.values(), key=str.lower)
    assert header.get_attribute("aria-sort") is None


def test_it_filters_by_text_and_by_verdict(browser: Any, file: Path, report: Report) -> None:  # noqa: ANN401
    opened = Opened(browser, file, 1280, "light")
    opened.page.fill("#search", "QUESTION 4")
    assert opened.shown() == ["q4"]
    assert opened.page.inner_text("#count") == "1 of 8 questions"
    opened.page.fill("#search", "")
    opened.page.select_option("#show", "disagree")
    assert opened.shown() == [entry.id for entry in report.questions if entry.disagree]
    opened.page.select_option("#show", "unanswerable")
    assert opened.shown() == ["q6", "q7"]
    for label, expected in (("memory failed", ["q3"]), ("memory right", ["q0", "q1", "q2", "q4"])):
        opened.page.select_option("#show", label=label)
        assert opened.shown() == expected
    opened.page.select_option("#show", "all")
    assert len(opened.shown()) == 8
    assert opened.noise == []


def test_on_a_phone_each_question_is_a_card(browser: Any, file: Path) -> None:  # noqa: ANN401
    opened = Opened(browser, file, 390, "light")
    row = opened.page.locator("#questions tr[data-id='q1']")
    tops = [cell.bounding_box()["y"] for cell in row.locator("td").all()]
    assert tops == sorted(set(tops))  # one below the other
    opened.page.fill("#search", "question 4")
    assert opened.shown() == ["q4"]
