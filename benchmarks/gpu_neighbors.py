"""Exact neighbours on a GPU, every row against every other, beside its matrix products alone.

Both multiply in half precision. The products are measured before and after each search, and its
share is that of the mean of both: what a GPU does in a second changes with its heat. Where
faiss-gpu is installed, some of the rows are searched by its flat index in half precision as well,
whose distances are not computed again in float32. Keys are random numbers: how long the search
takes does not depend on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice

import numpy as np
import torch

from benchmarks import machine, roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import Ratio, exhaust, interleaved, median_ratio, seconds
from benchmarks.setup import Setup
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.index import Index, Rows, faiss_has_gpu, import_faiss, stretches
from mlpmem_rag.neighbors import FlatSearch, Search

WIDTH = 576
AT_LEAST = 0.3
NEIGHBORS = (64, 1024)
WARM_UP = 2
FAISS_GROUPS = 8
FAISS_ROUNDS = 3


def run(setup: Setup) -> list[Figure]:
    """Operations a second of both."""
    store = random_store(setup.search_rows, WIDTH)
    device = torch.device(setup.device)
    search = FlatSearch(store, np.arange(store.num_rows), np.zeros(WIDTH, dtype=np.float32), device)
    product_rate = partial(machine.product_rate, torch.float16, setup.device)
    figures, before = [], product_rate()
    for k in NEIGHBORS:
        took = search_seconds(search, k, setup.device)
        after = product_rate()
        figures.append(beside_products(store, k, took, (before, after)))
        before = after
    if find_spec("faiss") and faiss_has_gpu():
        other = faiss_index(store, device)
        figures += [beside_faiss(search, other, store, k, setup.device) for k in NEIGHBORS]
    return figures


def search_seconds(search: Search, k: int, device: str) -> float:
    """All rows once; what is found of some is dropped before the next ones are searched."""
    groups: list[Rows] = list(search.groups())
    exhaust(search.search(rows, k + 1) for rows in groups[:WARM_UP])
    return seconds(lambda: exhaust(search.search(rows, k + 1) for rows in groups), device)


def beside_products(store: Datastore, k: int, took: float, rates: Sequence[float]) -> Figure:
    """A search of all rows in so many seconds beside the products before and after it."""
    operations = roofline.search_needs(store.num_rows, store.key_size).flops * store.num_rows
    rate = statistics.mean(rates)
    return Figure(
        f"exact neighbours of {store.num_rows:,} rows on the GPU, k = {k:,}",
        "TFLOP/s",
        operations / took / 1e12,
        "matrix products alone",
        rate / 1e12,
        Ratio(*(operations / took / products for products in (rate, max(rates), min(rates)))),
        Goal(at_least=AT_LEAST),
        details={"seconds": took, "rows_per_second": store.num_rows / took},
    )


def beside_faiss(search: FlatSearch, other: Index, store: Datastore, k: int, device: str) -> Figure:
    """Some of the rows both ways."""
    groups: list[Rows] = list(islice(search.groups(), FAISS_GROUPS))
    took = interleaved(
        {
            "ours": lambda: exhaust(search.search(rows, k + 1) for rows in groups),
            "faiss": lambda: exhaust(other.search(store.keys(rows), k + 1) for rows in groups),
        },
        FAISS_ROUNDS,
        device=device,
    )
    count = sum(map(len, groups))
    return Figure(
        f"exact neighbours of some of {store.num_rows:,} rows on the GPU, k = {k:,}",
        "rows/s",
        count / min(took["ours"]),
        "faiss-gpu in half precision",
        count / min(took["faiss"]),
        median_ratio(took["faiss"], took["ours"]),
    )


def faiss_index(store: Datastore, device: torch.device) -> Index:
    """A flat index of FAISS on the GPU."""
    faiss = import_faiss()
    options = faiss.GpuIndexFlatConfig()
    options.useFloat16 = True
    options.device = torch.cuda.current_device() if device.index is None else device.index
    index: Index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), store.key_size, options)
    for rows in stretches(np.arange(store.num_rows)):
        index.add(store.keys(rows))
    return index


def random_store(rows: int, width: int) -> Datastore:
    """In one piece in main memory."""
    generator = np.random.default_rng(0)
    keys = np.empty((rows, width), dtype=np.float16)
    for first in range(0, rows, 65_536):
        part = keys[first : first + 65_536]
        part[:] = generator.standard_normal(part.shape, dtype=np.float32)
    zeros = np.zeros(rows, dtype=np.int32)
    return InOnePiece((keys,), zeros, zeros, np.arange(rows, dtype=np.int32))


class InOnePiece(Datastore):
    """A datastore whose only shard may be of any size."""

    def keys(self, rows: Rows) -> np.ndarray:
        """As `Datastore.keys`."""
        found: np.ndarray = self.key_shards[0][rows].astype(np.float32)
        return found
