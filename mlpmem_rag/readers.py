"""Turns the bytes of one file into raw records. Knows file formats; knows no folders and no ids.

Third-party parsers are imported by the function that needs them, so that importing this module
costs nothing. Whatever they throw at a broken file becomes a reason, in `read_records` alone.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lxml.html import HtmlElement

# XML is parsed into a tree forty times its size. This is the text of ten thick books; an archive
# that grows a lot is refused well below it. One that stays small may compress as well as it likes.
_MAX_UNZIPPED_BYTES = 32 * 2**20
_MAX_UNZIP_RATIO = 100
_UNZIP_RATIO_FREE_BYTES = 10 * 2**20
_MAX_ROW_TITLE = 80
_CSV_DELIMITERS = ",;\t|"

# The UTF-32 marks come first: the little-endian one begins with the UTF-16 mark.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# The legacy encodings that web browsers know. The DOS, Macintosh and mainframe ones fit short texts
# as well, and are hardly ever right.
_LEGACY_ENCODINGS = [
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258"),
    *("iso8859_2", "iso8859_5", "iso8859_7", "koi8_r", "cp874"),
    *("big5", "cp932", "cp949", "euc_jp", "gb18030", "iso2022_jp"),
]

_MARKDOWN_TITLE = re.compile(r"\s*#[ \t]+(?P<title>.+?)[ \t]*#*[ \t]*(?:\n|$)")
_CODE = ("code", "kbd", "samp", "tt")
_BLOCKS = ("br", "p", "div", "pre", "ul", "ol", "li", "dl", "table", "blockquote", "section", "h1")
_XML_DECLARATION = re.compile(r"^\s*<\?xml [^>]*\?>")


class UnreadableFileError(Exception):
    """A file that holds no text we can read; the message is the reason in one phrase."""


@dataclass(frozen=True, slots=True)
class Record:
    """A text as its file holds it, with the title and id the file gives it, if any.

    `line` is the line on which the record begins, where a file holds many records.
    """

    text: str
    title: str | None = None
    id: str | None = None
    line: int | None = None


# A line number and what is wrong with the record that begins there.
Problem = tuple[int, str]


def read_records(path: Path) -> tuple[list[Record], list[Problem]]:
    """Read every text of a file.

    Args:
        path: A file whose suffix is one of `SUPPORTED_SUFFIXES`, in any case.

    Returns:
        The records in file order, and the rows that could not be used, each as line number and
        reason. Only formats with many records per file (csv, tsv, jsonl) report such rows.

    Raises:
        UnreadableFileError: If nothing of the file can be read: an unsupported suffix, missing
            permission, binary data, encryption, or a document its parser refuses.
    """
    suffix = path.suffix.lower()
    if suffix not in SUPPORTED_SUFFIXES:
        raise UnreadableFileError(f"unsupported suffix {suffix!r}" if suffix else "no suffix")
    # The one place where a parser's exceptions end: a broken document may raise anything, and
    # must cost no more than itself.
    try:
        data = path.read_bytes()
        if suffix in _ROW_READERS:
            return _ROW_READERS[suffix](_decode(data))
        return [_DOCUMENT_READERS[suffix](data)], []
    except UnreadableFileError:
        raise
    except PermissionError as error:
        raise UnreadableFileError("permission denied") from error
    except Exception as error:
        raise UnreadableFileError(_describe(error)) from error


def _describe(error: Exception) -> str:
    """Name an exception and the first line of its message."""
    message = str(error).strip().partition("\n")[0].strip()
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _decode(data: bytes) -> str:
    """Decode text: byte order mark, else UTF-8, else the likeliest legacy encoding."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    if b"\x00" in data:
        raise UnreadableFileError("binary")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _decode_legacy(data)


def _decode_legacy(data: bytes) -> str:
    from charset_normalizer import from_bytes

    matches = from_bytes(data, cp_isolation=_LEGACY_ENCODINGS)
    best = matches.best()
    if best is None:
        raise UnreadableFileError("binary, or text in an unknown encoding")
    # Short western texts fit several code pages equally well, and such ties are broken by name:
    # cp1250 before cp1252, "č" instead of "è". The more common code page is the better guess.
    for match in matches:
        is_tie = (match.chaos, match.coherence) == (best.chaos, best.coherence)
        if match.encoding == "cp1252" and is_tie:
            return str(match)
    return str(best)


def _read_plain(data: bytes) -> Record:
    return Record(_decode(data))


