"""Query vectors for plain text: where nobody asks, the text so far stands for the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.query import QueryEncoder, Vectors, encoded
from mlpmem_rag.storage import save_array
from mlpmem_rag.windows import Window

BLOCK = 64
"""Rows that share a vector: in use, too, it is computed once and serves what follows."""
CONTEXT = 128
"""Tokens before a block that its vector is made from."""


@dataclass(frozen=True)
class Contexts:
    """The text before each row of a datastore, as the encoder sees it.

    Attributes:
        vectors: of C stretches of text. *Shape:* (C, Q).
        blocks: the stretch before each row. *Shape:* (N,).
    """

    vectors: Vectors
    blocks: npt.NDArray[np.int32]

    def save(self, folder: Path) -> None:
        """Write one `.npy` a field."""
        save_array(folder / "context_vectors.npy", self.vectors)
        save_array(folder / "context_blocks.npy", self.blocks)

    @classmethod
    def open(cls, folder: Path) -> Contexts:
        """Read what `save` wrote."""
        return cls(np.load(folder / "context_vectors.npy"), np.load(folder / "context_blocks.npy"))


def encode_contexts(
    encoder: QueryEncoder | None, tokenizer: PreTrainedTokenizerBase, windows: Sequence[Window]
) -> Contexts:
    """Vectors for the rows of `windows`, in the datastore's order."""
    texts: list[str] = []
    blocks: list[int] = []
    for window in windows:
        for row in range(window.num_rows):
            if row % BLOCK == 0:
                place = window.context + row
                before = window.token_ids[max(0, place - CONTEXT) : place]
                texts.append(str(tokenizer.decode(before.tolist(), skip_special_tokens=True)))
            blocks.append(len(texts) - 1)
    return Contexts(encoded(encoder, texts), np.array(blocks, dtype=np.int32))
