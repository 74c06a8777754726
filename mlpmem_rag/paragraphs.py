"""A document cut into what is parsed at once, with what its headings tell of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlpmem_rag.corpus import Document
from mlpmem_rag.markup import HIDDEN, Plain, plain
from mlpmem_rag.passages import without_notes
from mlpmem_rag.tables import attribute, table_at, told

MAX_KEY_VALUE_LINE = 160
MAX_PARAGRAPH = 20_000
"""Characters; the parser refuses a million, and what it needs of memory grows with them."""
MAX_ASKED = 160
"""Characters of a heading or line that is taken for a question."""
HEADING = re.compile(r"\s{0,3}#{1,6}\s+(.*\S)\s*#*")
KEY_VALUE = re.compile(
    r"\s*[-*]?\s*\**([A-Z][^:.]{1,50}?)\**(?:\s*=|\s*:(?=\s|\*))\s*\**\s*(\S.*?)\**\s*"
)
LABEL = re.compile(r"(?i:(?:\w+ )?(?:note|tip|warning|caution|notice|hint|important)s?): +")
TERM = re.compile(
    rf"({HIDDEN.pattern}(?:(?:,| or| /|/)? {HIDDEN.pattern})*)"
    r"(?P<kind> ?[({<\[][^)}>\]]*[)}>\]])?"
    rf"(?:(?P<mark> ?[:–—]| -(?! {HIDDEN.pattern})) +| +)(?=\S)"
)
"""Code and, it may be of which kind, with what it means behind it."""
ASKED = re.compile(r"(?:Q\d*[:.)] *)?([A-Z][^?]*\?)")
ANSWERED = re.compile(r"A\d*[:.)] +")


@dataclass(frozen=True)
class Paragraph:
    """A text of whole sentences.

    Attributes:
        text: of it, its code hidden (`mlpmem_rag.markup`).
        section: the heading above, where that is not the title.
        about: what its first sentence describes without naming it.
        asked: the question that it answers.
        source: what of its document it was made of.
    """

    text: str
    section: str = ""
    about: str = ""
    asked: str = ""
    source: Plain = field(default=Plain(()), compare=False, repr=False)


def paragraphs(document: Document) -> Iterator[Paragraph]:
    """Paragraphs without their headings.

    Lines that end a sentence end a paragraph, as in lists. A key-value line becomes a sentence
    about the title, or where there is none, the heading above it; a table becomes one of each cell.
    """
    title = plain_title(document)
    source = plain(document.text, title)
    heading = section = asked = described = ""
    open_lines: list[str] = []

    def made(text: str, about: str = "") -> Iterator[Paragraph]:
        nonlocal asked
        if term := _term(text, source):
            about, text = term[1], text[term.end() :]
        for piece in _cut(without_notes(text)):
            yield Paragraph(piece, section, about, asked, source)
            about = asked = ""

    def close() -> Iterator[Paragraph]:
        nonlocal asked, described
        text = " ".join(open_lines)
        open_lines.clear()
        if question := _question(text):
            asked = question
        elif HIDDEN.fullmatch(text) and source.shown(text).startswith("-"):
            described = text  # an option, and below it what it does
        elif text:
            if asked:
                text = _without(ANSWERED, text)
            yield from made(_without(LABEL, text), described)
            described = ""

    lines = source.lines
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        pair = KEY_VALUE.fullmatch(line) if len(line) < MAX_KEY_VALUE_LINE else None
        reply = asked and ANSWERED.match(line)
        if pair and (reply or LABEL.match(line) or _term(line, source) or _question(line)):
            pair = None
        topic = title or heading
        if named := HEADING.fullmatch(line):
            yield from close()
            described = ""
            heading = named.group(1)
            asked = _question(heading)
            section = "" if asked or source.shown(heading) == title else heading
        elif pair and not line.rstrip().endswith("."):
            yield from close()
            described = ""
            if pair.group(2) != topic:
                yield from made(attribute(pair.group(1), topic, " ".join(pair.group(2).split())))
        elif table := table_at(lines, number - 1):
            yield from close()
            asked = described = ""
            for text, about in told(table, heading or topic):
                yield from made(text, about)
            number += table.lines - 1
        elif not line.strip():
            yield from close()
        else:
            open_lines.append(line.strip())
            if line.rstrip().endswith((".", "!", "?")):
                yield from close()
    yield from close()


def plain_title(document: Document) -> str:
    """The title without its marks."""
    if not document.title:
        return ""
    title = plain(document.title)
    return title.shown(" ".join(title.lines).strip()) or document.title


def _term(text: str, source: Plain) -> re.Match[str] | None:
    """The code that a text tells the meaning of.

    Without a mark behind it, only an option is one, before a capital letter, or what has a kind.
    """
    term = TERM.match(text)
    if term is None or term["mark"] or (term["kind"] or "").lstrip().startswith("{"):
        return term
    option = source.shown(term[1]).startswith("-") and text[term.end()].isupper()
    return term if option else None


def _without(beginning: re.Pattern[str], text: str) -> str:
    found = beginning.match(text)
    return text[found.end() :] if found else text


def _question(text: str) -> str:
    """The question that a line is; nothing where it is none."""
    question = ASKED.fullmatch(text) if len(text) <= MAX_ASKED else None
    return question[1] if question and len(question[1].split()) > 2 else ""


def _cut(text: str) -> Iterator[str]:
    """A text that the parser has room for; of a longer one pieces, cut at white space."""
    while len(text) > MAX_PARAGRAPH:
        space = text.rfind(" ", 1, MAX_PARAGRAPH)
        end = space if space > 0 else MAX_PARAGRAPH
        yield text[:end]
        text = text[end:].lstrip()
    yield text
