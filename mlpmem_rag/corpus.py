"""Reads a folder, a file or a glob pattern into documents with unique ids and clean text.

Knows neither how files are found (see `files`) nor their formats (see `readers`), and no tokens.
What can't be used is listed, never dropped in silence and never the end of the run.
"""

from __future__ import annotations

import hashlib
import stat
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mlpmem_rag.errors import CorpusError
from mlpmem_rag.files import Found, find_files
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.readers import (
    SUPPORTED_SUFFIXES,
    Record,
    UnreadableFileError,
    read_records,
)

_MAX_REASONS = 5
_HEADING_MARKUP = "#" + string.whitespace

# Typesetting that would only split words into rare tokens: fixed spaces become plain ones, and
# soft hyphens go, as do NULs.
_TYPESETTING = str.maketrans({"\u00a0": " ", "\u202f": " ", "\u00ad": None, "\x00": None})

# A source with the record read from it, or with the reason why there is none.
_Entry = tuple[str, Record | str]


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Attributes:
        id: Unique in the corpus: the id that the row gave, else `source`.
        text: Normalised text, which begins with the title if there is one.
        title: The title that the file gave, if any.
        source: Path relative to the corpus root, with `:line` for a row of a csv, tsv or jsonl.
    """

    id: str
    text: str
    title: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or row that isn't in the corpus, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """The documents that were read, in the order of their sources, and what was left out."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids and texts in order, as hex: equal exactly when the documents are."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.id.encode(), document.text.encode()):
                # Lengths keep ("ab", "c") and ("a", "bc") apart.
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()


