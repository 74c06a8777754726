"""Every format, read from a real file and compared with text written by hand."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlpmem_rag import readers
from mlpmem_rag.readers import (
    SUPPORTED_SUFFIXES,
    Record,
    UnreadableFileError,
    read_records,
)

RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
CONTENT_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def make_docx(title: str, *paragraphs: str, padding: bytes = b"") -> bytes:
    """Make the smallest valid docx, with `padding` as one more file in its archive."""
    body = f'<w:p><w:pPr><w:pStyle w:val="Title"/></w:pPr><w:r><w:t>{title}</w:t></w:r></w:p>'
    body += "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    members = {
        "[Content_Types].xml": f'<Types xmlns="{CONTENT_TYPES}"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{RELATIONSHIPS}"><Relationship Id="r1" '
        f'Type="{OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/_rels/document.xml.rels": f'<Relationships xmlns="{RELATIONSHIPS}"><Relationship '
        f'Id="r1" Type="{OFFICE}/styles" Target="styles.xml"/></Relationships>',
        "word/styles.xml": f'<w:styles xmlns:w="{WORD}"><w:style w:type="paragraph" '
        'w:styleId="Title"><w:name w:val="Title"/></w:style></w:styles>',
        "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("word/media/padding.bin", padding)
    return buffer.getvalue()


def make_pdf(*pages: str) -> bytes:
    """Make a PDF with one line of Helvetica per page, and its cross-reference table."""
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode() if text else b""
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 "
            b"3 0 R >> >> /Contents %d 0 R >>" % (5 + 2 * index)
        )
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content))
    data = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Size %d /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (size, table, size, len(data))
    )


def encrypt_pdf(data: bytes, password: str) -> bytes:
    """Encrypt with RC4, which needs no further package."""
    from pypdf import PdfWriter

    writer = PdfWriter(io.BytesIO(data))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def make_file(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a file, text as UTF-8."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_one(folder: Path, name: str, content: str | bytes) -> Record:
    """Read a file that must hold one record and no problem."""
    records, problems = read_records(make_file(folder, name, content))
    assert problems == []
    assert len(records) == 1
    return records[0]


def read_reason(folder: Path, name: str, content: str | bytes) -> str:
    """Read a file that must be refused."""
    with pytest.raises(UnreadableFileError) as caught:
        read_records(make_file(folder, name, content))
    return str(caught.value)


def test_importing_the_module_imports_no_parser() -> None:
    parsers = "{'docutils', 'pypdf', 'mammoth', 'lxml', 'inscriptis', 'charset_normalizer'}"
    code = f"import sys, mlpmem_rag.readers; print(sorted({parsers} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_supported_suffixes() -> None:
    assert (
        " ".join(sorted(SUPPORTED_SUFFIXES))
        == ".csv .docx .htm .html .jsonl .markdown .md .pdf .rst .tsv .txt"
    )


# One test per document format.


def test_plain_text_is_kept_as_it_is(tmp_path: Path) -> None:
    assert read_one(tmp_path, "A.TXT", "# Zürich\r\n\tlake ") == Record("# Zürich\r\n\tlake ")


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("\n# The lake ##\n\nDeep.", "The lake"),
        ("# C#", "C"),
        ("Deep.\n\n# Later", None),
        ("## Second level", None),
        ("#tag", None),
    ],
)
def test_markdown_keeps_its_markup_and_gives_its_first_heading(
    tmp_path: Path, text: str, title: str | None
) -> None:
    assert read_one(tmp_path, "a.md", text) == Record(text, title=title)


def test_html_is_laid_out_without_scripts(tmp_path: Path) -> None:
    page = """<?xml version="1.0" encoding="iso-8859-1"?>
    <html><head><meta charset="iso-8859-1"><title>Lakes - A site</title>
    <style>p { color: red }</style><script>steal()</script></head>
    <body><h1>The <i>lake</i>
      of  Zürich</h1><p>Deep &amp; <span>co</span>ld.<script>steal()</script></p>
    <noscript>Turn JavaScript on.</noscript><template>{{ name }}</template>
    <ul><li>trout</li><li>pike</li></ul>
    <pre><code>if x:
        <b>swim</b>()</code></pre>
    <table><tr><th>depth</th><td>136 m</td></tr></table></body></html>"""
    record = read_one(tmp_path, "a.html", page)
    assert record.title == "The lake of Zürich"
    assert [line.rstrip() for line in record.text.strip().split("\n")] == [
        "# The lake of Zürich",
        "",
        "Deep & cold.",
        "",
        "  * trout",
        "  * pike",
        "```",
        "if x:",
        "        swim()",
        "```",
        "depth  136 m",
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<p>Use <code>foo<!-- -->bar</code> and <kbd>x</kbd>.</p>", "Use `foobar` and `x`."),
        ("<p><code>a<br>b</code></p>", "a\nb"),
        ("<code>foo<p>More text.</p><p>Second.</p></code>", "foo\n\nMore text.\n\nSecond."),
        ("<pre>x<!-- c -->y</pre><p>After.</p>", "```\nxy\n```\n\nAfter."),
        ("<pre>```\nx\n```</pre><p>After.</p>", "````\n```\nx\n```\n````\n\nAfter."),
        ("<h2><div>Foo <code>bar</code></div></h2><p>x</p>", "## Foo `bar`\n\nx"),
        ("<h2></h2><h3><img></h3><p>x</p>", "x"),
        ("<table><tr><td><h2>Menu</h2></td><td>The sea.</td></tr></table>", "Menu  The sea."),
        ("<table><tr><td>Do:<pre>a</pre></td><td>Red.</td></tr></table>", "Do:  Red.\na"),
        ("<p>One <span class='literal'>--q</span> two.</p>", "One `--q` two."),
        ("<pre class='literal'>x</pre>", "```\nx\n```"),
    ],
)
def test_headings_and_code_of_a_page_are_marked(tmp_path: Path, body: str, text: str) -> None:
    record = read_one(tmp_path, "a.html", f"<html><body>{body}</body></html>")
    assert "\n".join(line.rstrip() for line in record.text.strip().split("\n")) == text


def test_html_without_a_heading_takes_the_title_element(tmp_path: Path) -> None:
    record = read_one(tmp_path, "a.htm", "<title>Lakes</title><p>Deep.</p>")
    assert (record.title, record.text.strip()) == ("Lakes", "Deep.")


def test_html_nested_beyond_the_parsers_default_keeps_its_text(tmp_path: Path) -> None:
    deep = "<div>" * 400 + "deep" + "</div>" * 400
    assert read_one(tmp_path, "a.html", f"{deep}<p>after</p>").text.split() == ["deep", "after"]


def test_html_nested_without_end_is_refused(tmp_path: Path) -> None:
    reason = read_reason(tmp_path, "a.html", "<div>" * 50_000)
    assert reason.startswith("RecursionError: maximum recursion depth exceeded")


def test_rst_is_laid_out_and_reaches_no_other_file(tmp_path: Path) -> None:
    secret = make_file(tmp_path, "secret.txt", "password, in a file")
    make_file(tmp_path, "docutils.conf", "[general]\nfile_insertion_enabled: yes\n")
    long_line = "deep " * 3000
    text = f"""