def _read_markdown(data: bytes) -> Record:
    """Keep the markup: headings and lists mean something to a language model."""
    text = _decode(data)
    heading = _MARKDOWN_TITLE.match(text)
    return Record(text, title=heading["title"] if heading else None)


def _read_html(data: bytes) -> Record:
    return _render_html(_decode(data))


def _render_html(html: str) -> Record:
    """Lay a page out as text, and take its first heading, else its title element, as title."""
    from inscriptis.css_profiles import CSS_PROFILES
    from inscriptis.html_engine import Inscriptis
    from inscriptis.model.config import ParserConfig
    from lxml.etree import Comment, strip_elements, strip_tags
    from lxml.html import HTMLParser, document_fromstring

    html = _XML_DECLARATION.sub("", html)
    if not html.strip():
        return Record("")
    # Without huge_tree, the parser drops all text of a page nested deeper than 256, silently.
    tree = document_fromstring(html, parser=HTMLParser(huge_tree=True))
    strip_elements(tree, "script", "style", "template", "noscript", with_tail=False)
    strip_tags(tree, Comment)
    heading = next(tree.iter("h1"), None)
    if heading is None:
        heading = next(tree.iter("title"), None)
    title = "" if heading is None else " ".join(heading.text_content().split())
    _mark(tree)
    # The strict profile is the browsers': the relaxed one puts spaces around every <span>.
    text = Inscriptis(tree, ParserConfig(css=CSS_PROFILES["strict"])).get_text()
    return Record(text, title=title or None)


def _mark(page: HtmlElement) -> None:
    """Mark headings and code as Markdown does: they mean something to a language model."""
    for block in list(page.iter("pre")):
        for line in block.iter("br"):
            line.tail = f"\n{line.tail or ''}"
        code = block.text_content().strip("\n")
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 3)
        # Line breaks are kept in a <pre>'s own text only, not in the <code> or <span> inside it.
        _become(block, code if _in_a_cell(block) else f"{fence}\n{code}\n{fence}")
    for word in [*page.iter(*_CODE), *(w for w in page.iter("span") if "literal" in w.classes)]:
        code = word.text_content().strip()
        if code and "`" not in code and not any(part.tag in _BLOCKS for part in word.iter()):
            _become(word, f"`{code}`")
    for level in range(1, 7):
        for heading in list(page.iter(f"h{level}")):
            text = " ".join(heading.text_content().split())
            if text and not _in_a_cell(heading):
                _become(heading, f"{'#' * level} {text}")


def _become(element: HtmlElement, text: str) -> None:
    for child in list(element):
        element.remove(child)
    element.text = text


def _in_a_cell(element: HtmlElement) -> bool:
    return next(element.iterancestors("td", "th"), None) is not None


def _read_rst(data: bytes) -> Record:
    """Render reStructuredText, with every directive that reaches outside the text turned off."""
    from docutils.core import publish_parts

    settings = {
        "_disable_config": True,  # no docutils.conf of the working directory
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "report_level": 5,  # problems of the markup don't belong in the text
        "halt_level": 5,
        "warning_stream": False,
        "line_length_limit": max(len(data), 1),  # the default refuses long paragraphs
        "syntax_highlight": "none",
        "math_output": "LaTeX",
        "embed_stylesheet": False,
    }
    parts = publish_parts(_decode(data), writer="html5", settings_overrides=settings)
    return _render_html(parts["html_body"])


def _read_docx(data: bytes) -> Record:
    """Read the document's text; pictures are left out."""
    import mammoth

    result = mammoth.convert_to_html(
        io.BytesIO(_text_parts(data)),
        style_map="p[style-name='Title'] => h1:fresh",
        convert_image=mammoth.images.img_element(_leave_out_image),
        external_file_access=False,
    )
    return _render_html(result.value)


def _leave_out_image(image: object) -> dict[str, str]:
    del image  # never opened: the default would carry it along as base64
    return {}


def _text_parts(data: bytes) -> bytes:
    """The archive without pictures, fonts and the like, unless it grows beyond what text needs.

    The sizes are the archive's own claims, which is enough: `zipfile` reads no further than it.
    """
    kept = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(kept, "w") as text:
        parts = [p for p in archive.infolist() if p.filename.lower().endswith((".xml", ".rels"))]
        unzipped = sum(part.file_size for part in parts)
        ratio = unzipped / len(data)
        is_too_steep = unzipped > _UNZIP_RATIO_FREE_BYTES and ratio > _MAX_UNZIP_RATIO
        if unzipped > _MAX_UNZIPPED_BYTES or is_too_steep:
            raise UnreadableFileError(
                f"expands to {unzipped / 2**20:.0f} MiB, {ratio:.0f} times its size"
            )
        for part in parts:
            text.writestr(part.filename, archive.read(part))
    return kept.getvalue()


