"""Indexes over the keys of a datastore, to search with one query or many.

Exact up to `FLAT_MAX_ROWS`: by FAISS on a CPU, by torch on a GPU. Beyond, at answer time, an IVF-PQ
index proposes candidates and their distances are computed again from the stored keys.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import MissingDependencyError
from mlpmem_rag.hardware import is_amd
from mlpmem_rag.torch_index import TorchIndex

FLAT_MAX_ROWS = 250_000
MAX_CANDIDATES = 2048
"""As many as FAISS returns on a GPU."""
RERANK_FACTOR = 4
"""IVF-PQ proposes this many candidates for each neighbour kept."""
CPU = torch.device("cpu")
CPU_BLOCK = 1 << 16
STORED_BLOCK = 1 << 15
BLAS_FROM = 2048
"""Numbers in a batch of queries from which FAISS computes distances by matrix products. As FAISS
1.15 has it (128,000), 200 queries of width 576 take twenty times as long as 230."""
BLAS_QUERIES = 1024
BLAS_KEYS = 8192
"""Rows of one matrix product. With FAISS's own (4,096 and 1,024) a search of 1,024 neighbours takes
5 % longer."""
CORE_TYPE = "OPENBLAS_CORETYPE"
CENTRE_SAMPLE = 4096
CUDA_BLOCK = 1 << 18
"""Keys that are moved to a GPU at one time."""

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Searched(Protocol):
    """Keys that are searched by their squared distance."""

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Distances and numbers of the k nearest; -1 where there are fewer.

        *Shapes:* (R, D) -> (R, k), (R, k).
        """


class Index(Searched, Protocol):
    """Keys that it holds itself."""

    def add(self, keys: Floats) -> None:
        """Take more keys. *Shape:* (R, D)."""


def import_faiss() -> Any:  # noqa: ANN401  faiss has no types
    """FAISS, whichever build is installed.

    Raises:
        MissingDependencyError: none is.
    """
    try:
        with _blas_kernels():
            import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "FAISS is not installed; run: pip install 'mlpmem-rag[cpu]' "
            "(or 'mlpmem-rag[gpu]' on a machine with CUDA; never both)"
        ) from error
    settings = faiss.cvar
    settings.distance_compute_blas_threshold = min(
        settings.distance_compute_blas_threshold, BLAS_FROM
    )
    settings.distance_compute_blas_query_bs = BLAS_QUERIES
    settings.distance_compute_blas_database_bs = BLAS_KEYS
    return faiss


@contextmanager
def _blas_kernels() -> Iterator[None]:
    """Tell the OpenBLAS that comes with FAISS which processor it is on, where nobody else does.

    Version 0.3.15, of FAISS's packages, takes an Ice Lake server for a Pentium 4 otherwise
    (OpenBLAS issue 3453), and searches at a fifth of the speed. It asks only while it is loaded.
    """
    is_open = "faiss" not in sys.modules and CORE_TYPE not in os.environ
    kernels = blas_kernels(torch.cpu.get_capabilities()) if is_open else None
    if kernels is None:
        yield
        return
    os.environ[CORE_TYPE] = kernels
    try:
        yield
    finally:
        os.environ.pop(CORE_TYPE, None)


def blas_kernels(capabilities: Mapping[str, Any]) -> str | None:
    """OpenBLAS's name for products that a processor can run well; None: it may see for itself.

    Args:
        capabilities: as torch tells them.
    """
    if not (capabilities.get("avx2") and capabilities.get("fma3")):
        return None
    if is_amd(capabilities):
        return "ZEN"
    wide = all(capabilities.get(f"avx512_{part}") for part in ("f", "bw", "dq", "vl"))
    return "SKYLAKEX" if wide else "HASWELL"


def check_search(device: torch.device) -> None:
    """Refuse now what a later search on the device would fail for.

    Raises:
        MissingDependencyError: the device is no GPU, and FAISS is not installed.
    """
    if device.type != "cuda":
        import_faiss()


def faiss_has_gpu() -> bool:
    """Whether FAISS was built for GPUs and sees one."""
    faiss = import_faiss()
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def key_centre(datastore: Datastore, database: Rows) -> npt.NDArray[np.float32]:
    """Mean of the keys (of a sample of them). *Shape:* (D,).

    Taken off before the search: it changes no distance, but FAISS computes them as differences
    of large products, and an offset common to all keys would cost float32 its digits.
    """
    step = max(1, len(database) // CENTRE_SAMPLE)
    mean: npt.NDArray[np.float32] = datastore.keys(database[::step]).mean(0)
    return mean


def flat_index(
    datastore: Datastore, database: Rows, centre: Floats, device: torch.device = CPU
) -> Index:
    """An exact index over the given rows."""
    on_gpu = device.type == "cuda"
    index: Index = TorchIndex(device) if on_gpu else import_faiss().IndexFlatL2(datastore.key_size)
    for rows in stretches(database, CUDA_BLOCK if on_gpu else CPU_BLOCK):
        index.add(centred(datastore, rows, centre))
    return index


def centred(datastore: Datastore, rows: Rows, centre: Floats) -> Floats:
    """Keys less their centre. *Shapes:* (R,), (D,) -> (R, D)."""
    keys = datastore.keys(rows)
    keys -= centre
    return keys


def ivfpq_index(
    datastore: Datastore, database: Rows, centre: Floats, device: torch.device = CPU
) -> Any:  # noqa: ANN401
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
    index = moved(index, device)
    index.train(centred(datastore, np.sort(sample), centre))
    for rows in stretches(database):
        index.add(centred(datastore, rows, centre))
    return index


def moved(index: Any, device: torch.device) -> Any:  # noqa: ANN401
    """The index on the device where that is a GPU and FAISS was built for GPUs, else as it is."""
    if device.type != "cuda" or not faiss_has_gpu():
        return index
    faiss = import_faiss()
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # of 64 sub-quantisers, only such tables fit into shared memory
    number = torch.cuda.current_device() if device.index is None else device.index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index, options)


class StoredIndex:
    """Exact search that holds no keys: it reads them again for each batch of queries."""

    def __init__(self, datastore: Datastore, database: Rows, centre: Floats) -> None:
        self._datastore = datastore
        self._database = database
        self._centre = centre

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """As `Index` says."""
        faiss = import_faiss()
        best = np.full((len(queries), k), np.inf, dtype=np.float32)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        first = 0
        for rows in stretches(self._database, STORED_BLOCK):
            keys = centred(self._datastore, rows, self._centre)
            distances, places = faiss.knn(queries, keys, min(k, len(rows)))
            best = np.concatenate([best, distances], 1)
            found = np.concatenate([found, places + first], 1)
            order = np.argsort(best, axis=1, kind="stable")[:, :k]
            best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
            first += len(rows)
        return best, found


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


def stretches(rows: Rows, size: int = CPU_BLOCK) -> Iterator[Rows]:
    """At most `size` rows at a time."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
