"""Vectors of the text before each row, compared with text decoded by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlpmem_rag import contexts as module
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.contexts import Contexts, encode_contexts
from mlpmem_rag.corpus import Document
from mlpmem_rag.query import PooledEncoder, Vectors
from mlpmem_rag.windows import TokenArray, Window, make_windows, tokenize


class Reader:
    """Encodes a text as its number, and keeps it."""

    name = "reader"
    size = 1

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.texts += texts
        return np.arange(len(texts), dtype=np.float32)[:, None]


@pytest.fixture(scope="module")
def token_ids(tiny_backbone: Backbone, tiny_documents: list[Document]) -> list[TokenArray]:
    """Of a document of many windows, and of two short ones."""
    long = Document("long", " ".join(d.text for d in tiny_documents[:4]), None, "long")
    return tokenize([long, *tiny_documents[4:6]], tiny_backbone.tokenizer)


@pytest.fixture(scope="module")
def windows(token_ids: list[TokenArray]) -> list[Window]:
    return make_windows(token_ids, length=80, stride=35)


@pytest.mark.parametrize(("block", "context"), [(64, 128), (10, 128), (10, 7), (1, 20)])
def test_a_row_has_the_text_before_its_block(
    tiny_backbone: Backbone,
    token_ids: list[TokenArray],
    windows: list[Window],
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    context: int,
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "CONTEXT", context)
    reader = Reader()
    found = encode_contexts(reader, tiny_backbone.tokenizer, windows)
    assert found.blocks.dtype == np.int32
    rows = [
        (window, place)
        for window in windows
        for place in range(window.context, len(window.token_ids))
    ]
    assert len(found.blocks) == len(rows) == sum(len(ids) - 1 for ids in token_ids)
    assert len(found.vectors) == len(reader.texts) == len(set(found.blocks.tolist()))
    for (window, place), number in zip(rows, found.blocks, strict=True):
        begin = window.context + (place - window.context) // block * block
        ids = token_ids[window.document][window.start : window.start + begin][-context:]
        expected = tiny_backbone.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        assert reader.texts[number] == expected
        assert found.vectors[number, 0] == number


def test_no_text_holds_what_comes_after_its_rows(
    tiny_backbone: Backbone, token_ids: list[TokenArray], windows: list[Window]
) -> None:
    reader = Reader()
    found = encode_contexts(reader, tiny_backbone.tokenizer, windows)
    whole = [
        tiny_backbone.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in token_ids
    ]
    row = 0
    for window in windows:
        for _ in range(window.num_rows):
            text = reader.texts[found.blocks[row]]
            until = token_ids[window.document][: window.start + len(window.token_ids)]
            assert text in tiny_backbone.tokenizer.decode(until.tolist())
            assert len(text) < len(whole[window.document])
            row += 1


def test_the_first_rows_of_a_document_know_nothing(
    tiny_backbone: Backbone, windows: list[Window]
) -> None:
    """Its first token is a special one: the text before is empty."""
    reader = Reader()
    found = encode_contexts(reader, tiny_backbone.tokenizer, windows)
    row = 0
    for window in windows:
        if window.start == 0:
            assert reader.texts[found.blocks[row]] == ""
        row += window.num_rows


def test_vectors_are_the_encoders_and_come_back_from_the_disk(
    tmp_path: Path, tiny_backbone: Backbone, windows: list[Window]
) -> None:
    encoder, reader = PooledEncoder(tiny_backbone), Reader()
    encode_contexts(reader, tiny_backbone.tokenizer, windows)
    contexts = encode_contexts(encoder, tiny_backbone.tokenizer, windows)
    np.testing.assert_allclose(contexts.vectors, encoder.encode(reader.texts), atol=1e-6)
    contexts.save(tmp_path)
    again = Contexts.open(tmp_path)
    np.testing.assert_array_equal(again.vectors, contexts.vectors)
    np.testing.assert_array_equal(again.blocks, contexts.blocks)


def test_without_an_encoder_there_is_nothing_to_tell(
    tiny_backbone: Backbone, windows: list[Window]
) -> None:
    found = encode_contexts(None, tiny_backbone.tokenizer, windows)
    assert found.vectors.shape == (int(found.blocks.max()) + 1, 0)
