"""Tables in text, by hand: Markdown's, columns of white space, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_rag.corpus import Document
from mlpmem_rag.paragraphs import MAX_PARAGRAPH, paragraphs
from mlpmem_rag.readers import read_records
from mlpmem_rag.tables import attribute, table_at, told

HARBOURS = """\
| Harbour | Opened | Harbour master | *Depth* |
|---------|:------:|----------------|------:|
| **Brackwater** | 1887 | [Ines Maro](maro.md) | 12 metres |
| Port Selde | – | Tomas \\| Ruiz |

Text."""


def facts(text: str, topic: str = "") -> list[str]:
    table = table_at(text.splitlines(), 0)
    return [] if table is None else [text for text, _ in told(table, topic)]


def texts(document: Document) -> list[str]:
    return [paragraph.text for paragraph in paragraphs(document)]


def test_a_pipe_table_is_told_cell_by_cell() -> None:
    table = table_at(HARBOURS.splitlines(), 0)
    assert table is not None
    assert table.lines == 4
    assert facts(HARBOURS) == [
        "Brackwater was opened in 1887.",
        "The harbour master of Brackwater is Ines Maro.",
        "The depth of Brackwater is 12 metres.",
        "The harbour master of Port Selde is Tomas | Ruiz.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a | b\nc | d",
        "| a | b |\n| --- |\n| c | d |",
        "| a |\n|---|\n| b |",
        "One sentence.  Another one.\nIt goes on here, without any column.",
        "only one line   with two columns",
        "*   The mill was built in 1858.\n*   It burned in 1901.",
        "1.  First thing.\n2.  Second thing.",
        "pip install a     # one\npip install b     # two",
        "x   = 1\nyz  = 2",
        "",
    ],
    ids=[
        *("no rule", "another number", "one column", "prose", "one line", "items", "numbers"),
        *("comments", "assignments", "nothing"),
    ],
)
def test_what_is_no_table(text: str) -> None:
    assert table_at([*text.splitlines(), ""], 0) is None


def test_columns_of_white_space() -> None:
    text = """\
Harbour     Opened         Length
Brackwater  3 May 1887     40 m
Port Selde                 9 m"""
    assert facts(text) == [
        "Brackwater was opened on 3 May 1887.",
        "The length of Brackwater is 40 m.",
        "The length of Port Selde is 9 m.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Power  420 kW\nURL    a.org",
        "| Property | Value |\n|-|-|\n| Power | 420 kW |\n| URL | a.org |",
    ],
)
def test_two_columns_name_what_they_tell_of_the_topic(text: str) -> None:
    assert facts(text, "Engine") == [
        "The power of Engine is 420 kW.",
        "The URL of Engine is a.org.",
    ]
    assert facts(text)[0] == "The power is 420 kW."


def test_names_of_rows_below_an_empty_corner() -> None:
    assert facts("              2019    2020\nRevenue       4.1     5.2\nCosts         3.0") == [
        "The 2019 of Revenue is 4.1.",
        "The 2020 of Revenue is 5.2.",
        "The 2019 of Costs is 3.0.",
    ]


def test_a_cell_of_several_lines_is_one() -> None:
    text = "Harbour   Opened  Notes\nSelde     1887    Dug by hand\n                  and closed"
    assert facts(text)[1] == "The notes of Selde are Dug by hand and closed."


def test_what_is_about_nothing_is_told_as_it_stands() -> None:
    assert facts("| Harbour | Note |\n|---|---|\n| | All were dug by hand. |") == [
        "All were dug by hand."
    ]


def test_a_long_cell_is_text_of_its_own() -> None:
    long = "It was dug by hand. " * 9
    assert facts(f"| A | Story |\n|---|---|\n| Selde | {long}|") == [long.strip()]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("Founded", "1887", "Selde was founded in 1887."),
        ("Founded", "March 1887", "Selde was founded in March 1887."),
        ("Built", "May 3, 1887", "Selde was built on May 3, 1887."),
        ("Created", "by hand", "The created of Selde is by hand."),
        ("Speed", "1500", "The speed of Selde is 1500."),
        ("Founded", "2400", "The founded of Selde is 2400."),
        ("ISO code", "SE-1.", "The ISO code of Selde is SE-1."),
        ("Harbour masters", "two", "The harbour masters of Selde are two."),
        ("Class", "B", "The class of Selde is B."),
        ("Status", "open", "The status of Selde is open."),
        ("Physics", "hard", "The physics of Selde is hard."),
    ],
)
def test_what_is_said_of_a_thing(name: str, value: str, sentence: str) -> None:
    assert attribute(name, "Selde", value) == sentence


def test_tables_among_the_paragraphs_of_a_document() -> None:
    engine = "## Engine\n\n| Key | Value |\n|---|---|\n| Fuel | oil |\nEnd."
    text = f"# Coast\n\nThree harbours.\n{HARBOURS}\n\n{engine}"
    assert texts(Document("d", text, "Coast", "d.md")) == [
        "Three harbours.",
        *facts(HARBOURS),
        "Text.",
        "The fuel of Engine is oil.",
        "End.",
    ]


def test_key_value_lines_that_are_lined_up_are_no_table() -> None:
    text = "Power:   420 kW\nLength:  9 m\n-   Fuel: oil\n-   Crew: nine"
    assert texts(Document("d", text, "Engine", "d.md")) == [
        "The power of Engine is 420 kW.",
        "The length of Engine is 9 m.",
        "The fuel of Engine is oil.",
        "The crew of Engine is nine.",
    ]


def test_a_cell_as_long_as_a_book_is_cut() -> None:
    text = f"| A | Story |\n|---|---|\n| Selde | {'It was dug. ' * 3_000}|"
    pieces = texts(Document("d", text, None, "d.md"))
    assert max(map(len, pieces)) <= MAX_PARAGRAPH < sum(map(len, pieces))


def test_a_long_file_of_lines_is_read_once() -> None:
    text = "It began.  It ended, and nothing followed.\n" * 100_000
    assert len(texts(Document("d", text, None, "d.txt"))) == 100_000


def test_a_table_of_a_page_is_told(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("""<h1>Coast</h1><p>Three harbours.</p><table>
    <tr><th>Harbour</th><th>Opened</th><th>Harbour master</th></tr>
    <tr><td>Brackwater</td><td>1887</td><td>Ines Maro</td></tr></table>""")
    (record,), _ = read_records(page)
    found = texts(Document("d", record.text, record.title, "a.html"))
    assert found[-2:] == [
        "Brackwater was opened in 1887.",
        "The harbour master of Brackwater is Ines Maro.",
    ]
