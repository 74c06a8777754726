"""Neighbour search against a brute-force one in numpy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mlpmem_rag import neighbors as module
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError, MissingDependencyError, MLPMemError
from mlpmem_rag.neighbors import Neighbors, drop_self, find_neighbors
from mlpmem_rag.progress import ProgressEvent

Make = Callable[..., Datastore]
Floats = npt.NDArray[np.float64]


def all_distances(store: Datastore, database: npt.NDArray[np.int64]) -> Floats:
    """Squared L2 of every row to every row that it may have as a neighbour, else infinite."""
    keys = store.keys(np.arange(store.num_rows)).astype(np.float64)
    squares = (keys**2).sum(1)
    out: Floats = squares[:, None] + squares - 2 * keys @ keys.T
    out[:, ~np.isin(np.arange(store.num_rows), database)] = np.inf
    np.fill_diagonal(out, np.inf)
    return out


def check_exact(found: Neighbors, store: Datastore, database: npt.NDArray[np.int64]) -> None:
    """Equal to brute force: the distances, and ids that have them (so up to ties)."""
    brute = all_distances(store, database)
    k = found.ids.shape[1]
    np.testing.assert_allclose(found.distances, np.sort(brute, 1)[:, :k], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(brute, found.ids.astype(int), 1), rtol=1e-5, atol=1e-4
    )
    assert all(len(set(row)) == k for row in found.ids.tolist())


@pytest.mark.parametrize("k", [1, 5, 1024])
@pytest.mark.parametrize("kind", ["distinct", "with ties", "all equal"])
@pytest.mark.parametrize("step", [1, 3])
def test_exact_search_equals_brute_force(
    tmp_path: Path, datastore_of: Make, k: int, kind: str, step: int
) -> None:
    rng = np.random.default_rng(k)
    keys = {
        "distinct": rng.normal(size=(150, 24)),
        "with ties": rng.integers(-1, 2, size=(150, 3)),  # 27 points: most rows have doubles
        "all equal": np.ones((150, 4)),
    }[kind]
    store, database = datastore_of(keys), np.arange(0, 150, step)
    found = find_neighbors(store, database, tmp_path, k=k)
    assert found.ids.shape == (150, min(k, len(database) - 1))
    check_exact(found, store, database)
    stored = Neighbors.open(tmp_path)
    np.testing.assert_array_equal(stored.ids, found.ids)
    np.testing.assert_array_equal(stored.distances, found.distances)


def test_queries_in_several_batches(
    tmp_path: Path, datastore_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERY_BATCH", 64)
    store, database = datastore_of(np.random.default_rng(0).normal(size=(150, 8))), np.arange(150)
    events: list[ProgressEvent] = []
    check_exact(
        find_neighbors(store, database, tmp_path, k=7, on_progress=events.append), store, database
    )
    assert [event.done for event in events] == [0, 64, 128, 150]


def test_approximate_search_finds_nearly_all_and_exact_distances(
    tmp_path: Path, datastore_of: Make
) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(scale=4, size=(60, 32))
    keys = centres[rng.integers(60, size=2000)] + rng.normal(size=(2000, 32))
    store, database = datastore_of(keys), np.arange(0, 2000, 2)
    found = find_neighbors(store, database, tmp_path, k=10, flat_max_rows=0)
    brute = all_distances(store, database)
    nearest = np.argsort(brute, 1)[:, :10]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(nearest, found.ids, strict=True)])
    assert recall >= 0.9
    here = np.take_along_axis(brute, found.ids.astype(int), 1)
    np.testing.assert_allclose(found.distances, here, rtol=1e-4)
    assert np.all(np.diff(found.distances, axis=1) >= 0)


def test_too_few_candidates_leave_empty_places() -> None:
    rows, found = np.array([4, 5]), np.array([[4, 7, -1, -1], [8, -1, 5, 9]])
    distances = np.array([[0, 2, 0, 0], [3, 0, 0, 1]], dtype=np.float32)
    ids, sorted_distances = drop_self(rows, found, distances, k=3)
    np.testing.assert_array_equal(ids, [[7, -1, -1], [9, 8, -1]])
    np.testing.assert_array_equal(sorted_distances, [[2, np.inf, np.inf], [1, 3, np.inf]])


def test_fewer_places_than_asked_for_are_filled_up() -> None:
    rows, found = np.array([4, 5]), np.array([[4, 7], [8, 9]])
    distances = np.array([[0, 2], [1, 3]], dtype=np.float32)
    ids, kept = drop_self(rows, found, distances, k=4)
    np.testing.assert_array_equal(ids, [[7, -1, -1, -1], [8, 9, -1, -1]])
    np.testing.assert_array_equal(kept, [[2, np.inf, np.inf, np.inf], [1, 3, np.inf, np.inf]])
    assert kept.dtype == np.float32
    ids, kept = drop_self(rows, found, distances, k=2)
    np.testing.assert_array_equal(ids, [[7, -1], [8, 9]])
    np.testing.assert_array_equal(kept, [[2, np.inf], [1, 3]])


@pytest.mark.parametrize("wrong", [np.nan, -1.0])
def test_impossible_distances_are_refused(wrong: float) -> None:
    with pytest.raises(MLPMemError, match="impossible distances"):
        drop_self(np.array([0]), np.array([[1]]), np.array([[wrong]], dtype=np.float32), k=1)


@pytest.mark.parametrize(
    ("k", "rows", "message"),
    [(0, 9, "k = 0"), (1025, 9, "allowed are 1 to 1024"), (3, 1, "at least 2 are needed")],
)
def test_what_cannot_be_searched(
    tmp_path: Path, datastore_of: Make, k: int, rows: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_neighbors(datastore_of(np.eye(9)), np.arange(rows), tmp_path, k=k)


def test_missing_faiss_is_reported_with_the_command(
    tmp_path: Path, datastore_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlpmem-rag\[cpu\]'"):
        find_neighbors(datastore_of(np.eye(9)), np.arange(9), tmp_path, k=2)
