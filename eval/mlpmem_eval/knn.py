"""kNN-LM, the memory's teacher: the datastore is searched at every token.

Khandelwal et al., arXiv 1911.00172.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpmem_rag.artifact import WORK, Manifest
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.index import (
    FLAT_MAX_ROWS,
    MAX_CANDIDATES,
    RERANK_FACTOR,
    Rows,
    flat_index,
    ivfpq_index,
    key_centre,
    rerank,
)
from mlpmem_rag.memory import Memory
from mlpmem_rag.provenance import documents_of
from mlpmem_rag.targets import neighbor_weights

Floats = npt.NDArray[np.float32]
FAR = 1000.0
"""Times the largest number in a key: no row of the corpus is so far from another."""

LAMBDAS = (0.25, 0.5, 0.75)
"""Mixing weights to choose from; the paper uses .25 for text and .5 to .75 for questions."""


class NeighborMemory(torch.nn.Module):
    """The votes of the nearest rows, in the place of a memory.

    Args:
        memory: gives the corpus vocabulary. Who votes for the next token sees no query vector.
        datastore: rows of the corpus.
        tau: temperature of the votes.
        k: rows that vote.
    """

    def __init__(self, memory: Memory, datastore: Datastore, tau: float, k: int) -> None:
        super().__init__()
        self.config = replace(
            memory.config, query_size=0, num_questions=0, recalls=False, draft_size=0
        )
        self.corpus_tokens = memory.corpus_tokens
        rows = np.arange(datastore.num_rows)
        self._centre = key_centre(datastore, rows)
        self._exact = len(rows) <= FLAT_MAX_ROWS
        make = flat_index if self._exact else ivfpq_index
        device = memory.corpus_tokens.device
        self._index: Any = make(datastore, rows, self._centre, device)
        self._datastore = datastore
        self.tau, self.k = tau, min(k, len(rows))
        self._columns = _columns(memory, datastore.next_tokens)

    @property
    def num_rows(self) -> int:
        """Of the corpus."""
        return self._datastore.num_rows

    def log_probs(
        self, hidden: Tensor, query: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """As `Memory.log_probs`; tokens that no neighbour names have -inf.

        *Shapes:* (..., D) -> (..., V).
        """
        keys = hidden.reshape(-1, hidden.shape[-1]).to(torch.float16).float().cpu().numpy()
        distances, ids = self._nearest(keys)
        weights = neighbor_weights(distances, self.tau * temperature)
        votes = torch.zeros(len(keys), len(self.corpus_tokens))
        votes.scatter_add_(1, torch.from_numpy(self._columns[ids]), torch.from_numpy(weights))
        return votes.log().reshape(*hidden.shape[:-1], -1).to(hidden.device)

    def add_far_rows(self, count: int) -> None:
        """Rows that are searched and too far away to vote, to see what a larger datastore costs."""
        keys = self._datastore.keys(np.arange(self._datastore.num_rows)) - self._centre
        keys[:, 0] += FAR * np.abs(keys).max()
        for first in range(0, count, len(keys)):
            self._index.add(keys[: count - first])

    def _nearest(self, keys: Floats) -> tuple[Floats, Rows]:
        """Distances and rows, nearest first. *Shape:* (R, D) -> (R, K), (R, K)."""
        if not self._exact:
            wanted = min(RERANK_FACTOR * self.k, MAX_CANDIDATES)
            _, candidates = self._index.search(keys - self._centre, wanted)
            ids, distances = rerank(self._datastore, keys, candidates)
            return distances[:, : self.k], ids[:, : self.k]
        distances, ids = self._index.search(keys - self._centre, self.k)
        distances = np.maximum(distances, 0.0)
        order = np.argsort(distances, axis=1, kind="stable")  # not every build sorts
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def open_teacher(folder: Path, manifest: Manifest, memory: Memory) -> NeighborMemory:
    """The teacher of a trained memory, from the rows that its training kept.

    Raises:
        ArtifactError: `work/` was deleted, or is of another training.
        ConfigError: the manifest has no temperature.
    """
    documents_of(folder)
    store = folder / WORK / "datastore"
    try:
        datastore = Datastore.open(store)
    except (ArtifactError, OSError) as error:
        raise ArtifactError(
            f"the arm 'knn' needs the datastore that training left in {store}, and it is not "
            "there; train again, or leave the arm out"
        ) from error
    tau = manifest.figures.get("tau")
    if not isinstance(tau, float) or tau <= 0:
        raise ConfigError(f"the manifest of {folder} has tau {tau!r}; train the memory again")
    return NeighborMemory(memory, datastore, tau, int(manifest.training.get("neighbors", 1024)))


def _columns(memory: Memory, next_tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The memory's column of each row's next token. *Shape:* (N,)."""
    tokens: npt.NDArray[Any] = memory.corpus_tokens.cpu().numpy()
    columns = np.searchsorted(tokens, next_tokens)
    found = tokens[np.minimum(columns, len(tokens) - 1)]
    if (found != next_tokens).any():
        raise ArtifactError(
            "the datastore holds tokens that the memory does not know: they are of different "
            "trainings; train again"
        )
    return columns.astype(np.int64)
