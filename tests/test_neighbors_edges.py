"""Neighbour search: what is told and stored on the way, and where one gives way to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_rag import neighbors as module
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError, MLPMemError
from mlpmem_rag.index import FLAT_MAX_ROWS
from mlpmem_rag.neighbors import (
    BYTES_ON_GPU,
    MAX_NEIGHBORS,
    FlatSearch,
    Neighbors,
    drop_self,
    exact_rows,
    find_neighbors,
)
from mlpmem_rag.progress import ProgressEvent

Make = Callable[..., Datastore]


@pytest.fixture
def store(datastore_of: Make) -> Datastore:
    return datastore_of(np.random.default_rng(0).normal(size=(300, 4)))


def test_groups_are_told_and_stored(
    tmp_path: Path, store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERY_BATCH", 128)
    events: list[ProgressEvent] = []
    folder = tmp_path / "new" / "neighbors"
    found = find_neighbors(store, np.arange(300), folder, k=3, on_progress=events.append)
    done = (0, 128, 256, 300)
    assert events == [ProgressEvent("neighbors", rows, 300, "rows") for rows in done]
    again = Neighbors.open(folder)
    for name, kind in (("ids", "int32"), ("distances", "float32")):
        stored = getattr(again, name)
        assert isinstance(stored, np.memmap), "larger than memory, perhaps"
        assert (str(stored.dtype), stored.mode) == (kind, "r")
        np.testing.assert_array_equal(stored, getattr(found, name))


def test_one_more_than_wanted_is_asked_for(
    tmp_path: Path, store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row itself is among them."""
    asked: list[int] = []
    search = FlatSearch.search

    def noted(self: FlatSearch, rows: Any, count: int) -> Any:  # noqa: ANN401
        asked.append(count)
        return search(self, rows, count)

    monkeypatch.setattr(FlatSearch, "search", noted)
    find_neighbors(store, np.arange(300), tmp_path, k=3)
    assert set(asked) == {4}


@pytest.mark.parametrize(("limit", "flat"), [(300, True), (301, True), (299, False), (None, True)])
def test_up_to_the_limit_the_search_is_exact(
    tmp_path: Path,
    store: Datastore,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    flat: bool,
) -> None:
    used: list[tuple[Any, ...]] = []

    class MadeError(Exception):
        """It is enough to know which."""

    def made(*given: Any, **how: Any) -> None:  # noqa: ANN401
        used.append(given)
        assert how == ({"in_memory": True} if flat else {})
        raise MadeError

    monkeypatch.setattr(module, "FlatSearch" if flat else "CellSearch", made)
    database, device = np.arange(300), torch.device("cpu")
    with pytest.raises(MadeError):
        find_neighbors(store, database, tmp_path, k=3, flat_max_rows=limit, device=device)
    ((datastore, rows, centre, place, *folder),) = used
    assert datastore is store
    assert rows is database
    assert place == device
    assert folder == ([] if flat else [tmp_path])
    np.testing.assert_allclose(centre, store.keys(database).mean(0), atol=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(10, 10**9), (10**9, FLAT_MAX_ROWS)])
def test_a_gpu_searches_exactly_what_fits_into_half_of_it(
    monkeypatch: pytest.MonkeyPatch, width: int, expected: int
) -> None:
    free = 2 * 10**9 * BYTES_ON_GPU * 10

    def free_of(device: torch.device) -> tuple[int, int]:
        assert device == torch.device("cuda:1")
        return free, 3 * free

    monkeypatch.setattr(torch.cuda, "mem_get_info", free_of)
    assert exact_rows(width, torch.device("cuda:1")) == expected
    assert exact_rows(width, torch.device("cpu")) == FLAT_MAX_ROWS


def test_two_rows_are_each_others_neighbours(tmp_path: Path, store: Datastore) -> None:
    found = find_neighbors(store, np.array([3, 7]), tmp_path, k=MAX_NEIGHBORS)
    assert found.ids[[3, 7]].tolist() == [[7], [3]]
    with pytest.raises(ConfigError, match=r"^1 rows to search: at least 2 are needed$"):
        find_neighbors(store, np.array([3]), tmp_path)
    for k in (0, MAX_NEIGHBORS + 1):
        with pytest.raises(ConfigError, match=rf"^k = {k} neighbours: allowed are 1 to 1024$"):
            find_neighbors(store, np.arange(300), tmp_path, k=k)


def test_rounding_below_zero_is_zero_and_more_is_refused() -> None:
    rows, found = np.array([5]), np.array([[1, 2]])
    distances = np.array([[-1e-3, 4.0]])
    ids, kept = drop_self(rows, found, distances, 2)
    assert (ids.tolist(), kept.tolist()) == ([[1, 2]], [[0.0, 4.0]])
    said = r"^the index returned impossible distances; check the FAISS installation$"
    with pytest.raises(MLPMemError, match=said):
        drop_self(rows, found, np.array([[-1.1e-3, 4.0]], dtype=np.float32), 2)
