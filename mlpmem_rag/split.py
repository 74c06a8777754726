"""Which datastore rows train the memory, which choose its settings, which measure it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.stages import stage_key

MIN_DOCUMENTS = 10
"""With fewer documents, the last parts of each one are held out instead of whole documents."""

MIN_HELD_OUT_ROWS = 16
"""A choice made on fewer tokens would be chance; nothing is held out then."""

MAX_HELD_OUT_ROWS = 50_000
"""Enough for a perplexity with a narrow interval; more only costs time."""

MAX_STUDY_HELD_OUT_ROWS = 4_096
"""The same for a self-study, which fits a few numbers to them and must answer questions about the
documents that they stand in."""

MIN_TAIL = 256
"""Of the end of a long document, where only so much is held out that not all of them can be."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, each sorted."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    by_document: bool

    @property
    def held_out_by(self) -> str | None:
        """What was held out: whole documents or passages; None when nothing was."""
        if not len(self.validation):
            return None
        return "document" if self.by_document else "passage"

    @property
    def key(self) -> str:
        """A fingerprint of what is in which part."""
        parts = (self.train, self.validation, self.test)
        return stage_key(*(hashlib.sha256(part.tobytes()).hexdigest() for part in parts))

    @property
    def num_rows(self) -> int:
        """All rows."""
        return len(self.train) + len(self.validation) + len(self.test)


def check_held_out(held_out: float) -> None:
    """Refuse a share that would leave too little to train on.

    Raises:
        ConfigError: outside 0..0.25.
    """
    if not 0.0 <= held_out <= 0.25:
        raise ConfigError(f"held_out = {held_out}: allowed are 0 (none) to 0.25")


def split_rows(
    documents: npt.NDArray[np.int32],
    *,
    held_out: float,
    seed: int,
    most: int = MAX_HELD_OUT_ROWS,
) -> Split:
    """Hold out a share of the rows for validation and as much again for the test figures.

    Args:
        documents: document index of each row. *Shape:* (N,).
        held_out: share of rows in each of the two held-out parts, 0 for none.
        seed: decides which documents are held out.
        most: rows in each of the two parts, however many a share would be.

    Raises:
        ConfigError: the share is outside 0..0.25.
    """
    check_held_out(held_out)
    num_rows = len(documents)
    wanted = min(int(held_out * num_rows), most)
    part = np.zeros(num_rows, dtype=np.int8)
    by_document = len(np.unique(documents)) >= MIN_DOCUMENTS
    if wanted >= MIN_HELD_OUT_ROWS:
        part = _whole_documents(documents, wanted, seed)
        by_document = by_document and {1, 2} <= set(part)
        if not by_document:
            part = _tails(documents, wanted, held_out, seed)
    train, validation, test = (np.flatnonzero(part == p) for p in range(3))
    return Split(train, validation, test, by_document)


def _whole_documents(
    documents: npt.NDArray[np.int32], wanted: int, seed: int
) -> npt.NDArray[np.int8]:
    names, sizes = np.unique(documents, return_counts=True)
    part = np.zeros(int(names.max()) + 1, dtype=np.int8)
    order = np.random.default_rng(seed).permutation(len(names))
    # A document that alone is more than twice what is wanted would starve the training part.
    queue = [i for i in order if sizes[i] <= 2 * wanted]
    for number in (1, 2):
        taken = 0
        while queue and taken < wanted:
            chosen = queue.pop()
            part[names[chosen]] = number
            taken += int(sizes[chosen])
    return part[documents]


def _tails(
    documents: npt.NDArray[np.int32], wanted: int, share: float, seed: int
) -> npt.NDArray[np.int8]:
    """Ends of all documents; of many long ones, ends that still hold something of as many."""
    part = np.zeros(len(documents), dtype=np.int8)
    names = np.unique(documents)
    least = wanted / len(documents)
    taken = 0
    for document in names[np.random.default_rng(seed).permutation(len(names))]:
        rows = np.flatnonzero(documents == document)
        tail = max(int(least * len(rows)), min(MIN_TAIL, int(share * len(rows))))
        if tail and taken < wanted:
            part[rows[-2 * tail : -tail]] = 1
            part[rows[-tail:]] = 2
            taken += tail
    return part
