"""Approximate neighbours of a large store beside exact ones, and how many of these they find.

The rows are those of the corpus many times over: each is a row of its datastore moved by part of
the difference of two of that row's neighbours, so that the copies spread as real rows do.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import Ratio, median_ratio, timed
from benchmarks.setup import Setup
from mlpmem_rag.cells import CellSearch
from mlpmem_rag.datastore import SHARD_ROWS, Datastore
from mlpmem_rag.index import Floats, Index, Rows, centred, flat_index, key_centre, stretches
from mlpmem_rag.neighbors import drop_self, find_neighbors
from mlpmem_rag.storage import allocate_array

K = 64
ANCHORS = 32
"""Neighbours of a row that its copies move between."""
QUERIES = 512
GROUPS = 24
ROUNDS = 4
FASTER = Goal(at_least=10.0)
"""On a CPU; on a GPU, a store of this size is searched exactly."""
FOUND = Goal(at_least=0.95)


def run(setup: Setup) -> list[Figure]:
    """Queries a second of both, the making of the cells shared out among all rows; and recall."""
    with tempfile.TemporaryDirectory(dir=setup.work) as folder:
        setup.say(f"making {setup.search_rows:,} rows")
        store = grown(setup.datastore, setup.search_rows, Path(folder))
        return compared(store, Path(folder), setup.device, ROUNDS)


def compared(store: Datastore, folder: Path, device: str, rounds: int) -> list[Figure]:
    """The same rows, searched both ways."""
    rows, place = np.arange(store.num_rows), torch.device(device)
    centre = key_centre(store, rows)
    cells, making = timed(lambda: CellSearch(store, rows, centre, place, folder), device)
    flat = flat_index(store, rows, centre, place)
    groups = list(cells.groups())
    generator = np.random.default_rng(0)
    exact_times, times, recalls = [], [], []
    for number in range(rounds + 1):  # the first is warm-up
        picked = [groups[n] for n in generator.choice(len(groups), GROUPS)]
        asked = np.concatenate(picked)
        few = np.sort(generator.choice(asked, size=min(QUERIES, len(asked)), replace=False))
        found, took = timed(partial(by_cells, cells, picked), device)
        exact, took_exact = timed(partial(by_all, flat, store, centre, few), device)
        if number:
            times.append(took / len(asked) + making / len(rows))
            exact_times.append(took_exact / len(few))
            pairs = ((found[row], near) for row, near in zip(few.tolist(), exact, strict=True))
            recalls.append(float(np.mean([np.isin(near, ours).mean() for ours, near in pairs])))
    recall = Ratio(float(np.median(recalls)), min(recalls), max(recalls))
    exact_rate = 1 / float(np.median(exact_times))
    gpu = place.type == "cuda"
    return [
        Figure(
            f"approximate neighbours, {store.num_rows:,} rows",
            "rows/s",
            1 / float(np.median(times)),
            "exact neighbours",
            exact_rate,
            median_ratio(exact_times, times),
            Goal() if gpu else FASTER,
            details={"width": store.key_size, "making_seconds": making},
        ),
        Figure(
            f"exact neighbours, {store.num_rows:,} rows",
            "rows/s",
            exact_rate,
            per_second=exact_rate,
            needs=roofline.search_needs(
                store.num_rows, store.key_size, dtype="float16" if gpu else "float32"
            ),
        ),
        Figure(
            f"share of the {K} nearest that is found",
            "",
            recall.value,
            ratio=recall,
            goal=Goal() if gpu else FOUND,
        ),
    ]


def by_cells(cells: CellSearch, groups: list[Rows]) -> dict[int, Rows]:
    """Neighbours of each row."""
    found: dict[int, Rows] = {}
    for group in groups:
        near, _ = drop_self(group, *cells.search(group, K + 1), K)
        found.update(zip(group.tolist(), near, strict=True))
    return found


def by_all(flat: Index, store: Datastore, centre: Floats, rows: Rows) -> Rows:
    """Exact neighbours. *Shape:* (R,) -> (R, K)."""
    distances, found = flat.search(centred(store, rows, centre), K + 1)
    return drop_self(rows, found, distances, K)[0]


def grown(store: Datastore, rows: int, folder: Path) -> Datastore:
    """Many more rows that lie as those of a store do."""
    few = np.arange(store.num_rows)
    near = find_neighbors(store, few, folder / "near", k=min(ANCHORS, store.num_rows - 1)).ids
    near = np.asarray(near)
    keys = store.keys(few)
    generator = np.random.default_rng(0)
    shards = []
    for number, shard in enumerate(stretches(np.arange(rows), SHARD_ROWS)):
        out = allocate_array(
            folder / f"keys-{number:05d}.npy", np.float16, (len(shard), store.key_size)
        )
        for here in stretches(np.arange(len(shard)), 8192):
            anchor = generator.integers(len(few), size=len(here))
            one, other = (
                near[anchor, generator.integers(near.shape[1], size=len(here))] for _ in "ab"
            )
            part = generator.random((len(here), 1), dtype=np.float32)
            out[here] = keys[anchor] + part * (keys[one] - keys[other])
        shards.append(out)
    zeros = np.zeros(rows, dtype=np.int32)
    return Datastore(tuple(shards), zeros, zeros, np.arange(rows, dtype=np.int32))