def _read_pdf(data: bytes) -> Record:
    from pypdf import PasswordType, PdfReader

    reader = PdfReader(io.BytesIO(data))
    # Many PDFs are encrypted with an empty password, only to restrict printing.
    if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
        raise UnreadableFileError("encrypted pdf")
    text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
    if not text.strip():
        raise UnreadableFileError("pdf without a text layer: scanned pages need OCR first")
    return Record(text)


def _read_csv(text: str) -> tuple[list[Record], list[Problem]]:
    return _read_table(text, _sniff_delimiter(text))


def _read_tsv(text: str) -> tuple[list[Record], list[Problem]]:
    return _read_table(text, "\t")


def _sniff_delimiter(text: str) -> str:
    # The header alone: the prose of the rows holds more commas than the table has columns.
    header = text.lstrip().partition("\n")[0]
    try:
        return csv.Sniffer().sniff(header, _CSV_DELIMITERS).delimiter
    except csv.Error:  # a single column
        return ","


def _read_table(text: str, delimiter: str) -> tuple[list[Record], list[Problem]]:
    """Read rows below a header; a column named `text` holds the text, if there is one."""
    records: list[Record] = []
    problems: list[Problem] = []
    # The limit on one cell is the interpreter's, not the reader's, and a chapter exceeds it.
    cell_limit = csv.field_size_limit(max(len(text), 1))
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = [name.strip() for name in next(rows, [])]
        line = rows.line_num + 1
        for row in rows:
            if len(row) > len(header):
                problems.append((line, f"{len(row)} cells under {len(header)} column names"))
            elif row:
                cells = dict(zip_longest(header, row, fillvalue=""))
                records.append(_row_record(cells, line))
            line = rows.line_num + 1
    finally:
        csv.field_size_limit(cell_limit)
    return records, problems


def _row_record(row: Mapping[str, str], line: int) -> Record:
    by_name = {name.lower(): value for name, value in row.items()}
    if "text" in by_name:
        return _keyed_record(by_name, by_name["text"], line)
    cells = [(name, value.strip()) for name, value in row.items() if value.strip()]
    lines = [f"{name[0].upper()}{name[1:]}: {value}" if name else value for name, value in cells]
    first = cells[0][1] if cells else ""
    named = by_name.get("title") or by_name.get("name") or first
    title = _as_text(named) if len(named) <= _MAX_ROW_TITLE else None
    return Record("\n".join(lines), title=title, line=line)


def _read_jsonl(text: str) -> tuple[list[Record], list[Problem]]:
    records: list[Record] = []
    problems: list[Problem] = []
    # Not splitlines(): JSON strings may hold U+2028 and other separators as they are.
    for line, source in enumerate(text.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            row = json.loads(source)
        except ValueError as error:
            problems.append((line, f"not JSON: {str(error).partition(':')[0]}"))
            continue
        except RecursionError:
            problems.append((line, "not JSON: nested too deeply"))
            continue
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            records.append(_keyed_record(row, row["text"], line))
        else:
            problems.append((line, "no string under the key 'text'"))
    return records, problems


def _keyed_record(row: Mapping[str, object], text: str, line: int) -> Record:
    """Make a record of a row's text and its optional `title` and `id` (or `doc_id`)."""
    identifier = _as_text(row.get("id")) or _as_text(row.get("doc_id"))
    return Record(text, title=_as_text(row.get("title")), id=identifier, line=line)


def _as_text(value: object) -> str | None:
    """Take a string or a whole number as text; anything else, and a blank one, is nothing."""
    is_usable = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value).strip() or None if is_usable else None


_DOCUMENT_READERS: Mapping[str, Callable[[bytes], Record]] = {
    ".txt": _read_plain,
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".rst": _read_rst,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
_ROW_READERS: Mapping[str, Callable[[str], tuple[list[Record], list[Problem]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
}

SUPPORTED_SUFFIXES: frozenset[str] = frozenset(_DOCUMENT_READERS) | frozenset(_ROW_READERS)