def read_corpus(
    source: str | Path,
    *,
    max_file_bytes: int = 64 * 2**20,
    strict: bool = False,
    follow_links: bool = False,
    exclude: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Read every supported text below a path.

    Hidden files and folders are left out. A symbolic link that `source` names is followed; one
    found on the way is skipped: it may lead out of the folder, or back into it.

    Args:
        source: A folder (read with its subfolders), a file, or a glob pattern, in which `**`
            stands for any number of folders.
        max_file_bytes: Larger files are skipped.
        strict: Whether a skipped file or row is an error.
        follow_links: Whether links found on the way are followed too, each file and folder once.
        exclude: A folder below `source` that isn't read: where the memory is written to, say.
        on_progress: Called after every file, with stage "corpus".

    Returns:
        At least one document, and the reason for each file or row that was skipped.

    Raises:
        CorpusError: If the path doesn't exist, the pattern matches nothing, no document is left,
            or `strict` is set and something was skipped.
    """
    on_progress = on_progress or ignore_progress
    root, files = find_files(source, follow_links=follow_links, exclude=exclude)
    entries: list[_Entry] = []
    for done, found in enumerate(files, start=1):
        entries += _read_file(found, root, max_file_bytes)
        on_progress(ProgressEvent("corpus", done, len(files), "files"))
    corpus = _assemble(entries)
    _check_yield(corpus, len(files), str(source), strict)
    return corpus


def make_corpus(records: Iterable[Record]) -> Corpus:
    """Documents that are in memory already, cleaned and checked as those of files are.

    Args:
        records: texts with an id each, which is kept as it is.

    Raises:
        CorpusError: no text is left, or two have the same id.
    """
    # As sources, ids are not changed as those of rows in files are.
    entries = [(record.id or "", replace(record, id=None)) for record in records]
    ids = [source for source, _ in entries]
    if not all(ids) or len(set(ids)) < len(ids):
        raise CorpusError("every document needs an id of its own; give them different ids")
    corpus = _assemble(entries)
    if not corpus.documents:
        raise CorpusError(f"none of {len(ids)} documents holds text; give some with text")
    return corpus


def _check_yield(corpus: Corpus, num_files: int, source: str, strict: bool) -> None:
    """Refuse a corpus without documents and, if `strict`, one with skips."""
    reasons = "".join(f"\n  {item.source}: {item.reason}" for item in corpus.skipped[:_MAX_REASONS])
    if len(corpus.skipped) > _MAX_REASONS:
        reasons += f"\n  and {len(corpus.skipped) - _MAX_REASONS} more"
    if not corpus.documents:
        raise CorpusError(
            f"No document can be read from {source!r}: of {num_files} files, none holds usable "
            f"text. Give files of these formats: {' '.join(sorted(SUPPORTED_SUFFIXES))}{reasons}"
        )
    if strict and corpus.skipped:
        raise CorpusError(
            f"Reading {source!r} strictly allows no skips, but {len(corpus.skipped)} files or rows "
            f"can't be used. Mend or remove them, or read without strict:{reasons}"
        )


def _read_file(found: Found, root: Path, max_bytes: int) -> list[_Entry]:
    """Read the entries of one file, of which the only one may be why there are none."""
    name = _repair(found.path.relative_to(root).as_posix())
    if found.problem is not None:
        return [(name, _repair(found.problem))]
    try:
        _check_status(found.path, max_bytes)
        records, problems = read_records(found.path)
    except UnreadableFileError as error:
        return [(name, str(error))]
    if not records and not problems:  # a table without rows
        return [(name, "empty")]
    return [
        *((_at_line(name, record.line), record) for record in records),
        *((_at_line(name, line), reason) for line, reason in problems),
    ]


def _at_line(name: str, line: int | None) -> str:
    return name if line is None else f"{name}:{line}"


def _check_status(path: Path, max_bytes: int) -> None:
    """Refuse what should not even be opened."""
    try:
        status = path.stat()
    except OSError as error:
        raise UnreadableFileError((error.strerror or "unreadable").lower()) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFileError("not a regular file")
    if status.st_size > max_bytes and path.suffix.lower() in SUPPORTED_SUFFIXES:
        raise UnreadableFileError(f"{status.st_size} bytes, more than max_file_bytes={max_bytes}")


def _assemble(entries: Iterable[_Entry]) -> Corpus:
    """Make documents of the records that hold new text."""
    documents: list[Document] = []
    skipped: list[Skipped] = []
    first_sources: dict[bytes, str] = {}
    id_counts: dict[str, int] = {}
    for source, entry in entries:
        if isinstance(entry, str):
            skipped.append(Skipped(source, entry))
            continue
        text = _normalise(entry.text)
        if not text:
            skipped.append(Skipped(source, "empty"))
            continue
        title = _one_line(entry.title)
        text = _begin_with_title(text, title)
        first_source = first_sources.setdefault(_content_key(text), source)
        if first_source != source:
            skipped.append(Skipped(source, f"same text as {first_source}"))
            continue
        unique_id = _make_unique(_one_line(entry.id) or source, id_counts)
        documents.append(Document(unique_id, text, title, source))
    return Corpus(tuple(documents), tuple(skipped))


def _normalise(text: str) -> str:
    """Bring text into one form: Unix line ends, no trailing or fixed spaces, Unicode NFC."""
    text = _repair(text).translate(_TYPESETTING).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _one_line(text: str | None) -> str | None:
    return " ".join(_normalise(text).split()) or None if text else None


def _repair(text: str) -> str:
    """Compose characters, and replace the halves of a character that UTF-8 can't write.

    Such halves come from truncated escapes in JSON and from file names in another encoding.
    """
    paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return unicodedata.normalize("NFC", paired)


def _begin_with_title(text: str, title: str | None) -> str:
    """Put the title on a line of its own, where the language model sees it, unless it's there."""
    if title is None:
        return text
    opening = " ".join(text.lstrip(_HEADING_MARKUP).split(maxsplit=len(title.split())))
    is_there = opening[: len(title)].casefold() == title.casefold()
    is_part_of_word = opening[len(title) : len(title) + 1].isalnum()
    return text if is_there and not is_part_of_word else f"{title}\n\n{text}"


def _content_key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _make_unique(wanted: str, counts: dict[str, int]) -> str:
    """Append "#2", "#3" and so on to an id that is taken; `counts` remembers each id's uses."""
    unique = wanted
    while unique in counts:
        counts[wanted] += 1
        unique = f"{wanted}#{counts[wanted]}"
    counts[unique] = 1
    return unique
