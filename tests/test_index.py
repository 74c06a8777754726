"""Exact search by torch against FAISS and numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_rag import index as module
from mlpmem_rag import neighbors, torch_index
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import MissingDependencyError, MLPMemError
from mlpmem_rag.index import (
    BLAS_FROM,
    CORE_TYPE,
    CPU,
    FLAT_MAX_ROWS,
    RERANK_FACTOR,
    blas_kernels,
    check_search,
    flat_index,
    import_faiss,
    ivfpq_index,
    key_centre,
    moved,
    rerank,
)
from mlpmem_rag.nearest import GROUP
from mlpmem_rag.neighbors import exact_rows, find_neighbors
from mlpmem_rag.torch_index import (
    TorchIndex,
    free_bytes,
    key_factor,
    products,
    query_factor,
    room_for_work,
    shares,
)

Make = Callable[..., Datastore]


@pytest.mark.parametrize("k", [1, 5, 130])
@pytest.mark.parametrize("block", [40, 1000])
def test_torch_finds_what_brute_force_finds(
    k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven queries at a time, sixty of the keys, and few of the chosen ones.
    monkeypatch.setattr(torch_index, "CPU_ROOM", 7 * 4 * 4 * GROUP * (k + torch_index.SPARE))
    monkeypatch.setattr(torch_index, "COLUMNS", 60)
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


@pytest.mark.parametrize("length", [1e-3, 1.0, 300.0, 60_000.0])
def test_one_product_ranks_as_distances_do(length: float) -> None:
    rng = np.random.default_rng(0)
    keys, queries = (torch.from_numpy(rng.normal(size=(n, 20))).float() for n in (50, 8))
    keys *= length / keys.norm(dim=1).max()
    factor, given = key_factor(keys), query_factor(queries.mul_(length / 10))
    assert factor.keys.shape == (50, 24)
    assert given.shape == (8, 24)
    given[:, 20:22] = factor.unit
    found = products(given, factor.keys).double()
    halves = [side.half().double() for side in (queries, keys)]
    expected = keys.double().square().sum(1) / 2 - halves[0] @ halves[1].T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * length**2)


def test_a_key_too_long_for_half_precision_is_refused() -> None:
    with pytest.raises(MLPMemError, match=r"length 70,000: .* up to 65,504; choose another layer"):
        TorchIndex(CPU).add(np.full((1, 1), 70_000, dtype=np.float32))


def test_the_room_decides_how_much_is_compared_at_one_time() -> None:
    assert shares(1 << 33, 4096, 96) == (4096, 1 << 18)
    assert shares(1 << 31, 4096, 96) == (4096, 1 << 17)
    # 4 groups of 32 columns for each of 1,056 candidates, in float32: half a megabyte a row.
    assert shares(1 << 29, 4096, 1056) == (992, 135_300)
    assert shares(1, 4096, 1056) == (1, 1)


def test_what_torch_keeps_unused_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda:1")
    for name, size in (("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * (device == there))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * (device == there), 200))
    assert free_bytes(there) == 130
    assert room_for_work(there) == 130 // 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 << 30, 80 << 30))
    assert room_for_work(there) == torch_index.ROOM


def test_a_gpu_searches_without_faiss(datastore_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlpmem-rag\[cpu\]'"):
        check_search(CPU)
    check_search(torch.device("cuda"))
    monkeypatch.setattr(module, "TorchIndex", lambda _: TorchIndex(CPU))
    store, centre = datastore_of(np.eye(9)), np.zeros(9, dtype=np.float32)
    index = flat_index(store, np.arange(9), centre, torch.device("cuda"))
    np.testing.assert_array_equal(index.search(store.keys(np.arange(9)), 1)[1][:, 0], np.arange(9))


class Options:
    """As FAISS passes them to a copy of an index on a GPU."""

    useFloat16 = False  # noqa: N815  FAISS's name


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda:1", [1]), ("cuda", [3])])
def test_an_index_goes_to_the_gpu_that_is_asked_for_and_to_no_other(
    device: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []

    def copied(_: object, number: int, index: str, options: Options) -> str:
        assert options.useFloat16
        numbers.append(number)
        return index

    faiss = import_faiss()
    for name, value in {
        "StandardGpuResources": object,
        "get_num_gpus": lambda: 4,
        "GpuClonerOptions": Options,
        "index_cpu_to_gpu": copied,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert moved("index", torch.device(device)) == "index"
    assert numbers == expected


def test_candidates_of_codes_are_ordered_by_their_true_distance(datastore_of: Make) -> None:
    """Rows around forty centres; their codes take a byte for four numbers."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(40, 256))
    keys = centres[rng.integers(40, size=4000)] + rng.normal(size=(4000, 256))
    store, rows = datastore_of(keys), np.arange(4000)
    centre = key_centre(store, rows)
    index, queries = ivfpq_index(store, rows, centre), store.keys(rows[::40])
    _, candidates = index.search(queries - centre, RERANK_FACTOR * 16)
    found, distances = rerank(store, queries, candidates)
    brute = ((queries[:, None].astype(np.float64) - store.keys(rows)) ** 2).sum(2)
    here = np.where(found >= 0, np.take_along_axis(brute, np.maximum(found, 0), 1), np.inf)
    np.testing.assert_allclose(distances, here, rtol=1e-5, atol=1e-5)
    assert np.all(np.diff(np.where(found >= 0, distances, 1e9), axis=1) >= 0)
    near = flat_index(store, rows, centre).search(queries - centre, 16)[1]
    by_code, by_key = (
        np.mean([np.isin(a, b[:16]).mean() for a, b in zip(near, ordered, strict=True)])
        for ordered in (candidates, found)
    )
    assert by_key > 0.95
    assert by_code < 0.9, "else nothing was to be put right"


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

    monkeypatch.setattr(module, "TorchIndex", on_cpu)  # in the place of a GPU
    found = flat_index(store, rows, centre, torch.device("cuda")).search(queries, 7)
    assert asked == [torch.device("cuda")]
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 40, 90])
def test_keys_that_are_not_held_are_found_all_the_same(
    k: int, tmp_path: Path, datastore_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORED_BLOCK", 32)
    monkeypatch.setattr(neighbors, "QUERY_BATCH", 64)
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


WIDE = dict.fromkeys(("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"), True)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({**WIDE, "cpu_name": "Intel Xeon 2.80GHz"}, "SKYLAKEX"),
        ({**WIDE, "cpu_name": "AMD EPYC 9R14"}, "ZEN"),
        ({**WIDE, "avx512_bw": False, "cpu_name": "Intel Xeon Phi 7250"}, "HASWELL"),
        ({"avx2": True, "fma3": True}, "HASWELL"),
        ({"avx2": True, "fma3": False, "cpu_name": "VIA"}, None),
        ({"architecture": "arm64", "neon": True}, None),
    ],
)
def test_products_of_the_processor_are_chosen(
    capabilities: dict[str, object], expected: str | None
) -> None:
    assert blas_kernels(capabilities) == expected