The lake
========

A *cold* lake, see `Trout`_.

.. include:: {secret}

.. raw:: html

   <b>raw</b>

.. csv-table::
   :file: {secret}

.. no-such-directive:: x

Trout
-----

.. code-block:: python

   if x:
       swim()

{long_line}
"""
    record = read_one(tmp_path, "a.rst", text)
    assert record.title == "The lake"
    assert [line.rstrip() for line in record.text.strip().split("\n")] == [
        "# The lake",
        "",
        "A cold lake, see Trout.",
        "",
        "## Trout",
        "",
        "```",
        "if x:",
        "    swim()",
        "```",
        "",
        long_line.strip(),
    ]


def test_docx_gives_title_and_paragraphs(tmp_path: Path) -> None:
    record = read_one(tmp_path, "a.docx", make_docx("The lake", "Deep &amp; cold.", "Trout."))
    assert record.title == "The lake"
    assert record.text.strip() == "# The lake\n\nDeep & cold.\n\nTrout."


def test_pdf_pages_are_paragraphs(tmp_path: Path) -> None:
    data = make_pdf("The lake is deep.", "Trout live in it.")
    assert read_one(tmp_path, "a.pdf", data) == Record("The lake is deep.\n\nTrout live in it.")


def test_pdf_encrypted_with_an_empty_password_is_read(tmp_path: Path) -> None:
    data = encrypt_pdf(make_pdf("The lake."), password="")
    assert read_one(tmp_path, "a.pdf", data) == Record("The lake.")


# Tables and rows.


def test_csv_with_a_text_column_takes_title_and_id(tmp_path: Path) -> None:
    table = 'ID;Title; Text \n7;Lake;"Deep; cold,\nwide"\n\n8;;Trout\n9;Pike\na;b;c;d\n'
    records, problems = read_records(make_file(tmp_path, "a.csv", table))
    assert records == [
        Record("Deep; cold,\nwide", title="Lake", id="7", line=2),
        Record("Trout", title=None, id="8", line=5),
        Record("", title="Pike", id="9", line=6),
    ]
    assert problems == [(7, "4 cells under 3 column names")]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", "|"), ("a.tsv", "\t")])
def test_table_without_a_text_column_gives_named_values(
    tmp_path: Path, name: str, mark: str
) -> None:
    table = f"lake{mark}depth{mark}note\nZürich{mark}136 m{mark} \nZug{mark}198 m{mark}cold\n"
    records, problems = read_records(make_file(tmp_path, name, table))
    assert problems == []
    assert records == [
        Record("Lake: Zürich\nDepth: 136 m", title="Zürich", line=2),
        Record("Lake: Zug\nDepth: 198 m\nNote: cold", title="Zug", line=3),
    ]


def test_a_row_is_called_by_its_name_if_it_is_short_enough(tmp_path: Path) -> None:
    table = f"no,Name,price\n1,Lamp,30\n2,,40\n3,{'x' * 81},50\n"
    records, _ = read_records(make_file(tmp_path, "a.csv", table))
    assert [record.title for record in records] == ["Lamp", "2", None]


def test_csv_cell_beyond_the_interpreters_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "x" * (limit + 1)
    assert read_one(tmp_path, "a.csv", f"text\n{text}\n") == Record(text, line=2)
    assert csv.field_size_limit() == limit


def test_jsonl_reports_bad_lines_and_keeps_the_others(tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": 7, "title": "Lake", "text": "Deep."}),
        "{not json",
        "",
        json.dumps(["text"]),
        json.dumps({"text": 3}),
        "[" * 100_000,
        '{"doc_id": "8", "title": "", "text": "U+2028:\u2028here"}',
    ]
    records, problems = read_records(make_file(tmp_path, "a.jsonl", "\n".join(lines)))
    assert records == [
        Record("Deep.", title="Lake", id="7", line=1),
        Record("U+2028:\u2028here", title=None, id="8", line=7),
    ]
    assert problems == [
        (2, "not JSON: Expecting property name enclosed in double quotes"),
        (4, "no string under the key 'text'"),
        (5, "no string under the key 'text'"),
        (6, "not JSON: nested too deeply"),
    ]


# Encodings.

FRENCH = "L’été dernier, le château où je suis né était à vendre : 300 000 €."
RUSSIAN = "Привет, как дела? Это небольшой текст на русском языке."
JAPANESE = "東京は日本の首都です。人口は約1400万人です。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "utf-8"),
        (FRENCH, "utf-8-sig"),
        (FRENCH, "utf-16"),
        (FRENCH, "utf-32"),
        (FRENCH, "cp1252"),
        ("Café crème, naïve façade", "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (JAPANESE, "shift_jis"),
    ],
)
def test_encodings(tmp_path: Path, text: str, encoding: str) -> None:
    assert read_one(tmp_path, "a.txt", text.encode(encoding)).text == text


def test_utf_16_with_the_other_byte_order(tmp_path: Path) -> None:
    assert read_one(tmp_path, "a.txt", b"\xfe\xff" + FRENCH.encode("utf-16-be")).text == FRENCH


# Files that can't be read.


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.exe", b"MZ", "unsupported suffix '.exe'"),
        ("README", b"text", "no suffix"),
        ("a.txt", b"\x7fELF\x00\x01", "binary"),
        ("a.md", bytes(range(128, 256)) * 4, "binary, or text in an unknown encoding"),
        ("a.txt", b"\xff\xfea", "UnicodeDecodeError: 'utf-16-le' codec can't decode byte 0x61"),
        ("a.pdf", b"%PDF-1.4 cut", "PdfStreamError: Stream has ended unexpectedly"),
        ("a.pdf", make_pdf("", ""), "pdf without a text layer: scanned pages need OCR first"),
        ("a.docx", make_docx("Lake")[:300], "BadZipFile: File is not a zip file"),
    ],
)
def test_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    found = read_reason(tmp_path, name, content)
    assert found[: len(reason)] == reason
    assert "\n" not in found


def test_encrypted_pdf(tmp_path: Path) -> None:
    data = encrypt_pdf(make_pdf("The lake."), password="secret")
    assert read_reason(tmp_path, "a.pdf", data) == "encrypted pdf"


def docx_of(body: str, doctype: str = "") -> bytes:
    """A docx whose text part is written as given."""
    document = f'<?xml version="1.0"?>{doctype}<w:document xmlns:w="{WORD}"><w:body>{body}'
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(make_docx("Lake"))) as whole,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in whole.namelist():
            if name != "word/document.xml":
                archive.writestr(name, whole.read(name))
        archive.writestr("word/document.xml", f"{document}</w:body></w:document>")
    return buffer.getvalue()


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def test_docx_with_entities_that_multiply(tmp_path: Path) -> None:
    """A billion laughs."""
    levels = "".join(
        f'<!ENTITY {c} "{f"&{n};" * 10}">' for c, n in itertools.pairwise("abcdefghij")
    )
    bomb = docx_of(paragraph("&a;"), f'<!DOCTYPE w:document [{levels}<!ENTITY j "lol">]>')
    assert "amplification" in read_reason(tmp_path, "a.docx", bomb)


def test_docx_reaches_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    doctype = f'<!DOCTYPE w:document [<!ENTITY x SYSTEM "{(tmp_path / "secret").as_uri()}">]>'
    path = tmp_path / "a.docx"
    path.write_bytes(docx_of(paragraph("open &x; door"), doctype))
    ((record,), _) = read_records(path)
    assert record.text.split() == ["open", "door"]


def test_docx_that_expands_a_lot(tmp_path: Path) -> None:
    bomb = docx_of(paragraph("x" * 20 * 2**20))
    assert read_reason(tmp_path, "a.docx", bomb).startswith("expands to 20 MiB, ")


def test_docx_with_more_text_than_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which compresses no better than other texts do."""
    monkeypatch.setattr(readers, "_MAX_UNZIPPED_BYTES", 2**20)
    text = random.Random(0).randbytes(2**19).hex()
    whole = docx_of(paragraph(text[:-9_000]))
    assert len(read_records(make_file(tmp_path, "a.docx", whole))[0][0].text) > 2**20 - 10_000
    found = read_reason(tmp_path, "b.docx", docx_of(paragraph(text)))
    assert found == "expands to 1 MiB, 2 times its size"


