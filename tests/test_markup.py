"""Markdown without its marks, and code that is hidden and shown again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_rag.markup import HIDDEN, MOST_HIDDEN, plain, readable


def lines(text: str) -> list[str]:
    """Those that are not empty, with their code."""
    found = plain(text)
    return [found.shown(line) for line in found.lines if line.strip()]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("See [the *guide*](https://a.example/b) first.", "See the guide first."),
        ("See [the guide][1], `x`.\n\n[1]: https://a.example", "See the guide, x."),
        ("# A\n\n![badge](b.svg) **Fast** and _small_.", "Fast and small."),
        ("# A\n\nIt is stable.[^1]\n\n", "It is stable."),
        ("`x`<br>and <b>more</b> <!-- no -->", "x and more "),
        ("# A\n\n> [!NOTE]\n> Do not\n> stop.", "Do not stop."),
        ("# A\n\n* one\n  line\n", "one line"),
        ("# A\n\n1. First\n", "First"),
        ("# A\n\nA\\_b &amp; c", "A_b & c"),
        ("# A\n\n\N{ROCKET} Fast", "Fast"),
        ("# A\n\nThe mass is 2 M\N{SUN}.", "The mass is 2 M\N{SUN}."),
        ("# A\n\n<details>\n<summary>More</summary>\n", "More"),
        ("Above\n---\n\n`x`", "# Above"),
    ],
)
def test_marks_go_and_words_stay(text: str, line: str) -> None:
    assert line.rstrip() in [found.rstrip() for found in lines(text)]


def test_blocks_of_code_go_but_for_the_line_that_a_sentence_ends_with() -> None:
    text = (
        "# A\n\nTo upgrade, run:\n\n```sh\n$ tool up --yes\n```\n\nThen:\n\n```\na = 1\nb = 2\n```"
    )
    assert lines(text) == ["# A", "To upgrade, run tool up --yes.", "Then:"]
    assert lines("# A\n\nRun this.\n\n    tool up\n") == ["# A", "Run this."]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# A\n\nReplace <name> with `__init__` and __main__, <b>now</b>.",
         ["# A", "Replace <name> with __init__ and __main__, now."]),
        ("    It was dark.\n\n    He said `hello` and left.\n\nThe end.",
         ["It was dark.", "He said hello and left.", "The end."]),
        ("Use `foo' and `bar' to do f[0](x).", ["Use `foo' and `bar' to do f[0](x)."]),
        ("---\ntitle: A\nsidebar: 2\n---\n# B\n\nIt is.", ["# B", "It is."]),
        ("# A\n\nIt is long.\n---\nIt goes on.", ["# A", "It is long.", "It goes on."]),
        ("# A\n\n# ![logo](x.png)\n\nIt is.", ["# A", "It is."]),
        ("# A\n\n<script>\nlet a = 1\n</script>\n\nIt is.", ["# A", "It is."]),
        ("# A\n\nName: Foo\nKind: one\ntwo", ["# A", "Name: Foo", "Kind: one", "two"]),
        ("# A\n\n" + "".join(f"{'  ' * n}- n{n}\n" for n in range(12)),
         ["# A", *(f"n{n}" for n in range(12))]),
        ("# A\r\n\r\nOne\fpage.\r\n", ["# A", "One page."]),
    ],
    ids=["tags", "indented", "quotes", "front", "rule", "logo", "script", "pairs", "deep", "ends"],
)  # fmt: skip
def test_nothing_that_is_said_is_lost(text: str, kept: list[str]) -> None:
    assert lines(text) == kept


@pytest.mark.parametrize(
    ("table", "kept"),
    [
        ("| a | b |\n|-|-|\n| 1 | 2 |\n\n| c | d |\n|-|-|\n| 3 | 4 |\n\nx | y",
         ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| c | d |", "| --- | --- |", "| 3 | 4 |",
          "x | y"]),
        ("| Setting | |\n|-|-|\n| Depth | 9 m |",
         ["| Setting |  |", "| --- | --- |", "| Depth | 9 m |"]),
        ("| K | V |\n|-|-|\n| **Net** | |\n| Port | 80 |",
         ["| K | V |", "| --- | --- |", "| Net |  |", "| Port | 80 |"]),
        ("| a |\n|-|\n| 1 |", ["a", "1"]),
        ("| a | b |\n|-|-|\n", ["| a | b |", "| --- | --- |"]),
    ],
    ids=["two", "unnamed", "group", "narrow", "empty"],
)  # fmt: skip
def test_tables_of_any_shape(table: str, kept: list[str]) -> None:
    assert lines(f"# A\n\n{table}")[1:] == kept
    blank = plain(f"# A\n\n{table}\n\nAfter.").lines
    assert blank[blank.index("After.") - 1] == ""


def test_a_table_of_contents_goes() -> None:
    assert lines("# A\n\n- [One](#one)\n- [Two](#two)\n- [B](b.md)\n") == ["# A", "B"]


def test_tables_stay_with_their_bars() -> None:
    table = "| Option | What |\n|:--|--|\n| `-a \\| -b` | **All** |\nAfter it."
    assert lines(f"# A\n\n{table}") == [
        "# A",
        "| Option | What |",
        "| --- | --- |",
        "| -a | -b | All |",  # the bar in it is hidden
        "After it.",
    ]


def test_columns_that_are_lined_up_become_a_table() -> None:
    rows = "Option   Meaning  Default\n`--all`  all      no\n`-q`     quiet    no"
    assert lines(f"# A\n\n{rows}\n")[1:] == [
        "| Option | Meaning | Default |",
        "| --- | --- | --- |",
        "| --all | all | no |",
        "| -q | quiet | no |",
    ]


def test_text_without_marks_is_left_as_it_is() -> None:
    text = "1. one\n    * two\n  a_b_c <b> &amp; 2 * 3 * 4\n\nx:\n  y  z"
    assert plain(text).lines == tuple(text.splitlines())
    assert plain(text).code == ()


def test_code_is_hidden_as_one_word_and_shown_again() -> None:
    found = plain("Run `pip install x`, not `pip`; `pip install x` is enough.", "The pip manual")
    assert found.code == ("pip install x",)  # the document is about `pip`
    (line,) = filter(None, found.lines)
    hidden = HIDDEN.findall(line)
    assert len(hidden) == 2
    assert hidden[0] == hidden[1]
    assert found.shown(line.upper()) == "RUN pip install x, NOT PIP; pip install x IS ENOUGH."


def test_more_code_than_there_are_names_for_stays_in_sight() -> None:
    text = " ".join(f"`x{number}`" for number in range(MOST_HIDDEN + 2))
    (line,) = filter(None, plain(text).lines)
    assert line.endswith(f" x{MOST_HIDDEN} x{MOST_HIDDEN + 1}")
    assert plain(text).shown(line) == text.replace("`", "")


def test_a_marked_text_is_readable() -> None:
    table = "| a | b |\n|-|-|\n| 1 | `2` |\n"
    text = f"# The *tool*\n\nRun `tool a`, see [b](b.md).\n\n```\nx = 1\n```\n\n{table}"
    assert readable(text).split("\n") == [
        *("The tool", "", "Run tool a, see b.", ""),
        *("| a | b |", "| --- | --- |", "| 1 | 2 |"),
    ]
    assert readable(" as it is\n * 1 * 2") == " as it is\n * 1 * 2"


def test_no_lemmatizer_takes_letters_off_a_name() -> None:
    text = " ".join(f"`x{number}`" for number in range(MOST_HIDDEN))
    names = "".join(plain(text).lines).split()
    assert len({*names}) == MOST_HIDDEN
    assert not [n for n in names if n.endswith(("s", "ed", "ing", "er", "est", "d", "g", "t", "r"))]


@given(st.text(alphabet="# `*_[]()|\n-:<>!ab1\\~", max_size=60))
def test_any_text_has_lines(text: str) -> None:
    found = plain(text)
    assert not any("\n" in line for line in found.lines)
    assert all(found.shown(line) is not None for line in found.lines)
