"""Provenance: the nearest row that holds the token, found the slow way too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmem_rag.contexts import Contexts
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.memory import Candidates, Memory, MemoryConfig
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.pipeline import train
from mlpmem_rag.provenance import Origin, Provenance, shares
from mlpmem_rag.questions import Question
from mlpmem_rag.recall import question_keys
from mlpmem_rag.study import StudyRows

WIDTH, QUERY = 3, 2


@pytest.fixture(scope="module")
def rows(datastore_of: Callable[..., Datastore]) -> Provenance:
    """Forty rows of text in three documents, and twelve of four questions."""
    random = np.random.default_rng(0)
    store = datastore_of(random.normal(size=(40, WIDTH)), random.integers(0, 6, 40))
    documents = np.repeat([0, 1, 2], [10, 10, 20]).astype(np.int32)
    positions = np.concatenate([np.arange(n) + 1 for n in (10, 10, 20)]).astype(np.int32)
    store = Datastore(store.key_shards, store.next_tokens, documents, positions)
    contexts = Contexts(
        random.normal(size=(5, QUERY)).astype(np.float32), np.repeat(np.arange(5), 8)
    )
    study = StudyRows(
        keys=random.normal(size=(12, WIDTH)).astype(np.float16),
        next_tokens=random.integers(0, 6, 12).astype(np.int32),
        questions=np.repeat(np.arange(4), 3).astype(np.int32),
        query_vectors=random.normal(size=(4, QUERY)).astype(np.float32),
        source_vectors=random.normal(size=(4, QUERY)).astype(np.float32),
        sources=np.arange(4, dtype=np.int32),
    )
    questions = tuple(Question(f"q{n}?", f"a{n}", f"s{n}.", "abc"[n % 3]) for n in range(4))
    return Provenance(("a", "b", "c"), store, contexts, study, questions)


def memory_of(scale: float) -> Memory:
    """Takes requests as they are."""
    config = MemoryConfig(WIDTH, 4, 1, "silu", True, 6, query_size=QUERY, hidden_scale=scale)
    return Memory(config)


def slowly(
    rows: Provenance, state: list[float], token: int, query: list[float] | None, scale: float
) -> Origin | None:
    """Every row in turn."""
    assert rows.contexts is not None
    assert rows.study is not None
    found: list[Origin] = []
    store = rows.datastore
    for n in range(store.num_rows):
        if store.next_tokens[n] == token:
            key = store.keys(np.array([n]))[0]
            vector = rows.contexts.vectors[rows.contexts.blocks[n]]
            far = distance(key, state, scale) + distance(vector, query, 1.0)
            place = int(store.positions[n])
            found.append(Origin(rows.documents[store.documents[n]], None, "", place, far))
    for n in range(rows.study.num_rows):
        if rows.study.next_tokens[n] == token:
            number = rows.study.questions[n]
            vector = question_keys(rows.study)[number]
            far = distance(rows.study.keys[n], state, scale) + distance(vector, query, 1.0)
            asked = rows.questions[number]
            found.append(Origin(asked.document, asked.text, asked.source, -1, far))
    return min(found, key=lambda origin: origin.distance, default=None)


def distance(row: np.ndarray, point: list[float] | None, scale: float) -> float:
    if point is None:
        return 0.0
    return float(sum(((float(r) - p) / scale) ** 2 for r, p in zip(row, point, strict=True)))


VALUES = st.floats(-2, 2, width=32)


@settings(max_examples=60)
@given(
    st.lists(VALUES, min_size=WIDTH, max_size=WIDTH),
    st.one_of(st.none(), st.lists(VALUES, min_size=QUERY, max_size=QUERY)),
    st.integers(0, 7),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_the_origin_is_the_nearest_row_with_the_token(
    rows: Provenance, state: list[float], query: list[float] | None, token: int, scale: float
) -> None:
    (found,) = rows.origins(
        np.array([state], np.float32),
        [token],
        None if query is None else np.array(query, np.float32),
        memory_of(scale),
    )
    expected = slowly(rows, state, token, query, scale)
    if expected is None:
        assert found is None
        assert token >= 6
    else:
        assert found is not None
        assert found.distance == pytest.approx(expected.distance, rel=1e-4, abs=1e-5)
        if found != expected:  # two rows at the same distance
            assert found.document in rows.documents


def test_a_passage_is_what_stands_around_a_place(rows: Provenance) -> None:
    tokens = np.asarray(rows.datastore.next_tokens).tolist()
    assert rows.passage("b", 5, length=4) == tokens[12:17]
    assert rows.passage("c", 1, length=100) == tokens[20:40]


def test_a_request_is_traced_to_sentences_nearest_first(rows: Provenance) -> None:
    wordings = [("one", "A."), ("two", "B."), ("three", "B."), ("four", ""), ("five", "C.")]
    asked = tuple(Question(text, "x", source, "a") for text, source in wordings)
    elsewhere = Question("six", "x", "B.", "b")
    taught = replace(rows, questions=(*asked, elsewhere))
    numbers = torch.tensor([[0, 1, 2, 3, 4, 5, 0]])
    scores = torch.tensor([[0.1, 0.5, 0.9, 1.0, 0.3, 0.8, -torch.inf]])
    found = taught.recalled(Candidates(torch.tensor([3]), numbers, scores), 9)
    assert [one.question.text for one in found] == ["three", "six", "five", "one"]
    assert [one.score for one in found] == pytest.approx([0.9, 0.8, 0.3, 0.1])
    assert taught.recalled(Candidates(torch.tensor([3]), numbers, scores)) == found[:1]


def test_shares_count_the_tokens_of_each_document() -> None:
    here, there = (Origin(name, None, "", 0, 0.0) for name in "ab")
    assert shares([here, there, here, None]) == {"a": 0.5, "b": 0.25}


# From a training.


@pytest.fixture(scope="module")
def folder(
    tiny_folder: Path, tiny_documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("provenance") / "memory"
    train(
        Corpus(tuple(tiny_documents)),
        out=out,
        recipe="paper",
        base_model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        window=64,
        neighbors=8,
        distill=DistillConfig(epochs=1, batch_rows=256),
    )
    return out


def test_text_of_the_corpus_is_traced_to_where_it_stands(
    folder: Path, tiny_documents: list[Document]
) -> None:
    memory = MemoryModel.load(folder, device="cpu", dtype="float32")
    provenance = Provenance.open(folder)
    assert provenance.documents == tuple(document.id for document in tiny_documents)
    store = provenance.datastore
    row = int(np.flatnonzero(np.asarray(store.documents) == 5)[20])
    key = store.keys(np.array([row]))
    token = int(store.next_tokens[row])
    (origin,) = provenance.origins(key, [token], None, memory_of(1.0))
    assert origin == Origin("doc-5", None, "", int(store.positions[row]), 0.0)
    assert memory.recalled("Who found it?", provenance) == []  # it was taught no questions
    traced = memory.origins("Who found it?", "Ines Maro", provenance)
    assert "".join(token for token, _ in traced).strip() == "Ines Maro"
    assert all(origin is not None for _, origin in traced)


def test_rows_of_another_training_are_not_taken_for_this_ones(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "memory"
    (copy / "work").mkdir(parents=True)
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"does not hold the rows .* any more"):
        Provenance.open(copy)
    note = json.loads((folder / "work" / "documents.json").read_text())
    (copy / "work" / "documents.json").write_text(json.dumps({**note, "run": "x"}))
    with pytest.raises(ArtifactError, match="of another training than the memory beside it"):
        Provenance.open(copy)


def test_a_memory_that_has_no_folder_cannot_trace(folder: Path) -> None:
    memory = MemoryModel.load(folder, device="cpu", dtype="float32")
    unnamed = MemoryModel(memory.model, memory.tokenizer)
    with pytest.raises(ConfigError, match="loaded from a folder"):
        unnamed.origins("Who?", "Ines", Provenance.open(folder))
