"""Tables in text, told as sentences: Markdown's pipe tables, and columns that white space lines up.

The first cell of a row is what the row is about, the first row says what of it is told:
`| Harbour | Depth |` over `| Selde | 9 metres |` is "The depth of Selde is 9 metres."
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

COLUMN = re.compile(r"^\s?\S|(?<=\s\s)\S")
"""The beginning of a cell, where two spaces are before each but the first."""
PIPE = re.compile(r"(?<!\\)\|")
RULE = re.compile(r":?-+:?")
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
PLURAL = re.compile(r"(?<!news)(?<!series)(?<!species)(?<!lens)(?<!ics)(?<![aiosu]s)(?<=[a-z]s)$")
"""A noun in the plural, by its last letters: not `address`, `bias` or `status`."""
DONE = re.compile(
    r"(?i:founded|established|formed|incorporated|opened|closed|dissolved|abolished|built|constructed"
    r"|completed|created|designed|invented|introduced|launched|released|published|issued|signed"
    r"|adopted|born|made|started|ended)"
)
DESCRIPTION = re.compile(
    r"(?i:descriptions?|explanations?|meanings?|purpose|use|usage|function|details|comments?"
    r"|what (?:it|this|that) (?:is|does|means)|what is .{2,30}|does|means)"
)
DATE = re.compile(
    r"(?P<day>\d{1,2}(?:st|nd|rd|th)? )?(?:[A-Z][a-z]+ )?(?P<us>\d{1,2}, )?(?:1\d{3}|20\d\d)"
)
LISTED = re.compile(r"[-*+•·]|\w{1,3}[.)]")
"""The mark of a list's item."""
CODE = ("#", "//", "=", "--", "<-", "->")
"""What a cell does not begin with, and a comment or an assignment that is lined up does."""
NOTHING = ("-", "–", "—", "n/a", "none")
VALUE = ("value", "values", "")
MAX_CELL = 160
"""Characters of what is told in a sentence; a longer cell is text of its own."""


@dataclass(frozen=True)
class Table:
    """Cells by row.

    Attributes:
        header: names of the columns; None: two columns, the first of which names what is told in
            the second.
        rows: below it, as many cells each.
        lines: that it takes in the text.
    """

    header: tuple[str, ...] | None
    rows: tuple[tuple[str, ...], ...]
    lines: int


def table_at(lines: Sequence[str], start: int) -> Table | None:
    """The table that begins with this line; None: none does."""
    return _piped(lines, start) or _aligned(lines, start)


def told(table: Table, topic: str) -> Iterator[tuple[str, str]]:
    """What a table says, cell by cell, each with what it describes without naming it.

    `topic` is what the table stands under, or nothing.
    """
    for about, *cells in table.rows:
        names = (about,) if table.header is None else table.header[1:]
        of = topic if table.header is None else about
        for name, cell in zip(names, cells, strict=True):
            if not cell or cell.lower() in NOTHING:
                continue
            if DESCRIPTION.fullmatch(name) and len(of) <= MAX_CELL:
                yield cell, of
            elif not name or max(len(cell), len(of)) > MAX_CELL or (table.header and not about):
                yield cell, ""
            else:
                yield attribute(name, of, cell), ""


def attribute(name: str, of: str, value: str) -> str:
    """A sentence: the name of the thing is the value, or when that was done to it."""
    value = value.removesuffix(".")
    if of and DONE.fullmatch(name) and (when := DATE.fullmatch(value)):
        return f"{of} was {name.lower()} {'on' if when['day'] or when['us'] else 'in'} {value}."
    noun = _noun(name)
    verb = "are" if PLURAL.search(noun) else "is"
    return f"The {noun}{f' of {of}' if of else ''} {verb} {value}."


def _noun(name: str) -> str:
    """As it stands within a sentence: `Harbour master` in lower case, `URL` as it is."""
    words = name.split()
    return " ".join(w if w.isupper() and len(w) > 1 else w.lower() for w in words)


def _piped(lines: Sequence[str], start: int) -> Table | None:
    if "|" not in lines[start] or "|" not in "".join(lines[start + 1 : start + 2]):
        return None
    header, rule = _cells(lines[start]), _cells(lines[start + 1])
    if len(header) < 2 or len(rule) != len(header) or not all(map(RULE.fullmatch, rule)):
        return None
    rows = []
    for number in range(start + 2, len(lines)):
        line = lines[number]
        if "|" not in line:
            break
        cells = _cells(line)[: len(header)]
        rows.append((*cells, *[""] * (len(header) - len(cells))))
    return _table(header, rows, 2 + len(rows))


def _aligned(lines: Sequence[str], start: int) -> Table | None:
    starts = [match.end() - 1 for match in COLUMN.finditer(lines[start])]
    if starts and starts[0] > 1 and lines[start + 1 : start + 2]:
        corner = lines[start + 1][: starts[0]]  # empty above the names of the rows
        starts = [0, *starts] if corner[:1].strip() else starts
    if len(starts) < 2:
        return None
    rows: list[tuple[str, ...]] = []
    lined = 0
    for number in range(start, len(lines)):
        line = lines[number]
        gaps = [line[place - 2 : place] for place in starts[1:] if place < len(line)]
        if not gaps or any(gap.strip() for gap in gaps):
            break
        lined += 1
        spans = zip_longest(starts, starts[1:])
        cells = tuple(_plain(line[first:end]) for first, end in spans)
        if rows and not cells[0]:  # the row above goes on
            rows[-1] = tuple(
                " ".join(filter(None, both)) for both in zip(rows[-1], cells, strict=True)
            )
        else:
            rows.append(cells)
    if len(rows) < 2 or any(LISTED.fullmatch(first) or not first for first, *_ in rows[1:]):
        return None
    if any(cell.startswith(CODE) for _, *cells in rows for cell in cells):
        return None
    # Two columns have names as often as not.
    if len(starts) == 2 and not DESCRIPTION.fullmatch(rows[0][1]):
        named = tuple((name.rstrip(":= "), cell) for name, cell in rows)
        return Table(None, named, lined)
    return _table(rows[0], rows[1:], lined)


def _table(header: Sequence[str], rows: Sequence[tuple[str, ...]], lines: int) -> Table:
    keyed = len(header) == 2 and header[1].lower() in VALUE
    return Table(None if keyed else tuple(header), tuple(rows), lines)


def _cells(line: str) -> list[str]:
    inside = line.strip().removeprefix("|")
    if inside.endswith("|") and not inside.endswith("\\|"):
        inside = inside[:-1]
    return [_plain(cell.replace("\\|", "|")) for cell in PIPE.split(inside)]


def _plain(cell: str) -> str:
    """Without Markdown's marks."""
    return LINK.sub(r"\1", " ".join(cell.split())).strip("*_` ")
