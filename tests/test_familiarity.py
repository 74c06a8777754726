"""How near a request is to what was learned: prototypes, and the cosine to the nearest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlpmem_rag import familiarity
from mlpmem_rag.familiarity import (
    MAX_PROTOTYPES,
    centres_by_faiss,
    centres_by_torch,
    find_prototypes,
    num_prototypes,
)
from mlpmem_rag.index import CPU
from mlpmem_rag.memory import Memory, MemoryConfig


def directions(count: int, width: int, seed: int) -> npt.NDArray[np.float32]:
    return unit(np.random.default_rng(seed).standard_normal((count, width)))


def unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return found.astype(np.float32)


def memory_of(prototypes: npt.NDArray[np.float32]) -> Memory:
    count, width = prototypes.shape
    config = MemoryConfig(8, 8, 1, "silu", True, 4, query_size=width, num_prototypes=count)
    memory = Memory(config)
    memory.prototypes.copy_(torch.from_numpy(prototypes))
    return memory


@pytest.mark.parametrize(
    ("questions", "width", "expected"),
    [(0, 384, 0), (3, 384, 0), (40, 384, 10), (10**6, 384, MAX_PROTOTYPES), (40, 0, 0)],
)
def test_a_quarter_as_many_as_questions_up_to_a_limit(
    questions: int, width: int, expected: int
) -> None:
    vectors = np.lib.stride_tricks.as_strided(
        np.zeros(1, np.float32), (questions, width), (0, 0), writeable=False
    )
    assert num_prototypes(vectors) == expected


def by_torch(vectors: npt.NDArray[np.float32], count: int, *, seed: int) -> Any:  # noqa: ANN401
    return centres_by_torch(vectors, count, seed, CPU)


@pytest.mark.parametrize("find_prototypes", [find_prototypes, by_torch])
def test_each_prototype_is_the_centre_of_the_questions_nearest_to_it(
    find_prototypes: Callable[..., npt.NDArray[np.float32]],
) -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(directions(12, 32, seed=1), 20, axis=0)
    points = unit(clusters + 0.02 * rng.standard_normal((240, 32)))
    found = find_prototypes(points, 12, seed=0)
    nearest = (points @ found.T).argmax(1)
    for number, prototype in enumerate(found):
        centre = points[nearest == number].mean(0)
        np.testing.assert_allclose(prototype, centre / np.linalg.norm(centre), atol=1e-5)
    np.testing.assert_array_equal(found, find_prototypes(points, 12, seed=0))


@pytest.mark.parametrize("block", [7, familiarity.BLOCK])
def test_torch_finds_centres_as_good_as_those_of_faiss(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(familiarity, "BLOCK", block)
    monkeypatch.setattr(familiarity, "MAX_SAMPLE", 10)
    rng = np.random.default_rng(0)
    clusters = directions(60, 32, seed=1)[rng.integers(60, size=1500)]
    points = unit(clusters + 0.1 * rng.standard_normal((1500, 32)))

    def objective(centres: npt.NDArray[np.float32]) -> float:
        np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-5)
        return float((points @ centres.T).max(1).mean())

    seeds = range(8)
    faiss = [objective(centres_by_faiss(points, 60, seed)) for seed in seeds]
    found = [objective(by_torch(points, 60, seed=seed)) for seed in seeds]
    # Without a round the centres are single vectors.
    monkeypatch.setattr(familiarity, "ROUNDS", 0)
    begun = [objective(by_torch(points, 60, seed=seed)) for seed in seeds]
    assert np.mean(found) > np.mean(faiss) - np.std(faiss) > np.mean(begun) + np.std(begun)


def test_a_centre_that_no_vector_is_near_to_starts_again() -> None:
    points = np.repeat(directions(2, 8, seed=0), [50, 1], axis=0)
    found = centres_by_torch(points, 20, 0, CPU)
    np.testing.assert_allclose((found @ points.T).max(1), 1, rtol=1e-5)


def test_on_a_gpu_faiss_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(
        familiarity, "centres_by_torch", lambda v, n, seed, _: centres_by_torch(v, n, seed, CPU)
    )
    few = directions(5, 32, seed=6)
    found = find_prototypes(few, 12, seed=0, device=torch.device("cuda"))
    np.testing.assert_allclose((few @ found.T).max(1), 1, rtol=1e-5)
    assert found.shape == (12, 32)


def test_fewer_vectors_than_prototypes_are_prototypes_themselves() -> None:
    few = directions(5, 32, seed=6)
    found = find_prototypes(few, 12, seed=0)
    assert found.shape == (12, 32)
    np.testing.assert_allclose((few @ found.T).max(1), 1, rtol=1e-5)
    none = find_prototypes(few[:0], 12, seed=0)
    assert memory_of(none).familiarity(torch.from_numpy(few)) == [0] * 5


def test_what_was_learned_is_more_familiar_than_anything_else() -> None:
    learned = directions(400, 64, seed=2)
    memory = memory_of(find_prototypes(learned, num_prototypes(learned), seed=0))
    known = memory.familiarity(torch.from_numpy(learned))
    other = memory.familiarity(torch.from_numpy(directions(400, 64, seed=3)))
    assert np.mean(known) > np.mean(other) + 0.2


def test_familiarity_is_the_largest_cosine() -> None:
    prototypes, asked = directions(7, 16, seed=4), directions(5, 16, seed=5)
    found = memory_of(prototypes).familiarity(torch.from_numpy(asked))
    np.testing.assert_allclose(found, (asked @ prototypes.T).max(1), rtol=1e-5)


def test_a_memory_of_no_questions_knows_no_request() -> None:
    assert memory_of(np.zeros((0, 16), np.float32)).familiarity(torch.ones(3, 16)) == [0.0] * 3
