"""What rows teach: noise, the way to the source, the loss of answers, lessons taken together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag import lessons
from mlpmem_rag.contexts import Contexts
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import DistillConfig, Rows, distill
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.lessons import (
    Columns,
    Curriculum,
    StudyConfig,
    StudyLesson,
    TextLesson,
    memory_log_probs,
    towards,
    with_noise,
)
from mlpmem_rag.memory import Memory, MemoryConfig, new_memory
from mlpmem_rag.query import Vectors
from mlpmem_rag.recall import question_keys
from mlpmem_rag.study import StudyRows
from mlpmem_rag.targets import Targets

CORPUS_TOKENS = torch.tensor([2, 3, 5, 8, 13, 21])
VOCABULARY, HIDDEN, QUERY = 30, 16, 6
TEXT_ROWS, STUDY_ROWS, QUESTIONS, SOURCES = 40, 60, 12, 5
EXACT = StudyConfig(query_noise=0, hidden_noise=0, source_share=0, smoothing=0)


def unit(rng: np.random.Generator, count: int) -> Vectors:
    vectors = rng.normal(size=(count, QUERY)).astype(np.float32)
    unit_vectors: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine is fast in bfloat16."""
    monkeypatch.setattr(lessons, "has_bfloat16", lambda _: False)


@pytest.fixture(scope="module")
def study() -> StudyRows:
    """Sixty rows of twelve questions, in an order of their own."""
    rng = np.random.default_rng(0)
    return StudyRows(
        keys=rng.normal(size=(STUDY_ROWS, HIDDEN)).astype(np.float16),
        next_tokens=CORPUS_TOKENS.numpy()[rng.integers(6, size=STUDY_ROWS)].astype(np.int32),
        questions=rng.permutation(np.repeat(np.arange(QUESTIONS), 5)).astype(np.int32),
        query_vectors=unit(rng, QUESTIONS),
        source_vectors=unit(rng, SOURCES),
        sources=rng.integers(SOURCES, size=QUESTIONS).astype(np.int32),
    )


@pytest.fixture(scope="module")
def memory() -> Memory:
    """Query-aware, none of its blocks the identity."""
    config = MemoryConfig(HIDDEN, 24, 1, "silu", True, len(CORPUS_TOKENS), query_size=QUERY)
    memory = new_memory(config, CORPUS_TOKENS, None, seed=0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(parameter.ndim)))
    return memory


@pytest.fixture(scope="module")
def columns(memory: Memory) -> Columns:
    return Columns(memory, VOCABULARY)


@pytest.fixture(scope="module")
def text(datastore_of: Callable[..., Datastore], columns: Columns) -> TextLesson:
    """Forty rows in four stretches of text."""
    rng = np.random.default_rng(1)
    tokens = CORPUS_TOKENS.numpy()[rng.integers(6, size=TEXT_ROWS)].astype(np.int32)
    store = datastore_of(rng.normal(size=(TEXT_ROWS, HIDDEN)), tokens)
    targets = Targets(tokens[:, None], np.ones((TEXT_ROWS, 1), np.float16), 1.0, 1.0)
    contexts = Contexts(unit(rng, 4), np.repeat(np.arange(4, dtype=np.int32), 10))
    return TextLesson(store, targets, columns, alpha=0.4, contexts=contexts)


# Noise, and the way towards the source.


