"""From neighbours to next-token distributions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlpmem_rag import targets as module
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.index import CPU
from mlpmem_rag.neighbors import Neighbors, find_neighbors
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.targets import (
    TAU_FACTORS,
    Targets,
    build_targets,
    derive_tau,
    teacher_probability,
    vote,
    vote_on,
)

Make = Callable[..., Datastore]
Tokens = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
NO_ROW = np.inf


def made_up(rows: int = 300, k: int = 20, vocabulary: int = 9) -> tuple[Neighbors, Tokens]:
    """Random neighbours, some missing, and next tokens."""
    rng = np.random.default_rng(0)
    distances = np.sort(rng.exponential(5, size=(rows, k)), axis=1).astype(np.float32)
    ids = rng.integers(rows, size=(rows, k)).astype(np.int32)
    ids[::7, 12:], distances[::7, 12:] = -1, NO_ROW
    return Neighbors(ids, distances), rng.integers(vocabulary, size=rows).astype(np.int32)


def dense(neighbors: Neighbors, next_tokens: Tokens, tau: float) -> npt.NDArray[np.float64]:
    """p_kNN as the paper writes it, a loop over everything. *Shape:* (N, vocabulary)."""
    out = np.zeros((len(neighbors.ids), int(next_tokens.max()) + 1))
    for row, (ids, distances) in enumerate(zip(neighbors.ids, neighbors.distances, strict=True)):
        for neighbor, distance in zip(ids, distances, strict=True):
            if neighbor >= 0:
                out[row, next_tokens[neighbor]] += np.exp(-float(distance) / tau)
    out /= out.sum(1, keepdims=True)
    return out


def as_dense(targets: Targets, width: int) -> npt.NDArray[np.float64]:
    out = np.zeros((len(targets.token_ids), width + 1))  # the last column takes the unused places
    np.put_along_axis(out, targets.token_ids.astype(int), targets.probs.astype(float), 1)
    return out[:, :-1]


def test_a_hand_made_datastore(tmp_path: Path, datastore_of: Make) -> None:
    store = datastore_of([[0.0], [1.0], [3.0]], [5, 7, 5])
    neighbors = find_neighbors(store, np.arange(3), tmp_path, k=2)
    targets = build_targets(neighbors, store.next_tokens, tmp_path, tau=2.0)
    # Row 0: row 1 (token 7) at distance 1, row 2 (token 5) at 9: 1 / (1 + exp(-4)).
    # Row 1: both others say 5. Row 2: row 1 (token 7) at 4, row 0 (token 5) at 9: exp(-2.5).
    np.testing.assert_array_equal(targets.token_ids, [[7, 5], [5, -1], [7, 5]])
    expected = [[0.98201379, 0.01798621], [1.0, 0.0], [0.92414182, 0.07585818]]
    np.testing.assert_allclose(targets.probs, expected, atol=5e-4)
    assert targets.kept_mass == pytest.approx(1.0)


@pytest.mark.parametrize("tau", [0.2, 3.0, 1e4])
def test_targets_equal_a_loop_over_everything(
    tmp_path: Path, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROW_BATCH", 128)
    neighbors, next_tokens = made_up()
    targets = build_targets(neighbors, next_tokens, tmp_path, tau=tau)
    expected = dense(neighbors, next_tokens, tau)
    np.testing.assert_allclose(as_dense(targets, 9), expected, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(targets.probs.astype(float).sum(1), 1, atol=2e-3)
    rows = np.array([299, 0, 7, 7, 130])
    given_to_truth = teacher_probability(neighbors, next_tokens, rows, tau)
    np.testing.assert_allclose(given_to_truth, expected[rows, next_tokens[rows]], rtol=1e-5)


def test_fewer_tokens_keep_less_mass_and_are_renormalised(tmp_path: Path) -> None:
    neighbors, next_tokens = made_up()
    targets = build_targets(neighbors, next_tokens, tmp_path, tau=3.0, max_tokens=3)
    heaviest = np.sort(dense(neighbors, next_tokens, 3.0), 1)[:, :-4:-1]
    assert targets.kept_mass == pytest.approx(heaviest.sum(1).mean(), rel=1e-4)
    assert targets.kept_mass < 0.95
    expected = heaviest / heaviest.sum(1, keepdims=True)
    np.testing.assert_allclose(targets.probs, expected, rtol=1e-3)


def test_batches_are_told_stored_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROW_BATCH", 128)
    neighbors, next_tokens = made_up()
    events: list[ProgressEvent] = []
    voted: list[int] = []

    def counted(tokens: Tokens, *rest: Any) -> Any:  # noqa: ANN401
        voted.append(len(tokens))
        return vote(tokens, *rest)

    monkeypatch.setattr(module, "vote", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    folder = tmp_path / "new" / "targets"
    targets = build_targets(
        neighbors, next_tokens, folder, tau=3.0, max_tokens=3, on_progress=events.append
    )
    assert voted == [128, 128, 44]
    done = [128, 256, 300]
    assert events == [ProgressEvent("targets", rows, 300, "rows") for rows in done]
    heaviest = np.sort(dense(neighbors, next_tokens, 3.0), 1)[:, :-4:-1]
    assert targets.kept_mass == pytest.approx(heaviest.sum(1).mean(), rel=1e-4)
    assert [str(targets.token_ids.dtype), str(targets.probs.dtype)] == ["int32", "float16"]
    again = Targets.open(folder)
    for name in ("token_ids", "probs"):
        stored = getattr(again, name)
        assert isinstance(stored, np.memmap), "larger than memory, perhaps"
        assert stored.mode == "r"
        np.testing.assert_array_equal(stored, getattr(targets, name))
    assert (again.tau, again.kept_mass) == (3.0, targets.kept_mass)


VOTES = st.integers(1, 8).flatmap(
    lambda k: st.lists(
        st.lists(
            # Weights are multiples of 1/64: their sums are exact in any order.
            st.tuples(st.integers(-1, 5), st.integers(0, 64).map(lambda n: n / 64)),
            min_size=k,
            max_size=k,
        ),
        min_size=1,
        max_size=5,
    )
)


@pytest.mark.parametrize("vote", [vote, partial(vote_on, CPU)], ids=["numpy", "torch"])
@given(rows=VOTES, max_tokens=st.integers(1, 8))
def test_vote_equals_counting_in_a_dictionary(
    vote: Callable[..., tuple[Tokens, Weights]],
    rows: list[list[tuple[int, float]]],
    max_tokens: int,
) -> None:
    tokens = np.array([[token for token, _ in row] for row in rows], dtype=np.int32)
    weights = np.array([[weight for _, weight in row] for row in rows], dtype=np.float32)
    found_tokens, found_sums = vote(tokens, weights, max_tokens)
    for row, names, sums in zip(rows, found_tokens.tolist(), found_sums.tolist(), strict=True):
        counted: dict[int, float] = defaultdict(float)
        for token, weight in row:
            if token >= 0 and weight > 0:
                counted[token] += weight
        best = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:max_tokens]
        empty = [(-1, 0.0)] * (max_tokens - len(best))
        assert list(zip(names, sums, strict=True)) == best + empty


def sorted_by_several_keys(
    tokens: Tokens, weights: Weights, max_tokens: int
) -> tuple[Tokens, Weights]:
    """The plain way to what `vote` gives, sums in the order of the neighbours."""
    num_rows, k = tokens.shape
    order = np.argsort(tokens, axis=1, kind="stable")
    tokens = np.take_along_axis(tokens, order, 1)
    new = np.diff(tokens, axis=1, prepend=-2) != 0
    starts = np.flatnonzero(new)
    sums = np.add.reduceat(np.take_along_axis(weights, order, 1).reshape(-1), starts)
    rows, names = starts // k, tokens.reshape(-1)[starts]
    sums[names < 0] = 0.0
    out = np.full((num_rows, max_tokens), -1, np.int32), np.zeros((num_rows, max_tokens), "f4")
    for row in range(num_rows):
        here = rows == row
        best = np.lexsort((names[here], -sums[here]))[:max_tokens]
        best = best[sums[here][best] > module.MIN_PROBABILITY]
        out[0][row, : len(best)], out[1][row, : len(best)] = names[here][best], sums[here][best]
    return out


def many_votes(vocabulary: int) -> tuple[Tokens, Weights]:
    """Of 1,024 neighbours, some missing, with weights of all sizes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=(40, 1024)).astype(np.int32)
    weights = rng.exponential(size=tokens.shape) ** 6
    tokens[::3, 900:], weights[::3, 900:] = -1, 0
    weights[1] = 1.0  # many ties
    return tokens, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [3, 700, 2**31 - 1])
