"""Search cell by cell: exact within the cells it looks into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_rag import cells as module
from mlpmem_rag import neighbors
from mlpmem_rag.cells import CellSearch, blocks, chosen_cells, num_cells
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.index import CPU, Rows, key_centre
from mlpmem_rag.neighbors import find_neighbors

Make = Callable[..., Datastore]
N, D = 2000, 32


@pytest.fixture
def store(datastore_of: Make) -> Datastore:
    """Rows around sixty centres, away from the origin."""
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=4, size=(60, D))
    return datastore_of(9 + centres[rng.integers(60, size=N)] + rng.normal(size=(N, D)))


@pytest.fixture
def database() -> Rows:
    """Every other row."""
    return np.arange(0, N, 2)


def search_of(store: Datastore, database: Rows, folder: Path, probes: int) -> CellSearch:
    centre = key_centre(store, database)
    return CellSearch(store, database, centre, CPU, folder, probes=probes)


def test_looking_into_all_cells_is_exact(tmp_path: Path, store: Datastore, database: Rows) -> None:
    find_neighbors(store, database, tmp_path / "exact", k=20)
    exact = neighbors.Neighbors.open(tmp_path / "exact")
    assert num_cells(len(database)) < module.PROBES, "all cells are looked into"
    found = find_neighbors(store, database, tmp_path / "cells", k=20, flat_max_rows=1)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_spans_in_blocks(most: int) -> None:
    spans = [(0, 3), (7, 7), (9, 14), (20, 21)]
    found = list(blocks(spans, most))
    rows = [row for block in found for span in block for row in range(*span)]
    assert rows == [0, 1, 2, 9, 10, 11, 12, 13, 20]
    sizes = [sum(last - first for first, last in block) for block in found]
    assert sizes == [*[most] * (9 // most), *([9 % most] if 9 % most else [])]


def test_every_row_is_in_one_group(tmp_path: Path, store: Datastore, database: Rows) -> None:
    groups = list(search_of(store, database, tmp_path, probes=2).groups())
    assert sorted(np.concatenate(groups).tolist()) == list(range(N))
    assert len(groups) > 10


def test_a_few_cells_hold_nearly_all_neighbours(
    tmp_path: Path, store: Datastore, database: Rows
) -> None:
    search = search_of(store, database, tmp_path, probes=6)
    keys = store.keys(np.arange(N)).astype(np.float64)
    shares, seen = [], []
    for rows in search.groups():
        found, distances = search.search(rows, 10)
        brute = ((keys[rows][:, None] - keys[database]) ** 2).sum(2)
        nearest = database[brute.argsort(1)[:, :10]]
        shares += [np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)]
        here = ((keys[rows][:, None] - keys[found]) ** 2).sum(2)
        np.testing.assert_allclose(distances, here, rtol=1e-4, atol=1e-3)
        seen.append(search._spans(torch.zeros(1, D), 10))
    assert np.mean(shares) > 0.95
    looked = sum(last - first for first, last in seen[0])
    assert looked < len(database) / 2, "else all would be found without choosing"


def test_more_cells_are_looked_into_where_few_rows_are_in_them(
    tmp_path: Path, store: Datastore, database: Rows
) -> None:
    search = search_of(store, database, tmp_path, probes=1)
    for rows in search.groups():
        found, distances = search.search(rows, 300)
        assert (found >= 0).all()
        assert np.isfinite(distances).all()
        assert (np.diff(distances, axis=1) >= 0).all()
        break


def test_more_are_asked_for_than_there_are(tmp_path: Path, datastore_of: Make) -> None:
    store = datastore_of(np.random.default_rng(0).normal(size=(90, 4)))
    search = search_of(store, np.arange(0, 90, 30), tmp_path, probes=3)
    rows = next(search.groups())
    found, distances = search.search(rows, 5)
    assert sorted(set(found[0].tolist())) == [-1, 0, 30, 60]
    assert np.isinf(distances[:, 3:]).all()


def test_a_cell_without_rows_starts_again(datastore_of: Make) -> None:
    keys = np.ones((400, 4))
    keys[:3] = np.eye(3, 4)
    store, rows = datastore_of(keys), np.arange(400)
    centres = module.find_centres(store, rows, torch.zeros(4))
    assert centres.shape == (num_cells(400), 4)
    assert torch.isfinite(centres).all()


def test_cells_that_most_queries_are_near_come_first() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [50.0, 50.0]])
    queries = torch.tensor([[9.0, 0.0], [11.0, 1.0], [8.0, 0.0], [1.0, 9.0]])
    order = chosen_cells(queries, centres, probes=2)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (order[0], order[-1]) == (1, 3)


def test_the_copy_in_the_cells_order_is_taken_away(
    tmp_path: Path, store: Datastore, database: Rows
) -> None:
    find_neighbors(store, database, tmp_path, k=3, flat_max_rows=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distances.npy", "ids.npy"]
