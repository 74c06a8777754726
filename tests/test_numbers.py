"""Corpora and settings at the edge of what there is: numbers stay numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlpmem_rag import pipeline
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.errors import CorpusError
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.mixing import Share, best_lambda, mix, mixture, mixture_nll
from mlpmem_rag.targets import neighbor_weights, vote

LAMBDAS = (0.0, 5e-324, 1e-30, 1e-8, 0.5, 1 - 2**-53, 1.0)
TEMPERATURES = (1e-6, 1.0, 1e6)


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus(tuple(Document(str(n), text, None, str(n)) for n, text in enumerate(texts)))


def unequal_contexts() -> list[str]:
    dice = random.Random(0)
    return [
        "".join(dice.choices("abcdefghijklmnopqrstuvwxyz0123456789.,;:!?", k=300)) for _ in "ab"
    ]


CORPORA: dict[str, Callable[[], list[str]]] = {
    "one token repeated": lambda: ["!" * 300],
    "one token repeated in many documents": lambda: ["!" * 30] * 20,
    "all duplicates": lambda: ["Ines Maro found wild honey in the old mill."] * 30,
    "one document": lambda: ["".join(f"Line {n}: {n * 7919 % 1000} crowns.\n" for n in range(40))],
    "no two equal contexts": unequal_contexts,
    "documents of two tokens": lambda: [a + b for a in "abcdefghijklmn" for b in "opqrstuvwxyz"],
    "one long, many short": lambda: ["word " * 300, *("ab" for _ in range(50))],
}


@pytest.fixture(params=CORPORA)
def extreme(request: pytest.FixtureRequest) -> Corpus:
    return corpus_of(CORPORA[request.param]())


def test_an_extreme_corpus_gives_a_memory_that_answers_in_numbers(
    extreme: Corpus, bare_folder: Path, tmp_path: Path, quick_training: dict[str, Any]
) -> None:
    options = {**quick_training, "base_model": str(bare_folder)}
    report = pipeline.train(extreme, out=tmp_path, **options)
    if report.perplexity is not None:
        figures = (report.perplexity.base, report.perplexity.teacher, report.perplexity.memory)
        assert all(1.0 <= figure < math.inf for figure in figures)
    assert 0.0 < report.tau < math.inf
    assert 0.0 <= report.kept_mass <= 1.0 + 1e-5
    model = MemoryModel.load(tmp_path, device="cpu")
    ids = torch.tensor([model.tokenizer.encode("Ines!")])
    for lambda_ in LAMBDAS:
        for temperature in TEMPERATURES:
            model.model.config.memory_temperature = temperature
            with torch.no_grad():
                logits = model.model(input_ids=ids, memory_lambda=lambda_).logits
            assert not logits.isnan().any(), (lambda_, temperature)
            probabilities = logits.double().softmax(-1)
            torch.testing.assert_close(
                probabilities.sum(-1), torch.ones_like(logits[..., 0]).double()
            )
    for lambda_ in (0.0, 1.0):
        assert model.answer("Ines?", lambda_=lambda_, max_new_tokens=3).new_tokens > 0


def test_documents_of_one_token_teach_nothing(
    bare_folder: Path, tmp_path: Path, quick_training: dict[str, Any]
) -> None:
    corpus = corpus_of(["a"] * 400)
    with pytest.raises(CorpusError, match=r"0 tokens to learn in 400 document\(s\); at least"):
        pipeline.train(
            corpus, out=tmp_path / "memory", **{**quick_training, "base_model": str(bare_folder)}
        )


def test_a_vocabulary_of_one_token_is_certain_of_it() -> None:
    memory = Memory(MemoryConfig(8, 4, 1, "silu", gated=True, vocab_size=1))
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 1e4
    for temperature in TEMPERATURES:
        log_probs = memory.log_probs(hidden, temperature=temperature).detach()
        assert torch.equal(log_probs, torch.zeros(3, 1))
        mixed = mix(torch.zeros(3, 4), log_probs, torch.tensor([2]), 0.5)
        expected = torch.tensor([0.125, 0.125, 0.625, 0.125])
        torch.testing.assert_close(mixed[0].exp(), expected)


FLOATS = st.floats(0.0, 2.0**127, width=32)


def reference_weights(row: npt.NDArray[np.float32], tau: float) -> list[float]:
    """Softmax in the logarithms' domain, one number at a time."""
    there = [float(d) for d in row if math.isfinite(d)]
    if not there:
        return [0.0] * len(row)
    nearest = min(there)
    gaps = [(float(d) - nearest) for d in row]
    votes = [math.exp(-min(gap / tau if gap < tau * 800 else 800.0, 800.0)) for gap in gaps]
    return [
        vote_ / sum(votes) if math.isfinite(d) else 0.0 for vote_, d in zip(votes, row, strict=True)
    ]


