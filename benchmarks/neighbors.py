"""The exact neighbour search beside `faiss.knn` called on the same keys."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.index import import_faiss
from mlpmem_rag.neighbors import MAX_NEIGHBORS, find_neighbors

AT_LEAST = 0.95
IN_MEMORY = Path("/dev/shm")
BLOCKS = {"distance_compute_blas_query_bs": 4096, "distance_compute_blas_database_bs": 1024}
"""Of a matrix product, in FAISS as it is installed; the library sets others."""


@contextmanager
def as_faiss_has_it(faiss: Any) -> Iterator[None]:  # noqa: ANN401  it has no types
    """FAISS with its own sizes of blocks."""
    kept = {name: getattr(faiss.cvar, name) for name in BLOCKS}
    for name, size in BLOCKS.items():
        setattr(faiss.cvar, name, size)
    try:
        yield
    finally:
        for name, size in kept.items():
            setattr(faiss.cvar, name, size)


def run(setup: Setup) -> list[Figure]:
    """Rows a second of both; the stage also reads the keys, leaves rows out and stores results.

    Once in the working folder, where results go to the disk, and once where they stay in memory.
    """
    figures = [_beside_knn(setup, setup.work, "results on the disk", Goal())]
    if IN_MEMORY.is_dir():
        goal = Goal() if _on_gpu(setup) else Goal(at_least=AT_LEAST)  # faiss.knn is the CPU's
        figures.append(_beside_knn(setup, IN_MEMORY, "results in memory", goal))
    return figures


def _on_gpu(setup: Setup) -> bool:
    return setup.device.startswith("cuda")


def _beside_knn(setup: Setup, place: Path, where: str, goal: Goal) -> Figure:
    store = setup.datastore
    rows = np.arange(store.num_rows)
    k = min(MAX_NEIGHBORS, store.num_rows - 1)
    keys = store.keys(rows)
    faiss = import_faiss()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        empty = (Path(folder) / str(number) for number in itertools.count())
        device = torch.device(setup.device)

        def stage() -> None:  # into an empty folder, as a training does
            find_neighbors(store, rows, next(empty), k=k, device=device)

        def knn() -> None:
            with as_faiss_has_it(faiss):
                faiss.knn(keys, keys, k + 1)

        took = interleaved({"stage": stage, "knn": knn}, setup.rounds)
    rate = len(rows) / min(took["stage"])
    return Figure(
        f"exact neighbours, k = {k:,}, {where}",
        "rows/s",
        rate,
        "faiss.knn",
        len(rows) / min(took["knn"]),
        median_ratio(took["knn"], took["stage"]),
        goal,
        per_second=rate,
        needs=roofline.search_needs(
            len(rows), store.key_size, dtype="float16" if _on_gpu(setup) else "float32"
        ),
        details={"rows": len(rows), "width": store.key_size},
    )
