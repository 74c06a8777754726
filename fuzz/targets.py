"""The readers of strangers' files: any bytes are read or refused in words, and nothing else.

Each target takes bytes, has the library read them, and checks what came back. An error that is not
the library's own, a crash or a wrong result is a finding. `run.py` makes the bytes up by coverage,
`tests/test_fuzz.py` by hypothesis.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from mlpmem_rag.artifact import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS,
    Manifest,
    MemorySettings,
    file_problems,
    load_manifest,
    load_memory,
    load_settings,
)
from mlpmem_rag.backbone import BaseReference
from mlpmem_rag.configuration import MODEL_TYPE
from mlpmem_rag.corpus import Document, read_corpus
from mlpmem_rag.errors import ArtifactError, ConfigError, CorpusError
from mlpmem_rag.gate import Gate
from mlpmem_rag.integrity import is_inside
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.readers import SUPPORTED_SUFFIXES
from mlpmem_rag.tensors import is_finite
from mlpmem_rag.writers import OwnQuestions

DOCUMENTS = (
    Document("mill", "In the mill, Ines Maro found honey. It was sold for 42 crowns.", None, "a"),
    Document("quay", "In the harbour, Dr. Tollen lost 42 crowns. It rained.", None, "b"),
)
SHAPE = MemoryConfig(
    *(4, 3, 1, "silu"),
    gated=True,
    vocab_size=5,
    query_size=2,
    num_questions=3,
    recalls=True,
    draft_size=1,
    num_question_tokens=4,
    num_sentences=2,
    num_sentence_tokens=3,
)
SUFFIXES = (*sorted(SUPPORTED_SUFFIXES), ".xml")
"""`.xml` stands for the text part of a Word document, whose archive made-up bytes never are."""
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def manifest(data: bytes, folder: Path) -> None:
    """A manifest: read, and nothing that it names lies outside."""
    (folder / MANIFEST).write_bytes(data)
    with suppress(ArtifactError):
        read = load_manifest(folder)
        said = list(file_problems(folder, read))
        outside = [name for name in read.files if not is_inside(name)]
        assert len(said) >= len(outside)


def config(data: bytes, folder: Path) -> None:
    """A memory's configuration: read, with numbers that are in range."""
    (folder / CONFIG).write_bytes(data)
    with suppress(ArtifactError):
        settings = load_settings(folder)
        assert 0.0 <= settings.memory_lambda <= 1.0
        assert settings.memory_temperature > 0.0
        assert settings.memory.width > 0


def weights(data: bytes, folder: Path) -> None:
    """A memory's weights: read, all finite, or refused."""
    (folder / WEIGHTS).write_bytes(data)
    with suppress(ArtifactError):
        memory = load_memory(folder, SHAPE, num_tokens=9)
        assert all(is_finite(parameter) for parameter in memory.parameters())
        requests = torch.ones(2, SHAPE.request_size)
        assert all(0 <= number < 3 for number in memory.nearest(requests).tolist())


def questions(data: bytes, folder: Path) -> None:
    """A file of questions: each has a text and an answer, and stands in a document."""
    path = folder / "own.jsonl"
    path.write_bytes(data)
    known = {document.id for document in DOCUMENTS}
    with suppress(ConfigError):
        for question in OwnQuestions(path).write(DOCUMENTS):
            assert question.text.strip()
            assert question.answer.strip()
            assert question.document in {"", *known}


def corpus(data: bytes, folder: Path) -> None:
    """A document in any format, by the first byte: clean text under its own name."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".txt"
    content = word_document(data[1:]) if suffix == ".xml" else data[1:]
    path = folder / f"document{'.docx' if suffix == '.xml' else suffix}"
    path.write_bytes(content)
    try:
        with suppress(CorpusError):
            documents = read_corpus(folder).documents
            assert len({document.id for document in documents}) == len(documents)
            for document in documents:
                assert document.text.strip("\n") == document.text != ""
                assert "\0" not in document.text
                document.text.encode()
    finally:
        path.unlink()


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target for target in (manifest, config, weights, questions, corpus)
}


def word_document(body: bytes) -> bytes:
    """The smallest archive whose text part is `body`."""
    buffer = io.BytesIO()
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
        )
        archive.writestr("word/document.xml", body)
    return buffer.getvalue()


def seeds(target: str) -> list[bytes]:
    """Valid inputs to begin with."""
    base = BaseReference("base", None, "w", "t", 300)
    gate = Gate((0.0,) * 6, (0.5,) * 6)
    settings = MemorySettings(base, 2, SHAPE, 0.4, 1.3, gate=gate)
    listed = {name: {"sha256": "a" * 64, "bytes": 3} for name in (CONFIG, WEIGHTS, "README.md")}
    empty: dict[str, str] = {}
    stored = Manifest(FORMAT_VERSION, "2020", "r", empty, empty, empty, empty, listed)
    question = {"question": "Who found honey?", "answers": ["Ines"], "doc_ids": ["mill"]}
    texts = {
        "manifest": [json.dumps(asdict(stored)).encode()],
        "config": [json.dumps({"model_type": MODEL_TYPE, **asdict(settings)}).encode()],
        "weights": [_weights()],
        "questions": [json.dumps(question).encode(), b'{"text": "a", "answer": "b"}\n\n'],
        "corpus": [bytes([n]) + _document(suffix) for n, suffix in enumerate(SUFFIXES)],
    }
    return texts[target]


def _weights() -> bytes:
    from safetensors.torch import save

    return save(Memory(SHAPE).state_dict())


def _document(suffix: str) -> bytes:
    """A small file of each kind."""
    paragraph = "<w:p><w:r><w:t>The lake</w:t></w:r></w:p>"
    word = f'<w:document xmlns:w="{WORD}"><w:body>{paragraph}</w:body></w:document>'.encode()
    html = b"<html><title>Lake</title><body><h1>Orsa</h1><p>The <b>lake</b>.<ul><li>a</ul><table>"
    known = {
        ".xml": word,
        ".docx": word_document(word),
        ".html": html,
        ".htm": html,
        ".pdf": b"%PDF-1.4\n1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj\ntrailer <</Root 1 0 R>>",
        ".csv": b'id,title,text\n1,Orsa,"The lake, deep"\n',
        ".tsv": b"id\ttext\n1\tThe lake\n",
        ".jsonl": b'{"id": 1, "title": "Orsa", "text": "The lake"}\n',
        ".rst": b"Orsa\n====\n\nThe *lake*. [1]_\n\n.. [1] deep\n\n* a\n\n  * b\n\n::\n\n  code\n",
    }
    return known.get(suffix, b"# Orsa\n\nThe lake, na\xc3\xafve.\n")