@given(
    hnp.arrays(np.float32, (3, 5), elements=FLOATS | st.just(math.inf)),
    st.floats(5e-324, 1.7e308),
)
@example(np.zeros((3, 5), np.float32), 5e-324)
@example(np.full((3, 5), np.inf, np.float32), 1.0)
@example(np.array([[0, 1e-45, 3e38, 1, 2]] * 3, np.float32), 5e-324)
@example(np.array([[0, 1e-45, 3e38, 1, 2]] * 3, np.float32), 1.7e308)
def test_votes_are_shares_at_any_distance_and_temperature(
    distances: npt.NDArray[np.float32], tau: float
) -> None:
    distances = np.sort(distances, axis=1)
    weights = neighbor_weights(distances, tau)
    for row, found in zip(distances, weights, strict=True):
        np.testing.assert_allclose(found, reference_weights(row, tau), atol=1e-6)
    tokens = np.tile(np.array([4, 4, 7, 7, 9], np.int32), (3, 1))
    names, sums = vote(tokens, weights, 2)
    assert np.isfinite(sums).all()
    assert ((sums >= 0) & (sums <= 1 + 1e-5)).all()
    assert (sums[:, 0] >= sums[:, 1]).all()
    assert set(names.reshape(-1).tolist()) <= {-1, 4, 7, 9}


LOGITS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    hnp.arrays(np.float32, (2, 6), elements=LOGITS),
    hnp.arrays(np.float32, (2, 3), elements=LOGITS),
    st.floats(0.0, 1.0),
)
@example(np.zeros((2, 6), np.float32), np.zeros((2, 3), np.float32), 5e-324)
@example(np.full((2, 6), -1e30, np.float32), np.full((2, 3), 1e30, np.float32), 1 - 2**-53)
def test_a_mixture_sums_to_one_at_any_lambda(
    base: npt.NDArray[np.float32], memory: npt.NDArray[np.float32], lambda_: float
) -> None:
    log_probs = torch.from_numpy(memory).log_softmax(-1)
    mixed = mix(torch.from_numpy(base), log_probs, torch.tensor([0, 2, 5]), lambda_)
    assert not mixed.isnan().any()
    assert (mixed.double().softmax(-1) <= 1.0).all()
    if lambda_:
        expected = (1 - lambda_) * torch.from_numpy(base).double().softmax(-1)
        expected[:, [0, 2, 5]] += lambda_ * log_probs.double().exp()
        torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-4)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2))
def test_two_memories_and_the_base_share_one_whole(weights: list[float]) -> None:
    base = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    tokens = (torch.tensor([0, 2]), torch.tensor([2, 3, 4]))
    shares = [
        Share(torch.zeros(2, len(t)).log_softmax(-1), t, torch.tensor(w, dtype=torch.float64))
        for t, w in zip(tokens, weights, strict=True)
    ]
    mixed = mixture(base, shares)
    assert not mixed.isnan().any()
    whole = mixed.double().exp().sum(-1)  # of float32 logarithms
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-6, rtol=0)


# Not smaller: the loss takes anything below the smallest normal number for that number.
PROBABILITIES = hnp.arrays(np.float64, 5, elements=st.just(0.0) | st.floats(1e-200, 1.0))


@given(PROBABILITIES, PROBABILITIES)
@example(np.zeros(5), np.zeros(5))
@example(np.zeros(5), np.ones(5))
@example(np.ones(5), np.zeros(5))
def test_the_best_lambda_is_one_and_no_worse_than_others(
    base: npt.NDArray[np.float64], memory: npt.NDArray[np.float64]
) -> None:
    best = best_lambda(base, memory)
    assert 0.0 <= best < 1.0
    found = mixture_nll(base, memory, best)
    assert math.isfinite(found)
    others = [mixture_nll(base, memory, lambda_) for lambda_ in (0.0, 0.25, 0.5, 0.75, 0.99)]
    assert found <= min(others) + 1e-6
