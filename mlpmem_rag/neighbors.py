"""The nearest neighbours of every datastore row, exact or approximate.

Up to `exact_rows` the search is exact, beyond that it looks into the nearest cells of a clustering
(`cells.py`). A row is never its own neighbour: it is left out by its number, since with ties or
approximate search it need not come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mlpmem_rag.behind import behind
from mlpmem_rag.cells import SCRATCH, CellSearch
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError, MLPMemError
from mlpmem_rag.index import (
    CPU,
    FLAT_MAX_ROWS,
    Floats,
    Rows,
    Searched,
    StoredIndex,
    centred,
    flat_index,
    key_centre,
    stretches,
)
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import allocate_array
from mlpmem_rag.torch_index import free_bytes

MAX_NEIGHBORS = 1024
QUERY_BATCH = 4096
"""Rows searched at once; FAISS goes through all keys for each, and takes their squares anew."""
BYTES_ON_GPU = 6
"""Of a number in a key: in half and in single precision."""


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


class Search(Protocol):
    """Neighbours of all rows of a datastore, some rows at a time."""

    def groups(self) -> Iterator[Rows]:
        """Every row once, in an order that suits the search. *Shape:* (R,)."""

    def search(self, rows: Rows, k: int) -> tuple[Rows, Floats]:
        """Their k nearest, themselves among them. *Shape:* (R,) -> (R, k), (R, k)."""


class FlatSearch:
    """Every row against every row of the database."""

    def __init__(
        self,
        datastore: Datastore,
        database: Rows,
        centre: Floats,
        device: torch.device,
        *,
        in_memory: bool = True,
    ) -> None:
        self._datastore = datastore
        self._database = database
        self._centre = centre
        self._index: Searched = (
            flat_index(datastore, database, centre, device)
            if in_memory
            else StoredIndex(datastore, database, centre)
        )

    def groups(self) -> Iterator[Rows]:
        """Rows in their order."""
        return stretches(np.arange(self._datastore.num_rows), QUERY_BATCH)

    def search(self, rows: Rows, k: int) -> tuple[Rows, Floats]:
        """As `Search` says; -1 where there are fewer."""
        distances, found = self._index.search(centred(self._datastore, rows, self._centre), k)
        if len(self._database) == self._datastore.num_rows:  # their places are their numbers
            return found, distances
        ids = self._database[found]
        ids[found < 0] = -1
        return ids, distances


def find_neighbors(
    datastore: Datastore,
    database: Rows,
    folder: Path,
    *,
    k: int = MAX_NEIGHBORS,
    flat_max_rows: int | None = None,
    device: torch.device = CPU,
    in_memory: bool = True,
    on_progress: OnProgress = ignore_progress,
) -> Neighbors:
    """Nearest rows of `database` for every row of the datastore, stored in `folder`.

    Args:
        datastore: where keys are read from.
        database: rows that may be neighbours, sorted.
        folder: gets `ids.npy` and `distances.npy`.
        k: number of neighbours, at most 1024 and at most the rows there are besides oneself.
        flat_max_rows: database size up to which the search is exact; None: `exact_rows`.
        device: where to compute.
        in_memory: whether exact search holds all keys, or reads them for each batch of rows.
        on_progress: called after each group of rows.

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
    centre = key_centre(datastore, database)
    search: Search = (
        FlatSearch(datastore, database, centre, device, in_memory=in_memory)
        if len(database) <= (flat_max_rows or exact_rows(datastore.key_size, device))
        else CellSearch(datastore, database, centre, device, folder)
    )
    done = 0
    on_progress(ProgressEvent("neighbors", done, datastore.num_rows, "rows"))

    def keep(rows: Rows, found: tuple[Rows, Floats]) -> int:
        first, last = int(rows[0]), int(rows[-1])
        in_a_row = last - first + 1 == len(rows)  # rows of a group ascend
        where = slice(first, last + 1) if in_a_row else rows  # four times as fast
        ids[where], distances[where] = drop_self(rows, *found, k)
        if in_a_row:  # to the disk while the next ones are searched
            ids.flush()
            distances.flush()
        return len(rows)

    found = (partial(keep, rows, search.search(rows, k + 1)) for rows in search.groups())
    for count in behind(found):
        done += count
        on_progress(ProgressEvent("neighbors", done, datastore.num_rows, "rows"))
    ids.flush()
    distances.flush()
    (folder / SCRATCH).unlink(missing_ok=True)
    return Neighbors.open(folder)


def exact_rows(width: int, device: torch.device) -> int:
    """Size of a database up to which every row is compared with all of it.

    On a CPU a day's work begins not far beyond; a GPU does as many as fit into half of it.
    """
    if device.type != "cuda":
        return FLAT_MAX_ROWS
    return max(FLAT_MAX_ROWS, free_bytes(device) // 2 // (BYTES_ON_GPU * width))


def drop_self(
    rows: Rows, found: Rows, distances: npt.NDArray[np.float32], k: int
) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Leave each row itself out, keep the k nearest, and verify what the search returned.

    What is given may be changed. *Shapes:* (R,), (R, C), (R, C) -> (R, k), (R, k).

    Raises:
        MLPMemError: a distance is negative beyond rounding or not a number.
    """
    if (found < 0).any():
        distances = np.where(found >= 0, distances, np.float32(np.inf))
    least = distances.min(initial=np.inf)
    if not least >= -1e-3:  # not a number is not above it either
        raise MLPMemError("the index returned impossible distances; check the FAISS installation")
    if least < 0:
        distances = np.maximum(distances, np.float32(0.0))
    if (distances[:, 1:] < distances[:, :-1]).any():  # not every FAISS build gives them in order
        order = np.argsort(distances, axis=1, kind="stable")
        found = np.take_along_axis(found, order, 1)
        distances = np.take_along_axis(distances, order, 1)
    if (missing := k + 1 - found.shape[1]) > 0:
        found = np.pad(found, ((0, 0), (0, missing)), constant_values=-1)
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
    ids, kept = found[:, 1 : k + 1], distances[:, 1 : k + 1]
    others = np.flatnonzero(found[:, 0] != rows)  # rows that do not come first: ties, or not found
    if len(others):
        own = found[others] == rows[others, None]
        place = np.where(own.any(1), own.argmax(1), k)
        before = np.arange(k) < place[:, None]  # what comes later moves up by one
        ids[others] = np.where(before, found[others, :k], ids[others])
        kept[others] = np.where(before, distances[others, :k], kept[others])
    return ids, kept
