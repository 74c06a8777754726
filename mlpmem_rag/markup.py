"""Markdown as plain lines: what a parser of sentences can read of it.

Marks, links, pictures and blocks of code go. A piece of code within a sentence is hidden behind a
name that nobody has, so that the parser takes `pip install --user` for one thing; `shown` puts it
back into whatever was made of the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpmem_rag.tables import table_at

if TYPE_CHECKING:
    from markdown_it.token import Token

SECTIONED = re.compile(r"^ {0,3}(?:#{1,6} \S|```|~~~\w*$)", re.M)
MARKED = re.compile(
    rf"{SECTIONED.pattern}|\[[^\]\n]+\]\((?:https?:|[./#]|\w[\w/-]*\.\w)[^)\s]*\)"
    r"|(?<![`\w])`[^`'\n]+`(?![`\w])",
    re.M,
)
"""What hardly any plain text has."""
LETTERS = "abcefhijklmnopquvwxy"  # no ending that a lemmatiser takes off: -s, -ed, -ing, -er
HIDDEN = re.compile(rf"Zyloq([{LETTERS}]{{3}})", re.IGNORECASE)
MOST_HIDDEN = len(LETTERS) ** 3
MAX_COMMAND = 100
"""Characters of a line of code that ends the sentence above it."""

_ALERT = re.compile(r"\[!\w+\]\s*")
_FOOTNOTE = re.compile(r"\[\^[^\]\s]+\]:?")
_FRONT = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.DOTALL)
_TAGS = frozenset((
    *("a", "abbr", "b", "br", "center", "code", "del", "details", "div", "em", "font"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "ins", "kbd", "li", "mark"),
    *("ol", "p", "picture", "pre", "q", "s", "samp", "small", "source", "span", "strong"),
    *("sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul"),
    *("var", "video"),
))  # fmt: skip
_TAG = re.compile(r"</?([a-zA-Z][\w-]*)")
_HTML = re.compile(r"<!--.*?-->|</?[a-zA-Z][^>]*>", re.DOTALL)
_EMOJI = re.compile(r"[\u26a0\u2705\u274c\u2728\u2757\ufe0f\U0001f300-\U0001faff]+\s*")
_SCRIPT = re.compile(r"\s*<(?:script|style)\b", re.IGNORECASE)
_PAIR = re.compile(r"[^:.]{1,50}:\s")
_PROMPT = re.compile(r"^\s*[$>%]\s+")


@dataclass(frozen=True)
class Plain:
    """A text without its marks.

    Attributes:
        lines: of it; a heading begins with `#`, and an empty line ends a paragraph.
        code: what is hidden in them.
    """

    lines: tuple[str, ...]
    code: tuple[str, ...] = ()

    def shown(self, text: str) -> str:
        """With its code instead of the names that stand for it."""
        return HIDDEN.sub(self._code_of, text) if self.code else text

    def _code_of(self, match: re.Match[str]) -> str:
        place = _place(match[1])
        return self.code[place] if place < len(self.code) else match[0]


def plain(text: str, spoken: str = "") -> Plain:
    """Any text line by line, Markdown without its marks; code that is `spoken` is not hidden."""
    if not MARKED.search(text):
        return Plain(tuple(text.splitlines()))
    from markdown_it import MarkdownIt

    text = _FRONT.sub("", re.sub(r"\r\n?", "\n", text))
    code: list[str] = []
    parser = MarkdownIt("commonmark", {"html": True, "maxNesting": 200}).enable("table")
    if not SECTIONED.search(text):
        parser.disable("code")  # then what is indented is a paragraph
    lines = _Unmarked(code, spoken.lower().split(), text).lines_of(parser.parse(text))
    return Plain(tuple(lines), tuple(code))


def readable(text: str) -> str:
    """Any text as a person reads it: without marks, with its code."""
    if not MARKED.search(text):
        return text
    unmarked = plain(text)
    return "\n".join(unmarked.shown(line).removeprefix("# ") for line in unmarked.lines).strip()


class _Unmarked:
    """Keeps what it has hidden in `code`."""

    def __init__(self, code: list[str], spoken: Sequence[str], text: str) -> None:
        self._code = code
        self._places: dict[str, int] = {}
        self._spoken = spoken
        self._source = text.split("\n")

    def lines_of(self, tokens: Sequence[Token]) -> Iterator[str]:
        """The lines of a document's tokens."""
        paragraph: list[str] = []  # which a line of code may end
        rows: list[list[str]] = []
        opened = mark = ""
        for token in tokens:
            if token.type in ("fence", "code_block") and paragraph:
                paragraph[-1] = self._ended(paragraph[-1], token.content)
            if paragraph and token.type not in ("inline", "paragraph_close"):
                yield from (*paragraph, "")
                paragraph = []
            if token.type.endswith("_open"):
                opened, mark = token.type, token.markup
            if table := self._lined_up(token):
                yield from (*table, "")
            elif token.type == "inline" and opened == "heading_open":
                yield from ("", *self._heading(token.children or (), mark), "")
            elif token.type == "inline" and opened == "paragraph_open":
                paragraph = self._paragraph(token.children or ())
            elif token.type == "inline":
                rows[-1].append(" ".join(self._text_of(token.children or ()).split()))
            elif token.type == "table_open":
                rows = []
            elif token.type == "tr_open":
                rows.append([])
            elif token.type == "table_close":
                yield from (*_table(rows), "")
            elif token.type == "html_block" and not _SCRIPT.match(token.content):
                yield from (*_without_tags(token.content).splitlines(), "")
        yield from paragraph

    def _heading(self, tokens: Sequence[Token], mark: str) -> list[str]:
        """A line, or a paragraph that only stands above a rule."""
        lines = self._paragraph(tokens)
        underlined = mark in ("-", "=")
        if underlined and (
            "\n" in self._text_of(tokens) or (lines[-1:] and lines[-1][-1] in ".:!")
        ):
            return lines
        return [f"# {line}" for line in lines]

    def _ended(self, line: str, block: str) -> str:
        """`To list all, run:` with the only line of the block of code below it."""
        command = _command(block) if line.endswith(":") else None
        return f"{line[:-1]} {self._hidden(command)}." if command else line

    def _paragraph(self, tokens: Sequence[Token]) -> list[str]:
        """As one line, or as the pairs of a name and a value that its lines are."""
        if _leads_on(tokens):
            return []
        lines = [line.strip() for line in self._text_of(tokens).splitlines() if line.strip()]
        pairs = len(lines) > 1 and sum(bool(_PAIR.match(line)) for line in lines) > len(lines) / 2
        return lines if pairs else [" ".join(lines)] if lines else []

    def _lined_up(self, token: Token) -> list[str]:
        """The lines of a paragraph or block of code that is a table of lined-up columns."""
        if token.type not in ("inline", "code_block") or token.map is None:
            return []
        lines = self._source[token.map[0] : token.map[1]]
        table = table_at(lines, 0) if len(lines) > 1 else None
        if table is None or table.lines < len(lines):
            return []
        if table.header is None:
            return lines
        code = {found.strip() for line in lines for found in re.findall(r"`([^`]+)`", line)}
        rows = [[self._hidden(c) if c in code else c for c in row] for row in table.rows]
        rule = ["---"] * len(table.header)
        return [_row(cells) for cells in (table.header, rule, *rows)]

    def _text_of(self, tokens: Sequence[Token]) -> str:
        """Of an inline token's children; lines end where they did."""
        out = []
        for place, token in enumerate(tokens):
            if token.type == "code_inline":
                out.append(self._hidden(token.content.strip()))
            elif token.type == "text":
                address = place > 0 and tokens[place - 1].info == "auto"
                out.append(self._hidden(token.content) if address else token.content)
            elif token.type in ("softbreak", "hardbreak"):
                out.append("\n")
            elif token.type == "html_inline":
                out.append(_without_tags(token.content))
            elif token.markup == "__" and token.type.startswith("strong"):
                within = tokens[place - 1 : place] if token.nesting < 0 else tokens[place + 1 :]
                named = within and re.fullmatch(r"\w+", within[0].content)
                out.append("__" if named else "")  # a name of Python's
        text = _FOOTNOTE.sub("", _ALERT.sub("", "".join(out)))
        return _EMOJI.sub("", text)

    def _hidden(self, code: str) -> str:
        if not code or code.lower() in self._spoken:
            return code
        if code not in self._places and len(self._code) < MOST_HIDDEN:
            self._places[code] = len(self._code)
            self._code.append(code)
        place = self._places.get(code)
        return code if place is None else f"Zyloq{_letters(place)}"


