"""The words of texts, as a sentence encoder sees them: one vector a token.

Tokens know the text around them, so that the same word has other vectors in other texts. They are
kept in few dimensions and eight bits; see `mlpmem_rag.late_interaction` for what they are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlpmem_rag.late_interaction import (
    QUESTION_TOKENS,
    REQUEST_TOKENS,
    SCALE,
    SENTENCE_TOKENS,
    TOKEN_SIZE,
    TokenTable,
    WordRows,
)
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.query import QueryEncoder, SentenceEncoder, Vectors, quickened
from mlpmem_rag.questions import Question
from mlpmem_rag.storage import save_array, write_json

NOTE = "words.json"
PIECE = 512
"""Texts whose tokens are there at once, each of them padded to the longest."""
FITTED_SENTENCES = 2048
"""That the projection is fitted on, at most."""
WORDS_KEY = [TOKEN_SIZE, QUESTION_TOKENS, SENTENCE_TOKENS, FITTED_SENTENCES]
"""What decides them, besides encoder and questions."""
ARRAYS, TABLES = ("query_vectors", "source_vectors", "projection"), ("questions", "sentences")
"""Fields of `WordRows`, in their order."""


def word_rows(
    encoder: QueryEncoder | None,
    questions: Sequence[Question],
    *,
    on_progress: OnProgress = ignore_progress,
) -> WordRows | None:
    """Of questions and of the sentences that answer them, in the order of `StudyRows.sources`.

    None where the encoder shows no tokens, or such as are of another width than its texts.
    """
    if not isinstance(encoder, SentenceEncoder):
        return None
    sentences = list(dict.fromkeys(question.source for question in questions))
    total = len(questions) + len(sentences)
    projection = fit_projection(encoder, sentences)
    if projection is None:
        return None

    def tell(done: int) -> None:
        on_progress(ProgressEvent("words", done, total, "texts"))

    asked, questioned = token_table(
        encoder, [q.text for q in questions], projection, QUESTION_TOKENS, tell
    )
    read, told = token_table(
        encoder, sentences, projection, SENTENCE_TOKENS, lambda done: tell(len(questions) + done)
    )
    if not len(questioned.codes) or not len(told.codes):
        return None
    return WordRows(asked, read, projection, questioned, told)


def save_words(rows: WordRows | None, folder: Path) -> None:
    """Write one `.npy` for each array, and whether there are any."""
    write_json(folder / NOTE, {"shown": rows is not None})
    if rows is None:
        return
    for name in ARRAYS:
        save_array(folder / f"{name}.npy", getattr(rows, name))
    for name in TABLES:
        table: TokenTable = getattr(rows, name)
        save_array(folder / f"{name}-codes.npy", table.codes)
        save_array(folder / f"{name}-ends.npy", table.ends)


def open_words(folder: Path) -> WordRows | None:
    """Read what `save_words` wrote."""
    if not json.loads((folder / NOTE).read_text())["shown"]:
        return None
    arrays = (np.load(folder / f"{name}.npy") for name in ARRAYS)
    tables = (
        TokenTable(np.load(folder / f"{n}-codes.npy"), np.load(folder / f"{n}-ends.npy"))
        for n in TABLES
    )
    return WordRows(*arrays, *tables)


def fit_projection(
    encoder: SentenceEncoder, sentences: Sequence[str]
) -> npt.NDArray[np.float32] | None:
    """The directions in which tokens of the corpus have most of their length. *Shape:* (Q, T).

    Not centred: what counts later are the vectors' products. None where there are no tokens, or
    such as are of another width.
    """
    fitted = list(sentences)[:: max(1, math.ceil(len(sentences) / FITTED_SENTENCES))]
    products = np.zeros((encoder.size, encoder.size))
    for start in range(0, len(fitted), PIECE):
        with quickened(encoder):
            _, tokens = encoder.encode_tokens(fitted[start : start + PIECE])
        vectors = np.concatenate(tokens) if tokens else np.zeros((0, 0), np.float32)
        if not (len(vectors) and TOKEN_SIZE <= vectors.shape[1] == encoder.size):
            return None
        products += vectors.T.astype(np.float64) @ vectors
    _, directions = np.linalg.eigh(products)
    return np.ascontiguousarray(directions[:, ::-1][:, :TOKEN_SIZE], dtype=np.float32)


def token_table(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    projection: npt.NDArray[np.float32],
    most: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> tuple[Vectors, TokenTable]:
    """Texts' vectors, and the first tokens of each, at most so many. *Shapes:* (Q, T) -> (N, Q)."""
    vectors = np.zeros((len(texts), encoder.size), np.float32)
    codes, counts = [np.zeros((0, projection.shape[1]), np.int8)], [0]
    for start in range(0, len(texts), PIECE):
        piece = texts[start : start + PIECE]
        with quickened(encoder):
            vectors[start : start + len(piece)], tokens = encoder.encode_tokens(piece)
        for words in tokens or ():
            kept = words[:most] @ projection
            kept /= np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)
            codes.append(np.rint(kept * SCALE).astype(np.int8))
            counts.append(len(kept))
        on_done(start + len(piece))
    return vectors, TokenTable(np.concatenate(codes), np.cumsum(counts[1:], dtype=np.int32))


def requests(encoder: QueryEncoder, texts: Sequence[str], *, words: bool) -> Vectors:
    """What is asked: each text's vector, and those of its first and last tokens behind it.

    Args:
        encoder: of the memory that is asked.
        texts: N of them.
        words: whether the memory compares words; without, the vectors are all there is.

    Returns:
        Rows of zeros where there are no more tokens. *Shape:* (N, Q), or (N, Q + L * Q).
    """
    if not words or not isinstance(encoder, SentenceEncoder):
        return encoder.encode(texts)
    vectors, tokens = encoder.encode_tokens(texts)
    asked = np.zeros((len(texts), REQUEST_TOKENS, encoder.size), np.float32)
    for row, those in zip(asked, tokens or (), strict=False):
        cut = np.concatenate([those[:1], those[1:][1 - REQUEST_TOKENS :]])
        row[: len(cut)] = cut
    return np.concatenate([vectors, asked.reshape(len(texts), -1)], axis=1)
