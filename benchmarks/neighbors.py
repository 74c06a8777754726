"""The exact neighbour search beside `faiss.knn` called on the same keys."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.index import import_faiss
from mlpmem_rag.neighbors import MAX_NEIGHBORS, find_neighbors

AT_LEAST = 0.95


def run(setup: Setup) -> list[Figure]:
    """Rows a second of both; the stage also reads the keys, leaves rows out and writes results."""
    store = setup.datastore
    rows = np.arange(store.num_rows)
    k = min(MAX_NEIGHBORS, store.num_rows - 1)
    keys = store.keys(rows)
    faiss = import_faiss()
    with tempfile.TemporaryDirectory(dir=setup.work) as folder:

        def stage() -> None:
            find_neighbors(store, rows, Path(folder), k=k, device=torch.device(setup.device))

        def knn() -> None:
            faiss.knn(keys, keys, k + 1)

        took = interleaved({"stage": stage, "knn": knn}, setup.rounds)
    rate = len(rows) / min(took["stage"])
    gpu = setup.device.startswith("cuda")
    return [
        Figure(
            f"exact neighbours, k = {k:,}",
            "rows/s",
            rate,
            "faiss.knn",
            len(rows) / min(took["knn"]),
            median_ratio(took["knn"], took["stage"]),
            Goal() if gpu else Goal(at_least=AT_LEAST),  # faiss.knn computes on the CPU
            per_second=rate,
            needs=roofline.search_needs(
                len(rows), store.key_size, dtype="float16" if gpu else "float32"
            ),
            details={"rows": len(rows), "width": store.key_size},
        )
    ]
