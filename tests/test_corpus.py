"""Folders, files and patterns: what becomes a document, what is skipped, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpmem_rag.corpus import Corpus, Document, Skipped, read_corpus
from mlpmem_rag.errors import CorpusError
from mlpmem_rag.progress import ProgressEvent

SAMPLE = Path(__file__).parents[1] / "examples"


def make_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files below a folder, text as UTF-8."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read_text(folder: Path, name: str, content: str) -> str:
    """Read the text of the one document that a file makes."""
    return read_corpus(make_files(folder, {name: content}) / name).documents[0].text


def read_error(source: str | Path, *, strict: bool = False) -> str:
    """Read a corpus that must be refused."""
    with pytest.raises(CorpusError) as caught:
        read_corpus(source, strict=strict)
    return str(caught.value)


# What is found.


def test_folder_is_read_with_subfolders_in_the_order_of_names(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        {
            "b.md": "# Beta\n\nSecond.",
            "a/z.txt": "First.",
            "rows.jsonl": '{"text": "Third."}\n\n{"id": "x", "title": "X", "text": "Fourth."}\n',
            "table.csv": "lake,depth\nZug,198 m\n",
            ".hidden.txt": "Left out.",
            ".git/a.txt": "Left out.",
        },
    )
    assert read_corpus(tmp_path) == Corpus(
        documents=(
            Document("a/z.txt", "First.", None, "a/z.txt"),
            Document("b.md", "# Beta\n\nSecond.", "Beta", "b.md"),
            Document("rows.jsonl:1", "Third.", None, "rows.jsonl:1"),
            Document("x", "X\n\nFourth.", "X", "rows.jsonl:3"),
            Document("table.csv:2", "Zug\n\nLake: Zug\nDepth: 198 m", "Zug", "table.csv:2"),
        ),
        skipped=(),
    )


def test_single_file_is_named_without_its_folder(tmp_path: Path) -> None:
    path = make_files(tmp_path, {"deep/a.txt": "One."}) / "deep/a.txt"
    assert read_corpus(str(path)).documents == (Document("a.txt", "One.", None, "a.txt"),)


@pytest.mark.parametrize(
    ("pattern", "sources"),
    [
        ("docs/**/*.md", ["a.md", "sub/b.md"]),
        ("docs/*.md", ["a.md"]),
        ("docs/**", ["a.md", "c.txt", "sub/b.md"]),
        ("d?cs/*/b.md", ["docs/sub/b.md"]),
        ("**/b.md", ["docs/sub/b.md"]),
        ("docs/**/sub/**/[!a]*", ["sub/b.md"]),
        ("docs/**/.hid*/*", [".hidden/e.md"]),
    ],
)
def test_pattern(tmp_path: Path, pattern: str, sources: list[str]) -> None:
    make_files(tmp_path, {"docs/a.md": "A", "docs/sub/b.md": "B", "docs/c.txt": "C"})
    make_files(tmp_path, {"docs/.hidden/e.md": "E", "docs/.f.md": "F"})
    corpus = read_corpus(tmp_path / pattern)
    assert [document.source for document in corpus.documents] == sources


def test_relative_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_files(tmp_path, {"a.md": "A", "sub/b.md": "B"}))
    assert [document.id for document in read_corpus("*.md").documents] == ["a.md"]


def test_name_with_pattern_characters_is_a_name_first(tmp_path: Path) -> None:
    make_files(tmp_path, {"notes [1].txt": "One.", "notes 1.txt": "Other."})
    assert read_corpus(tmp_path / "notes [1].txt").documents[0].text == "One."


# What a text becomes.


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a  \r\n\tb\t\r\n\r\nc\rd\n\n", "a\n\tb\n\nc\nd"),
        ("Zu\u0308rich", "Z\u00fcrich"),
        ("100\u00a0km\u202f; fjord\u00adland", "100 km ; fjordland"),
    ],
)
def test_text_is_normalised(tmp_path: Path, content: str, text: str) -> None:
    assert read_text(tmp_path, "a.txt", content) == text


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Mars", "The red planet.", "Mars\n\nThe red planet."),
        ("Mars", "Mars, the red planet.", "Mars, the red planet."),
        ("Mars", "\n ## MARS\n\nRed.", " ## MARS\n\nRed."),
        ("Mars", "Marsh plants.", "Mars\n\nMarsh plants."),
        (" Red \n planet ", "Red\nplanet Mars", "Red\nplanet Mars"),
        ("   ", "Red.", "Red."),
    ],
)
def test_title_is_put_first_unless_it_is_there(
    tmp_path: Path, title: str, text: str, expected: str
) -> None:
    row = json.dumps({"title": title, "text": text})
    assert read_text(tmp_path, "a.jsonl", row) == expected


def test_characters_that_utf_8_cannot_write(tmp_path: Path) -> None:
    make_files(tmp_path, {"a.jsonl": r'{"id": "\ud83d", "text": "nul \u0000, half \ud83d."}'})
    document = read_corpus(tmp_path).documents[0]
    assert (document.id, document.text) == ("\ufffd", "nul , half \ufffd.")


def test_file_name_in_another_encoding(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (tmp_path / name).write_text("One.")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert read_corpus(tmp_path).documents[0].id == "caf\ufffd.txt"


def test_ids_are_made_unique(tmp_path: Path) -> None:
    ids = ["a", "b", "a", "a#2", "a"]
    rows = [json.dumps({"id": id_, "text": f"Text {index}"}) for index, id_ in enumerate(ids)]
    corpus = read_corpus(make_files(tmp_path, {"rows.jsonl": "\n".join(rows)}))
    assert [document.id for document in corpus.documents] == ["a", "b", "a#2", "a#2#2", "a#3"]


# What is skipped.


def test_reasons(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        {
            "a.txt": "The same  text.",
            "b.md": "The same\ntext.\n",
            "c.png": b"\x89PNG",
            "d.txt": b"\x00\x01",
            "e.txt": " \n\t\n",
            "f.txt": "x" * 101,
            "f.mp4": "x" * 101,
            "g.pdf": b"not a pdf, but long enough to be looked at",
            "g.csv": "text,title\n",
            "h.jsonl": 'oops\n{"text": ""}\n{"text": "Kept."}\n',
        },
    )
    corpus = read_corpus(tmp_path, max_file_bytes=100)
    assert [document.source for document in corpus.documents] == ["a.txt", "h.jsonl:3"]
    assert {item.source: item.reason for item in corpus.skipped} == {
        "b.md": "same text as a.txt",
        "c.png": "unsupported suffix '.png'",
        "d.txt": "binary",
        "e.txt": "empty",
        "f.mp4": "unsupported suffix '.mp4'",
        "g.csv": "empty",
        "f.txt": "101 bytes, more than max_file_bytes=100",
        "g.pdf": "PdfStreamError: Stream has ended unexpectedly",
        "h.jsonl:1": "not JSON: Expecting value",
        "h.jsonl:2": "empty",
    }


def test_links_below_the_corpus_are_not_followed(tmp_path: Path) -> None:
    make_files(tmp_path, {"outside/secret.txt": "Secret.", "docs/a.txt": "One."})
    docs = tmp_path / "docs"
    (docs / "folder").symlink_to(tmp_path / "outside")
    (docs / "link.txt").symlink_to(tmp_path / "outside/secret.txt")
    (docs / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    reason = "symbolic link, not followed"
    names = ("folder", "gone.txt", "link.txt")
    for source in (docs, docs / "**/*.txt"):
        corpus = read_corpus(source)
        assert [document.source for document in corpus.documents] == ["a.txt"]
        assert corpus.skipped == tuple(Skipped(name, reason) for name in names)


def test_links_are_followed_when_asked_and_nothing_is_read_twice(tmp_path: Path) -> None:
    files = ("docs/z.csv", "docs/sub/b.txt", "outside/c.txt", "outside/more/d.txt", "alone.txt")
    make_files(tmp_path, {name: f"text\n{name}\n" for name in files})
    docs, outside = tmp_path / "docs", tmp_path / "outside"
    for link, target in {
        docs / "0-first.csv": docs / "z.csv",  # before the file itself by name
        docs / "alone.txt": tmp_path / "alone.txt",
        docs / "folder": outside,
        docs / "folder-too": outside,
        docs / "sub/up": docs,  # round and round
        outside / "back": docs / "sub",
        outside / "more/over": tmp_path,  # above the corpus, and back into it
        docs / "gone.txt": tmp_path / "nowhere.txt",
        docs / "itself.txt": docs / "itself.txt",
        docs / "device.txt": Path(os.devnull),
    }.items():
        link.symlink_to(target)
    for source in (docs, docs / "**"):
        corpus = read_corpus(source, follow_links=True)
        assert [document.source for document in corpus.documents] == [
            "alone.txt",
            "folder/c.txt",
            "folder/more/d.txt",
            "sub/b.txt",
            "z.csv:2",
        ]
        assert {item.source: item.reason for item in corpus.skipped} == {
            "0-first.csv": "same file as z.csv",
            "device.txt": "not a regular file",
            "folder-too": "same folder as folder",
            "folder/back": "same folder as sub",
            "folder/more/over/alone.txt": "same file as alone.txt",
            "folder/more/over/docs": "same folder as .",
            "folder/more/over/outside": "same folder as folder",
            "gone.txt": "no such file or directory",
            "itself.txt": "too many levels of symbolic links",
            "sub/up": "same folder as .",
        }


def test_following_links_changes_no_name_that_was_there_without(tmp_path: Path) -> None:
    make_files(tmp_path, {"docs/b/one.txt": "One.", "other/two.txt": "Two."})
    (tmp_path / "docs/a").symlink_to(tmp_path / "docs/b")
    (tmp_path / "docs/c").symlink_to(tmp_path / "other")
    without = read_corpus(tmp_path / "docs")
    followed = read_corpus(tmp_path / "docs", follow_links=True)
    assert set(without.documents) < set(followed.documents)
    assert [document.id for document in followed.documents] == ["b/one.txt", "c/two.txt"]
    assert without.fingerprint != followed.fingerprint


def test_a_link_into_the_folder_that_is_left_out_is_not_followed(tmp_path: Path) -> None:
    make_files(tmp_path, {"docs/a.txt": "One.", "docs/memory/card.md": "Two."})
    (tmp_path / "docs/link.md").symlink_to(tmp_path / "docs/memory/card.md")
    (tmp_path / "docs/linked").symlink_to(tmp_path / "docs/memory")
    corpus = read_corpus(
        tmp_path / "docs", follow_links=True, exclude=tmp_path / "docs/../docs/memory"
    )
    assert ([document.id for document in corpus.documents], corpus.skipped) == (["a.txt"], ())


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_that_lead_back_end(tmp_path: Path, follow_links: bool) -> None:
    make_files(tmp_path, {"docs/a.txt": "One."})
    for name in ("up", "down"):  # every path through both, forty deep, without a guard
        (tmp_path / "docs" / name).symlink_to(tmp_path / "docs")
    for source in (tmp_path / "docs", tmp_path / "docs/**/*.txt", tmp_path / "d*/**"):
        corpus = read_corpus(source, follow_links=follow_links)
        assert [document.text for document in corpus.documents] == ["One."]
        assert len(corpus.skipped) == 2


def test_link_that_the_caller_names_is_followed(tmp_path: Path) -> None:
    make_files(tmp_path, {"blobs/1f3a": "One."})
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "blobs/1f3a")
    assert read_corpus(link).documents == (Document("a.txt", "One.", None, "a.txt"),)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(make_files(tmp_path, {"a.txt": "One."}) / "pipe.txt")
    assert read_corpus(tmp_path).skipped == (Skipped("pipe.txt", "not a regular file"),)


def test_files_and_folders_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, {"a.txt": "One.", "locked.txt": "Two.", "vault/b.txt": "Three."})
    # Permissions don't bind the superuser, as whom tests in containers run.
    read_bytes, iterdir = Path.read_bytes, Path.iterdir

    def read_bytes_unless_locked(path: Path) -> bytes:
        if path.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    def iterdir_unless_locked(path: Path) -> Iterator[Path]:
        if path.name == "vault":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes_unless_locked)
    monkeypatch.setattr(Path, "iterdir", iterdir_unless_locked)
    assert read_corpus(tmp_path).skipped == (
        Skipped("locked.txt", "permission denied"),
        Skipped("vault", "unreadable folder"),
    )


# What is refused.


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    assert read_error(tmp_path / "nowhere") == (
        f"The corpus path '{tmp_path}/nowhere' doesn't exist or can't be reached. Give a folder, "
        "a file, or a glob pattern such as 'docs/**/*.md'."
    )


def test_empty_path_is_not_the_working_directory() -> None:
    assert read_error("").startswith("The corpus path '' doesn't exist")


def test_pattern_that_matches_nothing(tmp_path: Path) -> None:
    make_files(tmp_path, {"docs/a.md": "A"})
    assert read_error(tmp_path / "d*").startswith(f"The pattern '{tmp_path}/d*' matches no file.")


def test_nothing_left_names_reasons_and_formats(tmp_path: Path) -> None:
    make_files(tmp_path, {f"{number}.png": b"\x89PNG" for number in range(7)})
    reasons = [f"  {number}.png: unsupported suffix '.png'" for number in range(5)]
    assert read_error(tmp_path).split("\n") == [
        f"No document can be read from '{tmp_path}': of 7 files, none holds usable text. Give "
        "files of these formats: .csv .docx .htm .html .jsonl .markdown .md .pdf .rst .tsv .txt",
        *reasons,
        "  and 2 more",
    ]


def test_strict_allows_no_skips(tmp_path: Path) -> None:
    make_files(tmp_path, {"a.txt": "One.", "b.png": b"\x89PNG"})
    assert read_error(tmp_path, strict=True).split("\n") == [
        f"Reading '{tmp_path}' strictly allows no skips, but 1 files or rows can't be used. Mend "
        "or remove them, or read without strict:",
        "  b.png: unsupported suffix '.png'",
    ]
    (tmp_path / "b.png").unlink()
    assert len(read_corpus(tmp_path, strict=True).documents) == 1


# The corpus as a whole.


def test_progress_counts_files(tmp_path: Path) -> None:
    make_files(tmp_path, {"a.txt": "One.", "b.png": b"\x89PNG"})
    events: list[ProgressEvent] = []
    read_corpus(tmp_path, on_progress=events.append)
    assert events == [
        ProgressEvent("corpus", 1, 2, "files"),
        ProgressEvent("corpus", 2, 2, "files"),
    ]


def test_fingerprint_depends_on_ids_texts_and_order_alone() -> None:
    def fingerprint(*pairs: tuple[str, str], source: str = "s") -> str:
        documents = tuple(Document(id_, text, None, source) for id_, text in pairs)
        return Corpus(documents, ()).fingerprint

    same = fingerprint(("a", "bc"), ("d", "e"))
    # sha256 over each part behind its length in 8 bytes
    assert same == "65d2539f9d1f1f0050ed5160e2a09110d9e04a97e5f60122927bc9681ee607c9"
    assert fingerprint(("a", "bc"), ("d", "e"), source="other") == same
    others = [
        fingerprint(("ab", "c"), ("d", "e")),
        fingerprint(("d", "e"), ("a", "bc")),
        fingerprint(("a", "bc")),
    ]
    assert same not in others


def test_sample_corpus_holds_the_answers_to_its_questions() -> None:
    corpus = read_corpus(SAMPLE / "corpus", strict=True)
    texts = {document.id: document.text for document in corpus.documents}
    lines = (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    missing = [
        (question["id"], answer)
        for question in questions
        for answer in question["answers"]
        if answer not in " ".join(texts[id_] for id_ in question["doc_ids"])
    ]
    assert (len(corpus.documents), len(questions), missing) == (88, 40, [])
