"""Exact or approximate nearest neighbours of datastore rows, with FAISS.

Up to `FLAT_MAX_ROWS` the search is exact. Beyond, an IVF-PQ index proposes candidates and their
distances are computed again from the stored keys. A row is never its own neighbour: it is
left out by its number, since with ties or approximate search it need not come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError, MissingDependencyError, MLPMemError
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import allocate_array

MAX_NEIGHBORS = 1024
FLAT_MAX_ROWS = 250_000
QUERY_BATCH = 1024
MAX_CANDIDATES = 2048
"""As many as FAISS returns on a GPU."""
RERANK_FACTOR = 4
"""IVF-PQ proposes this many candidates for each neighbour kept."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Neighbors:
    """For each of N rows its K nearest others, nearest first.

    Attributes:
        ids: datastore rows; -1 where an approximate search found fewer. *Shape:* (N, K).
        distances: squared L2, ascending; infinite where the id is -1. *Shape:* (N, K).
    """

    ids: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]

    @classmethod
    def open(cls, folder: Path) -> Neighbors:
        """Map stored neighbours into memory."""
        return cls(
            np.load(folder / "ids.npy", mmap_mode="r"),
            np.load(folder / "distances.npy", mmap_mode="r"),
        )


def import_faiss() -> Any:  # noqa: ANN401  faiss has no types
    """FAISS, whichever build is installed.

    Raises:
        MissingDependencyError: none is.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "FAISS is not installed; run: pip install 'mlpmem-rag[cpu]' "
            "(or 'mlpmem-rag[gpu]' on a machine with CUDA; never both)"
        ) from error
    return faiss


def find_neighbors(
    datastore: Datastore,
    database: Rows,
    folder: Path,
    *,
    k: int = MAX_NEIGHBORS,
    flat_max_rows: int = FLAT_MAX_ROWS,
    on_progress: OnProgress = ignore_progress,
) -> Neighbors:
    """Nearest rows of `database` for every row of the datastore, stored in `folder`.

    Args:
        datastore: where keys are read from.
        database: rows that may be neighbours, sorted.
        folder: gets `ids.npy` and `distances.npy`.
        k: number of neighbours, at most 1024 and at most the rows there are besides oneself.
        flat_max_rows: database size up to which the search is exact.
        on_progress: called after each batch of queries.

    Raises:
        ConfigError: k is outside 1..1024, or the database has fewer than two rows.
    """
    if not 1 <= k <= MAX_NEIGHBORS:
        raise ConfigError(f"k = {k} neighbours: allowed are 1 to {MAX_NEIGHBORS}")
    if len(database) < 2:
        raise ConfigError(f"{len(database)} rows to search: at least 2 are needed")
    k = min(k, len(database) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (datastore.num_rows, k)
    ids = allocate_array(folder / "ids.npy", np.int32, shape)
    distances = allocate_array(folder / "distances.npy", np.float32, shape)
    exact = len(database) <= flat_max_rows
    centre = key_centre(datastore, database)
    index = (flat_index if exact else ivfpq_index)(datastore, database, centre)
    on_progress(ProgressEvent("neighbors", 0, datastore.num_rows, "rows"))
    for first in range(0, datastore.num_rows, QUERY_BATCH):
        rows = np.arange(first, min(first + QUERY_BATCH, datastore.num_rows))
        queries = datastore.keys(rows)
        if exact:
            found_distances, found = index.search(queries - centre, k + 1)
            found = np.where(found >= 0, database[found], -1)
        else:
            wanted = min(RERANK_FACTOR * (k + 1), MAX_CANDIDATES)
            _, candidates = index.search(queries - centre, wanted)
            candidates = np.where(candidates >= 0, database[candidates], -1)
            found, found_distances = rerank(datastore, queries, candidates)
        ids[rows], distances[rows] = drop_self(rows, found, found_distances, k)
        on_progress(ProgressEvent("neighbors", int(rows[-1]) + 1, datastore.num_rows, "rows"))
    ids.flush()
    distances.flush()
    return Neighbors.open(folder)


def key_centre(datastore: Datastore, database: Rows) -> npt.NDArray[np.float32]:
    """Mean of the keys (of a sample of them). *Shape:* (D,).

    Taken off before the search: it changes no distance, but FAISS computes them as differences
    of large products, and an offset common to all keys would cost float32 its digits.
    """
    step = max(1, len(database) // 65_536)
    mean: npt.NDArray[np.float32] = datastore.keys(database[::step]).mean(0)
    return mean


def flat_index(datastore: Datastore, database: Rows, centre: npt.NDArray[np.float32]) -> Any:  # noqa: ANN401
    """An exact index over the given rows, on the GPU where FAISS has one."""
    faiss = import_faiss()
    index = on_gpu(faiss.IndexFlatL2(datastore.key_size))
    for rows in _batches(database):
        index.add(datastore.keys(rows) - centre)
    return index


def ivfpq_index(datastore: Datastore, database: Rows, centre: npt.NDArray[np.float32]) -> Any:  # noqa: ANN401
    """An inverted-file, product-quantised index: 4·√N lists, at most 64 bytes a row.

    The paper's figures (4096 lists, 32 probed, 64 bytes) are what this gives at a million rows.
    """
    faiss = import_faiss()
    dim = datastore.key_size
    lists = int(min(4 * np.sqrt(len(database)), len(database) / 40))
    pieces = max(m for m in range(1, 65) if dim % m == 0)
    quantizer = faiss.IndexFlatL2(dim)
    index = faiss.IndexIVFPQ(quantizer, dim, lists, pieces, 8)
    index.nprobe = max(32, lists // 128)
    sample = np.random.default_rng(0).choice(
        database, size=min(len(database), max(64 * lists, 65_536)), replace=False
    )
    index = on_gpu(index)
    index.train(datastore.keys(np.sort(sample)) - centre)
    for rows in _batches(database):
        index.add(datastore.keys(rows) - centre)
    return index


def on_gpu(index: Any) -> Any:  # noqa: ANN401
    """The index on the first GPU when FAISS was built for one and sees it, else as it is."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return index
    options = faiss.GpuClonerOptions()
    # Look-up tables of 64 sub-quantisers fit into shared memory only in half precision.
    options.useFloat16 = isinstance(index, faiss.IndexIVFPQ)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def rerank(
    datastore: Datastore, queries: npt.NDArray[np.float32], candidates: Rows
) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Candidates sorted by their exact distance, the missing ones (-1) last.

    *Shapes:* queries (R, D), candidates (R, C) -> (R, C), (R, C).
    """
    distances = np.full(candidates.shape, np.inf, dtype=np.float32)
    for line, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
        there = rows >= 0
        difference = datastore.keys(rows[there]) - query
        distances[line, there] = np.einsum("cd,cd->c", difference, difference)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(candidates, order, 1), np.take_along_axis(distances, order, 1)


def drop_self(
    rows: Rows, found: Rows, distances: npt.NDArray[np.float32], k: int
) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Leave each row itself out, keep the k nearest, and verify what the search returned.

    *Shapes:* (R,), (R, C), (R, C) -> (R, k), (R, k).

    Raises:
        MLPMemError: a distance is negative beyond rounding or not a number.
    """
    distances = np.where(found >= 0, distances, np.inf)
    if np.isnan(distances).any() or (distances < -1e-3).any():
        raise MLPMemError("the index returned impossible distances; check the FAISS installation")
    distances = np.maximum(distances, 0.0)
    distances[found == rows[:, None]] = np.nan  # sorts behind everything, infinity included
    # Sorting here, since not every FAISS build returns neighbours in order.
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(found, order, 1)
    distances = np.take_along_axis(distances, order, 1).astype(np.float32)
    own = np.isnan(distances)  # fewer than k others were found
    return np.where(own, -1, ids), np.where(own, np.float32(np.inf), distances)


def _batches(rows: Rows, size: int = 65_536) -> Iterator[Rows]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