def _without_tags(text: str) -> str:
    """Without the tags of HTML; `<name>`, where something is to be put in, stays."""

    def kept(match: re.Match[str]) -> str:
        tag = _TAG.match(match[0])
        if tag is None or tag[1].lower() in _TAGS:
            return " " if tag and tag[1].lower() in ("br", "li", "td", "p", "div") else ""
        return match[0]

    return _HTML.sub(kept, text)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; a last one that has but a first cell is text that follows at once."""
    if not rows or len(rows[0]) < 2:
        yield from (line for row in rows for line in (*row, ""))
        return
    follows = len(rows) > 1 and not any(rows[-1][1:])
    body = rows[1:-1] if follows else rows[1:]
    yield from map(_row, (rows[0], ["---"] * len(rows[0]), *body))
    yield from ("", rows[-1][0]) if follows else ()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _leads_on(tokens: Sequence[Token]) -> bool:
    """Whether a paragraph is but a link within the document, as in a table of contents."""
    links = [token for token in tokens if token.type == "link_open"]
    alone = bool(links) and tokens[0] == links[0] and tokens[-1].type == "link_close"
    return alone and len(links) == 1 and str(links[0].attrGet("href")).startswith("#")


def _command(content: str) -> str | None:
    """The only line of a block of code, without the prompt before it."""
    lines = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1 or len(lines[0]) > MAX_COMMAND:
        return None
    return _PROMPT.sub("", lines[0]).strip() or None


def _letters(place: int) -> str:
    base = len(LETTERS)
    return LETTERS[place // base**2] + LETTERS[place // base % base] + LETTERS[place % base]


def _place(letters: str) -> int:
    place = 0
    for letter in letters.lower():
        place = place * len(LETTERS) + LETTERS.index(letter)
    return place
