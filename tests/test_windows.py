"""Windows: every token after a document's first is a target exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.windows import Window, make_windows, tokenize

STRIDES = st.integers(2, 12).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length - 1))
)


@given(lengths=st.lists(st.integers(0, 60), max_size=4), cut=STRIDES)
def test_every_token_is_a_target_once(lengths: list[int], cut: tuple[int, int]) -> None:
    length, stride = cut
    documents = [100 * n + np.arange(size, dtype=np.int32) for n, size in enumerate(lengths)]
    windows = make_windows(documents, length=length, stride=stride)
    targets = []
    for window in windows:
        assert 1 <= window.context < len(window.token_ids) <= length
        document = documents[window.document]
        stretch = document[window.start : window.start + len(window.token_ids)]
        np.testing.assert_array_equal(window.token_ids, stretch)
        targets += [(window.document, int(token)) for token in window.token_ids[window.context :]]
        assert window.num_rows == len(window.token_ids) - window.context
    assert targets == [(n, 100 * n + p) for n, size in enumerate(lengths) for p in range(1, size)]


def test_later_windows_see_the_overlap() -> None:
    windows = make_windows([np.arange(10, dtype=np.int32)], length=6, stride=4)
    seen = [(w.start, w.token_ids.tolist(), w.context) for w in windows]
    assert seen == [(0, [0, 1, 2, 3, 4, 5], 1), (4, [4, 5, 6, 7, 8, 9], 2)]


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 0), (8, 8), (8, 9), (8, -1)])
def test_a_bad_stride_is_refused(length: int, stride: int) -> None:
    with pytest.raises(ConfigError, match=f"window of {length} tokens with stride {stride}"):
        make_windows([np.arange(20, dtype=np.int32)], length=length, stride=stride)


def test_tokenize_keeps_order_and_special_tokens(
    tiny_backbone: Backbone, bare_folder: Path, tiny_documents: list[Document]
) -> None:
    events: list[ProgressEvent] = []
    with_start = tokenize(
        tiny_documents, tiny_backbone.tokenizer, on_progress=events.append, batch=5
    )
    bare = AutoTokenizer.from_pretrained(bare_folder)
    for document, ids in zip(tiny_documents, with_start, strict=True):
        assert ids[0] == tiny_backbone.tokenizer.bos_token_id
        assert tiny_backbone.tokenizer.decode(ids[1:]) == document.text
    for document, ids in zip(tiny_documents, tokenize(tiny_documents, bare), strict=True):
        assert bare.decode(ids) == document.text
    assert [event.done for event in events] == [5, 10, 15, 16]


def test_a_long_document_is_not_cut_by_the_tokenizer(tiny_backbone: Backbone) -> None:
    text = "wild honey " * 500
    (ids,) = tokenize([Document("long", text, None, "long")], tiny_backbone.tokenizer)
    windows: list[Window] = make_windows([ids], length=96, stride=48)
    assert tiny_backbone.tokenizer.decode(ids[1:]) == text
    assert sum(window.num_rows for window in windows) == len(ids) - 1