def test_docx_with_many_pictures_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO(make_docx("Lake", padding=bytes(50 * 2**20)))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("word/media/photo.JPG", b"no picture")
    path = make_file(tmp_path, "a.docx", buffer.getvalue())
    assert read_records(path)[0][0].title == "Lake"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.docx", docx_of("<w:p>" * 20_000 + "</w:p>" * 20_000)),
        ("a.html", "<div>" * 300_000 + "lake"),
        ("a.html", "<table><tr><td>" * 2_000 + "lake"),
        ("a.rst", "\n".join("  " * depth + "* lake\n" for depth in range(400))),
    ],
)
def test_nesting_without_end_is_a_reason(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert "recursion" in read_reason(tmp_path, name, content)


@pytest.mark.parametrize(
    ("name", "content", "length"),
    [
        ("a.html", "<table><tr><td colspan=100000000>lake</td></tr></table>", 10),
        ("a.html", "<ol start='99999999999999999999'><li>lake</ol>", 30),
        ("a.html", f"<!DOCTYPE html [<!ENTITY a '{'lake' * 9}'>]><p>&a;&a;&a;", 40),
        ("a.rst", ".. |a| replace:: |b||b|\n.. |b| replace:: |a||a|\n\n|a|\n", 40),
    ],
)
def test_what_claims_to_be_large_stays_small(
    tmp_path: Path, name: str, content: str, length: int
) -> None:
    (tmp_path / name).write_text(content)
    ((record,), _) = read_records(tmp_path / name)
    assert len(record.text) < length


def test_docx_that_claims_an_enormous_size(tmp_path: Path) -> None:
    # The size that the archive's directory claims for its last file.
    data = bytearray(docx_of(paragraph("Lake")))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    assert read_reason(tmp_path, "a.docx", bytes(data)).startswith("expands to 2048 MiB, ")


def test_any_exception_of_a_parser_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: bytes) -> Record:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setitem(readers._DOCUMENT_READERS, ".md", fail)
    assert read_reason(tmp_path, "a.md", "text") == "ZeroDivisionError: first line"
