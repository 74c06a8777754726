"""Exact search by torch against FAISS and numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_rag import index as module
from mlpmem_rag import neighbors, torch_index
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.index import BLAS_FROM, CPU, FLAT_MAX_ROWS, flat_index, import_faiss
from mlpmem_rag.neighbors import exact_rows, find_neighbors
from mlpmem_rag.torch_index import TorchIndex

Make = Callable[..., Datastore]


@pytest.mark.parametrize("k", [1, 5, 130])
@pytest.mark.parametrize("block", [40, 1000])
def test_torch_finds_what_brute_force_finds(
    k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_index, "GATHERED", 20_000)  # several queries at a time
    rng = np.random.default_rng(k)
    keys = rng.normal(size=(200, 24)).astype(np.float32)
    queries = rng.normal(size=(30, 24)).astype(np.float32)
    index = TorchIndex(CPU)
    for first in range(0, 200, block):
        index.add(keys[first : first + block])
    distances, found = index.search(queries, k)
    brute = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(2)
    np.testing.assert_array_equal(found, brute.argsort(1)[:, :k])
    np.testing.assert_allclose(distances, np.sort(brute, 1)[:, :k], rtol=1e-5)


def test_missing_neighbours_are_infinitely_far() -> None:
    index = TorchIndex(CPU)
    index.add(np.eye(3, dtype=np.float32))
    distances, found = index.search(np.zeros((2, 3), dtype=np.float32), 5)
    assert np.isinf(distances[:, 3:]).all()
    np.testing.assert_allclose(distances[:, :3], 1.0)
    assert (found[:, 3:] == -1).all()


def test_what_half_precision_misorders_is_put_right() -> None:
    # Distances that differ by less than half precision tells, around a far point.
    near = 100 + np.linspace(0, 0.05, 20, dtype=np.float32)[:, None] * np.ones(8, dtype=np.float32)
    order = np.random.default_rng(0).permutation(20)
    index = TorchIndex(CPU)
    index.add(near[order])
    distances, found = index.search(np.full((1, 8), 100, dtype=np.float32), 10)
    np.testing.assert_array_equal(order[found[0]], np.arange(10))
    np.testing.assert_allclose(distances[0], ((near[:10] - 100) ** 2).sum(1), rtol=1e-4)


def test_faiss_and_torch_agree_through_the_same_door(
    datastore_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = datastore_of(np.random.default_rng(0).normal(size=(150, 16)))
    rows, centre = np.arange(0, 150, 2), np.zeros(16, dtype=np.float32)
    queries = store.keys(np.arange(20))
    expected = flat_index(store, rows, centre).search(queries, 7)
    asked: list[torch.device] = []

    def on_cpu(device: torch.device) -> TorchIndex:
        asked.append(device)
        return TorchIndex(CPU)

    monkeypatch.setattr(module, "TorchIndex", on_cpu)  # in the place of a GPU that FAISS lacks
    found = flat_index(store, rows, centre, torch.device("cuda")).search(queries, 7)
    assert asked == [torch.device("cuda")]
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 40, 90])
def test_keys_that_are_not_held_are_found_all_the_same(
    k: int, tmp_path: Path, datastore_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORED_BLOCK", 32)
    monkeypatch.setattr(neighbors, "LARGE_QUERY_BATCH", 64)
    store = datastore_of(np.random.default_rng(k).normal(size=(200, 12)))
    database = np.arange(0, 200, 2)
    held = find_neighbors(store, database, tmp_path / "held", k=k)
    read = find_neighbors(store, database, tmp_path / "read", k=k, in_memory=False)
    np.testing.assert_array_equal(read.ids, held.ids)
    np.testing.assert_allclose(read.distances, held.distances, rtol=1e-5)


def test_few_queries_are_searched_by_matrix_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = import_faiss()
    assert faiss.cvar.distance_compute_blas_threshold <= BLAS_FROM
    # As older builds have it: in queries, not in numbers.
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 20)
    assert import_faiss().cvar.distance_compute_blas_threshold == 20


def test_a_gpu_searches_exactly_what_fits_into_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_rows(576, CPU) == FLAT_MAX_ROWS
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 2**30, 80 * 2**30))
    assert exact_rows(576, torch.device("cuda")) == 40 * 2**30 // (6 * 576)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 80 * 2**30))
    assert exact_rows(576, torch.device("cuda")) == FLAT_MAX_ROWS
