"""Requests compared word by word with learned questions, against the same by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.embedded import MINILM
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.late_interaction import (
    CANDIDATES,
    REQUEST_TOKENS,
    SCALE,
    TOKEN_SIZE,
    WEIGHT,
    TokenTable,
    WordRows,
    Words,
    request_size,
    tokens_of,
)
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.query import POOLED, SentenceEncoder, load_encoder
from mlpmem_rag.questions import Question
from mlpmem_rag.tensors import check_words, parse_shape
from mlpmem_rag.words import open_words, requests, save_words, word_rows

from .test_query import needs_minilm

WIDTH = 80
COUNTS, LENGTHS = [3, 0, 5, 1, 40, 7, 2, 9], [4, 120, 6]
SOURCES = np.array([0, 0, 1, 1, 1, 2, 2, 0], np.int32)

Floats = npt.NDArray[np.float32]


def unit(rng: np.random.Generator, *shape: int) -> Floats:
    vectors = rng.standard_normal(shape)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def table(counts: list[int], seed: int) -> TokenTable:
    codes = unit(np.random.default_rng(seed), sum(counts), TOKEN_SIZE) * SCALE
    return TokenTable(np.rint(codes).astype(np.int8), np.cumsum(counts, dtype=np.int32))


@pytest.fixture
def rows() -> WordRows:
    """Eight questions about three sentences."""
    rng = np.random.default_rng(0)
    projection = np.linalg.qr(rng.standard_normal((WIDTH, TOKEN_SIZE)))[0].astype(np.float32)
    return WordRows(
        unit(rng, 8, WIDTH), unit(rng, 3, WIDTH), projection, table(COUNTS, 1), table(LENGTHS, 2)
    )


def texts(told: TokenTable) -> list[npt.NDArray[np.int8]]:
    return np.split(told.codes, told.ends[:-1])


def by_hand(asked: Floats, question: int, rows: WordRows) -> float:
    """Equation 3 of ColBERT as a mean, over the words of a question and its sentence."""
    mine = texts(rows.questions)[question][:32].astype(np.float32) / SCALE
    other = texts(rows.sentences)[SOURCES[question]][:96].astype(np.float32) / SCALE
    total = weights = 0.0
    for place, token in enumerate(token for token in asked if token.any()):
        word = token @ rows.projection
        word = word / np.linalg.norm(word)
        most = max((float(word @ one) for one in mine), default=-1.0)
        if place > 0:
            most = max(most, *(float(word @ one) for one in other))
        weight = 1.0 if place else 2.0
        total, weights = total + weight * most, weights + weight
    return total / weights


def asked_with(rng: np.random.Generator, counts: list[int]) -> Floats:
    asked = np.zeros((len(counts), REQUEST_TOKENS, WIDTH), np.float32)
    for row, count in zip(asked, counts, strict=True):
        row[:count] = unit(rng, count, WIDTH)
    return asked


def words_of(rows: WordRows, numbers: list[int], places: int = 8) -> Words:
    words = Words(WIDTH, places, rows.shape)
    words.know(rows, np.array(numbers), SOURCES)
    return words


def test_the_agreement_of_words_by_hand(rows: WordRows) -> None:
    asked = asked_with(np.random.default_rng(3), [5, 1, REQUEST_TOKENS])
    numbers = torch.tensor([[0, 1, 4, 7], [2, 2, 3, 5], [6, 0, 1, 4]])
    found = words_of(rows, list(range(8))).agreement(torch.from_numpy(asked), numbers)
    expected = [
        [by_hand(row, int(n), rows) for n in line] for row, line in zip(asked, numbers, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert np.ptp(expected) > 0.05


def test_a_request_without_words_agrees_with_nothing(rows: WordRows) -> None:
    asked = torch.zeros(1, REQUEST_TOKENS, WIDTH)
    found = words_of(rows, [0, 1]).agreement(asked, torch.tensor([[0, 1]]))
    assert found.tolist() == [[0.0, 0.0]]


def test_some_questions_keep_their_words(rows: WordRows) -> None:
    chosen = [6, 2, 1, 4]
    asked = torch.from_numpy(asked_with(np.random.default_rng(4), [6]))
    some = words_of(rows, chosen)
    some.know(rows, np.arange(8), SOURCES)  # what was there before is forgotten
    some.know(rows, np.array(chosen), SOURCES)
    every = words_of(rows, list(range(8)))
    torch.testing.assert_close(
        some.agreement(asked, torch.arange(4)[None]), every.agreement(asked, torch.tensor([chosen]))
    )
    ends = some.question_ends.tolist()
    assert ends[4:] == [ends[3]] * 4, "free places have no words"
    assert not some.question_tokens[ends[3] :].any()


def test_some_texts_of_a_table() -> None:
    told = table(COUNTS, 5)
    some = told.some(np.array([4, 1, 0, 4]))
    for found, number in zip(texts(some), [4, 1, 0, 4], strict=True):
        np.testing.assert_array_equal(found, texts(told)[number])
    assert len(told.some(np.zeros(0, np.int64)).codes) == 0


def memory_of(rows: WordRows, keys: Floats) -> Memory:
    config = MemoryConfig(
        8,
        8,
        1,
        "silu",
        True,
        4,
        query_size=WIDTH,
        num_questions=len(keys),
        recalls=True,
        **asdict(rows.shape),
    )
    memory = Memory(config)
    memory.questions.copy_(torch.from_numpy(keys))
    assert memory.words is not None
    memory.words.know(rows, np.arange(8), SOURCES)
    return memory


def request(vectors: Floats, tokens: Floats) -> torch.Tensor:
    whole = np.concatenate([vectors, tokens.reshape(len(vectors), -1)], axis=1)
    return torch.from_numpy(whole)


def test_the_recalled_question_has_the_words_by_hand(rows: WordRows) -> None:
    rng = np.random.default_rng(6)
    keys, vectors, tokens = unit(rng, 8, WIDTH), unit(rng, 30, WIDTH), asked_with(rng, [4] * 30)
    memory = memory_of(rows, keys)
    asked = request(vectors, tokens)
    assert asked.shape[1] == memory.config.request_size == request_size(WIDTH)
    torch.testing.assert_close(tokens_of(asked, WIDTH), torch.from_numpy(tokens))
    found, sure, other = memory.nearest(asked), memory.familiarity(asked), 0
    for line in range(30):
        near = keys @ vectors[line]
        agreed = np.array([by_hand(tokens[line], n, rows) for n in range(8)])
        best = int((near + WEIGHT * agreed).argmax())
        assert found[line] == best
        expected = (near[best] + WEIGHT * agreed[best]) / (1 + WEIGHT)
        assert sure[line] == pytest.approx(expected, abs=1e-5)
        one = memory.candidates(asked).of(line)
        scores = (near + WEIGHT * agreed)[one.numbers[0]] / (1 + WEIGHT)
        assert one.scores[0].tolist() == pytest.approx(scores.tolist(), abs=1e-5)
        assert sorted(one.numbers[0].tolist()) == list(range(8))
        other += best != int(near.argmax())
    assert other > 3, "words have a say"
    torch.testing.assert_close(memory.recall(asked), torch.from_numpy(keys)[found])
    asked[1] = 0
    assert not memory.recall(asked)[1].any()


def test_only_the_nearest_few_are_compared(rows: WordRows) -> None:
    rng = np.random.default_rng(7)
    many = 3 * CANDIDATES
    keys, vector = unit(rng, many, WIDTH), unit(rng, 1, WIDTH)
    last = int((keys @ vector[0]).argmin())
    shown = replace(rows, questions=table([4] * many, 8), query_vectors=keys)
    words = shown.questions.codes[4 * last : 4 * last + 4].astype(np.float32) / SCALE
    tokens = np.zeros((1, REQUEST_TOKENS, WIDTH), np.float32)
    tokens[0, :4] = words @ rows.projection.T
    config = MemoryConfig(
        8, 8, 1, "silu", True, 4, query_size=WIDTH, num_questions=many, recalls=True,
        **asdict(shown.shape),
    )  # fmt: skip
    memory = Memory(config)
    memory.questions.copy_(torch.from_numpy(keys))
    assert memory.words is not None
    memory.words.know(shown, np.arange(many), np.zeros(many, np.int32))
    asked = request(vector, tokens)
    agreed = memory.words.agreement(torch.from_numpy(tokens), torch.arange(many)[None])[0]
    assert int(agreed.argmax()) == last
    assert int(memory.nearest(asked)) != last
    near = request(keys[last][None], tokens)
    assert int(memory.nearest(near)) == last


def test_a_query_vector_alone_is_recalled_by_its_key(rows: WordRows) -> None:
    rng = np.random.default_rng(9)
    keys, vectors = unit(rng, 8, WIDTH), torch.from_numpy(unit(rng, 20, WIDTH))
    memory = memory_of(rows, keys)
    expected = (vectors @ torch.from_numpy(keys).T).max(1)
    torch.testing.assert_close(memory.nearest(vectors), expected.indices)
    assert memory.familiarity(vectors) == pytest.approx(expected.values.tolist(), abs=1e-5)


# The words of texts.


@pytest.fixture(scope="module")
def minilm(tiny_backbone: Backbone) -> SentenceEncoder:
    encoder = load_encoder(MINILM, tiny_backbone)
    assert isinstance(encoder, SentenceEncoder)
    return encoder


ASKED = [
    Question("Who built the mill?", "Ines", "Ines built the mill in 1731.", "d"),
    Question("When was the mill built?", "1731", "Ines built the mill in 1731.", "d"),
    Question("What does Tollen keep?", "bees", "Tollen keeps bees.", "d"),
]


@needs_minilm
def test_tokens_are_those_of_the_model_without_its_marks(minilm: SentenceEncoder) -> None:
    said = [question.text for question in ASKED] + ["mill", ""]
    vectors, tokens = minilm.encode_tokens(said)
    np.testing.assert_allclose(vectors, minilm.encode(said), atol=1e-5)
    assert tokens is not None
    tokenizer = minilm.model.tokenizer
    expected = [len(tokenizer.tokenize(text)) for text in said]
    assert [len(words) for words in tokens] == expected
    assert expected[-1] == 0
    features = minilm.model.preprocess([said[0]])
    with torch.no_grad():
        states = minilm.model(features)["token_embeddings"][0, 1:-1]
    unit_states = torch.nn.functional.normalize(states, dim=-1).numpy()
    np.testing.assert_allclose(tokens[0], unit_states, atol=1e-4)


@needs_minilm
def test_the_same_words_agree_and_come_back_from_the_disk(
    minilm: SentenceEncoder, tmp_path: Path
) -> None:
    told: list[int] = []
    rows = word_rows(minilm, ASKED, on_progress=lambda event: told.append(event.done))
    assert rows is not None
    assert told == [3, 5]
    assert rows.query_vectors.shape == (3, 384)
    assert rows.source_vectors.shape == (2, 384)
    words = Words(384, 3, rows.shape)
    words.know(rows, np.arange(3), np.array([0, 0, 1], np.int32))
    asked = torch.from_numpy(requests(minilm, [q.text for q in ASKED], words=True))
    agreed = words.agreement(tokens_of(asked, 384), torch.arange(3).expand(3, 3))
    assert agreed.argmax(1).tolist() == [0, 1, 2]
    assert agreed.diagonal().min() > 0.95
    assert agreed[0, 2] < agreed[0, 1] < agreed[0, 0]
    save_words(rows, tmp_path)
    again = open_words(tmp_path)
    assert again is not None
    for name in ("query_vectors", "source_vectors", "projection"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
    for name in ("questions", "sentences"):
        for field, value in asdict(getattr(rows, name)).items():
            np.testing.assert_array_equal(getattr(getattr(again, name), field), value)
    save_words(None, tmp_path)
    assert open_words(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        open_words(tmp_path / "nowhere")


@needs_minilm
def test_a_long_request_keeps_its_first_and_its_last_tokens(minilm: SentenceEncoder) -> None:
    long = " ".join(f"word {n}" for n in range(40))
    asked = requests(minilm, ["mill", long], words=True)
    _, tokens = minilm.encode_tokens(["mill", long])
    assert tokens is not None
    found = asked[:, 384:].reshape(2, REQUEST_TOKENS, 384)
    np.testing.assert_allclose(found[0, :1], tokens[0], atol=1e-5)
    assert not found[0, 1:].any()
    np.testing.assert_allclose(found[1, 0], tokens[1][0], atol=1e-5)
    np.testing.assert_allclose(found[1, 1:], tokens[1][1 - REQUEST_TOKENS :], atol=1e-5)
    np.testing.assert_allclose(asked[:, :384], minilm.encode(["mill", long]), atol=1e-5)
    assert requests(minilm, ["mill"], words=False).shape == (1, 384)


def test_the_base_models_own_states_show_no_words(tiny_backbone: Backbone) -> None:
    pooled = load_encoder(POOLED, tiny_backbone)
    assert pooled is not None
    assert word_rows(pooled, ASKED) is None
    assert requests(pooled, ["mill"], words=True).shape == (1, pooled.size)


# What a folder may say of them.


def test_words_outside_their_tables_are_refused(rows: WordRows) -> None:
    good = {f"words.{n}": t for n, t in words_of(rows, list(range(8))).state_dict().items()}
    check_words(good, Path("f"))
    for name, place, value in (
        ("question_ends", -1, 10_000),
        ("question_ends", 2, 1),
        ("sentence_ends", 0, -1),
        ("sources", 3, 3),
        ("sources", 3, -1),
    ):
        bad = dict(good) | {f"words.{name}": good[f"words.{name}"].clone()}
        bad[f"words.{name}"][place] = value
        with pytest.raises(ArtifactError, match=f"words.{name} .*train again"):
            check_words(bad, Path("f"))


@pytest.mark.parametrize(
    "change",
    [{"num_sentences": 0}, {"num_question_tokens": 0}, {"recalls": False}, {"num_questions": 0}],
)
def test_words_without_what_goes_with_them_are_refused(change: dict[str, Any]) -> None:
    config = MemoryConfig(
        8, 8, 1, "silu", True, 4, query_size=WIDTH, num_questions=2, recalls=True,
        num_question_tokens=9, num_sentences=2, num_sentence_tokens=8,
    )  # fmt: skip
    assert parse_shape(asdict(config)) == config
    with pytest.raises(ValueError, match="allowed are all 0, or all above 0"):
        parse_shape(asdict(config) | change)