KERNELS = """
import json, os
from threadpoolctl import threadpool_info
from mlpmem_rag.index import import_faiss
before = dict(os.environ)
import_faiss()
assert dict(os.environ) == before
print(json.dumps([i["architecture"] for i in threadpool_info()
                  if i["internal_api"] == "openblas" and "faiss" in i["filepath"]]))
"""


@pytest.mark.parametrize("given", [None, "Nehalem"])
def test_faiss_takes_the_products_that_it_is_told(given: str | None) -> None:
    expected = given or blas_kernels(torch.cpu.get_capabilities())
    if expected is None:
        pytest.skip("a processor of which nothing is told")
    environment = {k: v for k, v in os.environ.items() if k != CORE_TYPE}
    if given is not None:
        environment[CORE_TYPE] = given
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", KERNELS],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    if not found:
        pytest.skip("FAISS comes with another library than OpenBLAS")
    assert [name.upper() for name in found] == [expected.upper()]


def test_a_gpu_searches_exactly_what_fits_into_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact_rows(576, CPU) == FLAT_MAX_ROWS
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 2**30, 80 * 2**30))
    assert exact_rows(576, torch.device("cuda")) == 40 * 2**30 // (6 * 576)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 80 * 2**30))
    assert exact_rows(576, torch.device("cuda")) == FLAT_MAX_ROWS