@pytest.mark.parametrize("most", [0.5, 2.0])
def test_noise_has_any_length_up_to_the_largest_and_any_direction(most: float) -> None:
    vectors = 7 * torch.randn(4000, HIDDEN, generator=seeded(1))
    noise = with_noise(vectors, most, seeded()) - vectors
    relative = noise.norm(dim=1) / vectors.norm(dim=1)
    assert relative.max() <= most * (1 + 1e-4)
    quartiles = torch.quantile(relative, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(
        quartiles, most * torch.tensor([0.25, 0.5, 0.75]), atol=0.03 * most, rtol=0
    )
    along = F.cosine_similarity(noise, vectors)
    assert abs(along.mean()) < 0.02
    assert along.std().item() == pytest.approx(1 / math.sqrt(HIDDEN), rel=0.05)
    assert F.normalize(noise, dim=1).mean(0).norm() < 0.05


def test_no_noise_changes_nothing() -> None:
    vectors = torch.randn(50, HIDDEN, generator=seeded(1))
    assert torch.equal(with_noise(vectors, 0.0, seeded()), vectors)


@pytest.mark.parametrize("share", [0.0, 0.65, 1.0])
def test_a_share_of_the_queries_moves_part_of_the_way(share: float) -> None:
    queries, sources = (torch.randn(4000, QUERY, generator=seeded(n)) for n in (1, 2))
    moved = towards(queries, sources, share, seeded())
    way = ((moved - queries) * (sources - queries)).sum(1) / (sources - queries).square().sum(1)
    torch.testing.assert_close(moved, queries + way[:, None] * (sources - queries))
    stayed = (moved == queries).all(1)
    assert (~stayed).float().mean().item() == pytest.approx(share, abs=0.03)
    if share:
        assert 0 <= way.min() < 0.01
        assert 0.99 < way.max() <= 1 + 1e-5
        assert way[~stayed].mean().item() == pytest.approx(0.5, abs=0.03)


# The loss of answers.


def by_hand(memory: Memory, study: StudyRows, rows: Rows) -> Tensor:
    """Cross-entropy of the answers' tokens over the memory's own vocabulary."""
    keys = torch.from_numpy(study.keys[rows].astype(np.float32))
    queries = torch.from_numpy(question_keys(study, study.questions[rows]))
    truth = [CORPUS_TOKENS.tolist().index(token) for token in study.next_tokens[rows]]
    return F.cross_entropy(memory(keys, queries), torch.tensor(truth))


def test_without_noise_it_is_cross_entropy(
    memory: Memory, study: StudyRows, columns: Columns
) -> None:
    rows = np.array([0, 7, 8, 31, 59])
    found = StudyLesson(study, columns, EXACT).loss(memory, rows, seeded())
    torch.testing.assert_close(found, by_hand(memory, study, rows))


def test_smoothing_spreads_over_the_memorys_vocabulary(
    memory: Memory, study: StudyRows, columns: Columns
) -> None:
    rows = np.array([0, 7, 8, 31, 59])
    lesson = StudyLesson(study, columns, replace(EXACT, smoothing=0.3))
    keys, queries, truth = lesson.inputs(rows)
    log_probs = memory(keys, queries).log_softmax(-1)
    wanted = 0.7 * F.one_hot(truth, 6) + 0.3 / 6
    torch.testing.assert_close(
        lesson.loss(memory, rows, seeded()), -(wanted * log_probs).sum(1).mean()
    )


class Watched(Memory):
    """Notes what it is asked."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory.config)
        self.load_state_dict(memory.state_dict())
        self.keys: list[Tensor] = []
        self.queries: list[Tensor | None] = []

    def states(self, hidden: Tensor, query: Tensor | None = None) -> Tensor:
        self.keys.append(hidden.detach())
        self.queries.append(None if query is None else query.detach())
        return super().states(hidden, query)


def test_noise_is_on_both_inputs_and_queries_keep_their_length(
    memory: Memory, study: StudyRows, columns: Columns
) -> None:
    watched, rows = Watched(memory), np.arange(STUDY_ROWS)
    config = replace(EXACT, query_noise=0.9, hidden_noise=0.5)
    lesson = StudyLesson(study, columns, config)
    lesson.loss(watched, rows, seeded())
    keys, queries, _ = lesson.inputs(rows)
    (seen,), (asked,) = watched.keys, watched.queries
    assert asked is not None
    torch.testing.assert_close(asked.norm(dim=1), torch.ones(STUDY_ROWS))
    relative = (seen - keys).norm(dim=1) / keys.norm(dim=1)
    assert 0 < relative.min() < relative.max() <= 0.5 + 1e-4
    # A unit vector with noise of length 0.9 turns by no more than asin(0.9).
    turned = (asked * queries).sum(1)
    assert math.sqrt(1 - 0.9**2) - 1e-3 <= turned.min() < turned.max() <= 1 + 1e-3
    assert turned.min() < 0.9


def test_queries_move_towards_the_sentence_of_their_own_question(
    memory: Memory, study: StudyRows, columns: Columns
) -> None:
    watched, rows = Watched(memory), np.arange(STUDY_ROWS)
    StudyLesson(study, columns, replace(EXACT, source_share=1.0)).loss(watched, rows, seeded())
    (asked,) = watched.queries
    assert asked is not None
    for row, found in zip(rows, asked.numpy(), strict=True):
        question = study.questions[row]
        query = question_keys(study, np.array([question]))[0]
        source = study.source_vectors[study.sources[question]]
        plane = np.linalg.qr(np.stack([query, source], 1))[0]
        np.testing.assert_allclose(plane @ (plane.T @ found), found, atol=1e-5)
        assert found @ source >= query @ source - 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_noise": -0.1},
        {"hidden_noise": -0.1},
        {"source_share": 1.1},
        {"source_share": -0.1},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"query_noise": math.nan},
    ],
)
def test_settings_outside_what_is_allowed(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="allowed are 0"):
        StudyConfig(**wrong)


# Corpus text, with the text before it.


def test_half_of_the_text_rows_are_told_the_text_before(memory: Memory, text: TextLesson) -> None:
    watched, rows = Watched(memory), np.repeat(np.arange(TEXT_ROWS), 50)
    text.loss(watched, rows, seeded())
    (asked,) = watched.queries
    assert asked is not None
    told = asked.norm(dim=1) > 0
    assert told.float().mean().item() == pytest.approx(lessons.CONTEXT_SHARE, abs=0.03)
    contexts = text._contexts
    assert contexts is not None
    expected = contexts.vectors[np.repeat(np.repeat(np.arange(4), 10), 50)]
    np.testing.assert_array_equal(asked[told], expected[told.numpy()])


def test_a_memory_that_reads_no_query_is_told_nothing(
    datastore_of: Callable[..., Datastore],
) -> None:
    config = MemoryConfig(HIDDEN, 24, 1, "silu", True, len(CORPUS_TOKENS))
    watched = Watched(new_memory(config, CORPUS_TOKENS, None, seed=0))
    store = datastore_of(np.ones((3, HIDDEN)), [2, 3, 5])
    targets = Targets(np.array([[2], [3], [5]], np.int32), np.ones((3, 1), np.float16), 1.0, 1.0)
    lesson = TextLesson(store, targets, Columns(watched, VOCABULARY), alpha=0.4)
    lesson.loss(watched, np.arange(3), seeded())
    assert watched.queries == [None]


# Several lessons as one.


def test_a_curriculum_is_the_weighted_mean_of_its_lessons(
    memory: Memory, study: StudyRows, columns: Columns, text: TextLesson
) -> None:
    plain = TextLesson(text._datastore, text._targets, columns, alpha=0.4)
    exact = StudyLesson(study, columns, EXACT)
    both = Curriculum([(plain, TEXT_ROWS), (exact, STUDY_ROWS)])
    of_text, of_study = np.array([0, 3, 39]), np.array([0, 59])
    rows = np.concatenate([of_text, TEXT_ROWS + of_study])
    expected = (
        3 * plain.loss(memory, of_text, seeded()) + 2 * exact.loss(memory, of_study, seeded())
    ) / 5
    torch.testing.assert_close(both.loss(memory, rows, seeded()), expected)
    torch.testing.assert_close(
        both.loss(memory, TEXT_ROWS + of_study, seeded()), by_hand(memory, study, of_study)
    )
    torch.testing.assert_close(
        both.loss(memory, of_text, seeded()), plain.loss(memory, of_text, seeded())
    )


def test_a_curriculum_has_a_gradient_of_both(
    memory: Memory, study: StudyRows, columns: Columns, text: TextLesson
) -> None:
    both = Curriculum([(text, TEXT_ROWS), (StudyLesson(study, columns, EXACT), STUDY_ROWS)])
    for rows in (np.array([1, 2]), np.array([TEXT_ROWS + 1])):
        (gradient,) = torch.autograd.grad(
            both.loss(memory, rows, seeded()), [memory.lm_head.weight]
        )
        assert gradient.abs().sum() > 0


def test_the_generator_decides_and_the_global_state_does_not(
    memory: Memory, study: StudyRows, columns: Columns, text: TextLesson
) -> None:
    both = Curriculum([(text, TEXT_ROWS), (StudyLesson(study, columns, StudyConfig()), STUDY_ROWS)])
    rows = np.arange(TEXT_ROWS + STUDY_ROWS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = both.loss(memory, rows, seeded(5))
        torch.manual_seed(2)
        assert torch.equal(first, both.loss(memory, rows, seeded(5)))
        assert not torch.equal(first, both.loss(memory, rows, seeded(6)))


def test_answers_to_the_right_question_are_learned(tmp_path: Path, study: StudyRows) -> None:
    """The keys are all alike: only the query tells which token is right."""
    token_of = CORPUS_TOKENS.numpy()[np.arange(QUESTIONS) % 6].astype(np.int32)
    alike = replace(study, keys=np.ones_like(study.keys), next_tokens=token_of[study.questions])
    config = MemoryConfig(HIDDEN, 24, 1, "silu", True, len(CORPUS_TOKENS), query_size=QUERY)
    memory = new_memory(config, CORPUS_TOKENS, None, seed=0)
    lesson = StudyLesson(alike, Columns(memory, VOCABULARY), StudyConfig(0.1, 0.1, 0.0, 0.0))
    settings = DistillConfig(learning_rate=1e-2, epochs=60, batch_rows=30)
    distill(memory, lesson, np.arange(STUDY_ROWS), settings, tmp_path, validate=None)
    with torch.no_grad():
        queries = torch.from_numpy(question_keys(study))
        found = memory_log_probs(memory, torch.ones(QUESTIONS, HIDDEN), queries).argmax(1)
    np.testing.assert_array_equal(CORPUS_TOKENS[found], token_of)
