"""Documents become token windows; every token after a document's first is a target once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.corpus import Document
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of one document. Tokens before `context` are seen but not predicted here.

    Attributes:
        document: index of the document in its corpus.
        start: position of the first token in the document.
        token_ids: *Shape:* (T,).
        context: number of leading tokens that are no targets, at least one.
    """

    document: int
    start: int
    token_ids: TokenArray
    context: int

    @property
    def num_rows(self) -> int:
        """Number of targets: one datastore row each."""
        return len(self.token_ids) - self.context


def tokenize(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_progress: OnProgress = ignore_progress,
    batch: int = 64,
) -> list[TokenArray]:
    """Token ids of each document, with the special tokens the tokenizer itself puts around text."""
    token_ids: list[TokenArray] = []
    for first in range(0, len(documents), batch):
        texts = [document.text for document in documents[first : first + batch]]
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        token_ids += [np.asarray(ids, dtype=np.int32) for ids in encoded]
        on_progress(ProgressEvent("tokenize", len(token_ids), len(documents), "documents"))
    return token_ids


def make_windows(
    token_ids: Sequence[TokenArray], *, length: int = 1024, stride: int = 512
) -> list[Window]:
    """Cut each document into overlapping windows.

    A later window predicts only what the earlier ones have not; the overlap of
    `length - stride` tokens is its context.

    Raises:
        ConfigError: unless 2 <= length and 1 <= stride < length.
    """
    if length < 2 or not 1 <= stride < length:
        raise ConfigError(
            f"window of {length} tokens with stride {stride}: allowed are windows of at least 2 "
            "tokens and a stride from 1 to the window minus 1"
        )
    return [
        window
        for document, ids in enumerate(token_ids)
        for window in _document_windows(document, ids, length, stride)
    ]


def _document_windows(document: int, ids: TokenArray, length: int, stride: int) -> Iterator[Window]:
    predicted = 1  # the first token has nothing before it
    start = 0
    while predicted < len(ids):
        end = min(start + length, len(ids))
        yield Window(document, start, ids[start:end], context=predicted - start)
        predicted = end
        start += stride