def test_votes_are_those_of_sorting_by_several_keys(vocabulary: int) -> None:
    tokens, weights = many_votes(vocabulary)
    expected = sorted_by_several_keys(tokens, weights, 128)
    for mine, theirs in zip(vote(tokens, weights, 128), expected, strict=True):
        assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("device", DEVICES)
def test_votes_by_torch_are_those_of_numpy(device: str) -> None:
    tokens, weights = many_votes(90)
    names, sums = vote_on(torch.device(device), tokens, weights, 100)
    expected_names, expected = vote(tokens, weights, 100)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    # Tokens whose sums differ in the last digit alone may change places.
    for row, other in zip(names.tolist(), expected_names.tolist(), strict=True):
        assert set(row) == set(other)
    assert np.mean(names == expected_names) > 0.99
    assert [str(found.dtype) for found in (sums, names)] == ["float32", "int32"]


def test_several_threads_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbors, next_tokens = made_up()
    written = []
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        folder = tmp_path / str(threads)
        build_targets(neighbors, next_tokens, folder, tau=3.0, max_tokens=3)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]


def test_on_a_gpu_torch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def on_cpu(device: torch.device, *given: Any) -> tuple[Tokens, Weights]:  # noqa: ANN401
        asked.append(device)
        return vote_on(CPU, *given)

    monkeypatch.setattr(module, "vote_on", on_cpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    there, given = torch.device("cuda:1"), made_up()
    found = build_targets(*given, tmp_path / "there", tau=3.0, device=there)
    expected = build_targets(*given, tmp_path / "here", tau=3.0)
    assert asked == [there]
    np.testing.assert_allclose(as_dense(found, 9), as_dense(expected, 9), atol=1e-3)


@pytest.mark.parametrize("tau", [0.0, -1.0, np.nan, np.inf])
def test_tau_must_be_positive(tmp_path: Path, tau: float) -> None:
    with pytest.raises(ConfigError, match="allowed is a number above 0"):
        build_targets(*made_up(), tmp_path, tau=tau)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_derived_tau_is_the_best_of_the_grid(noise: float, scale: float) -> None:
    """Neighbours agree with a row the more the nearer they are, apart from the noise.

    Best are factors 0.0125, 0.15 and 0.4; with another share of the unigram it would be others.
    """
    rng = np.random.default_rng(2)
    place = rng.uniform(0, 30, size=400)
    next_tokens = (place % 10).astype(np.int32)
    noisy = rng.random(400) < noise
    next_tokens[noisy] = rng.integers(10, size=noisy.sum())
    distances = (place[:, None] - place[None]) ** 2 * scale
    np.fill_diagonal(distances, np.inf)
    ids = np.argsort(distances, 1)[:, :60].astype(np.int32)
    near = np.take_along_axis(distances, ids.astype(int), 1).astype(np.float32)
    neighbors, rows = Neighbors(ids, near), np.arange(0, 400, 2)

    unigram = np.array([(next_tokens[rows] == token).mean() for token in range(10)])
    truth = next_tokens[rows]
    taus = [factor * near[:, :10].mean(dtype=float) for factor in TAU_FACTORS]
    fits = [
        np.log((dense(neighbors, next_tokens, tau)[rows, truth] + unigram[truth]) / 2).mean()
        for tau in taus
    ]
    assert np.ptp(fits) > 1e-3
    assert derive_tau(neighbors, next_tokens, rows) == pytest.approx(taus[int(np.argmax(fits))])


def test_equal_contexts_vote_equally(tmp_path: Path, datastore_of: Make) -> None:
    store = datastore_of(np.ones((4, 2)), [3, 3, 8, 8])
    neighbors = find_neighbors(store, np.arange(4), tmp_path, k=3)
    tau = derive_tau(neighbors, store.next_tokens, np.arange(4))
    targets = build_targets(neighbors, store.next_tokens, tmp_path, tau=tau)
    thirds = [[0, 0, 0, 1 / 3, 0, 0, 0, 0, 2 / 3]] * 2 + [[0, 0, 0, 2 / 3, 0, 0, 0, 0, 1 / 3]] * 2
    np.testing.assert_allclose(as_dense(targets, 9), thirds, atol=5e-4)


def test_a_row_without_neighbours_has_no_target(tmp_path: Path) -> None:
    ids = np.array([[1, -1], [-1, -1]], dtype=np.int32)
    distances = np.array([[1, NO_ROW], [NO_ROW, NO_ROW]], dtype=np.float32)
    neighbors, next_tokens = Neighbors(ids, distances), np.array([4, 6], dtype=np.int32)
    targets = build_targets(neighbors, next_tokens, tmp_path, tau=1.0)
    np.testing.assert_array_equal(targets.token_ids, [[6, -1], [-1, -1]])
    np.testing.assert_array_equal(targets.probs, [[1, 0], [0, 0]])
    assert targets.kept_mass == pytest.approx(0.5)
