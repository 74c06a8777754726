"""Which learned question a request is taken for: its keys, the choice of them, the recall."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from mlpmem_rag.calibrate import split_questions
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.questions import Question
from mlpmem_rag.recall import (
    DRAFT_TOKENS,
    answer_drafts,
    longest_draft,
    question_keys,
    varied,
)
from mlpmem_rag.study import StudyRows


def directions(count: int, width: int, seed: int) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    unit: npt.NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)


def memory_of(keys: npt.NDArray[np.float32]) -> Memory:
    count, width = keys.shape
    config = MemoryConfig(
        8, 8, 1, "silu", True, 4, query_size=width, num_questions=count, recalls=True
    )
    memory = Memory(config)
    memory.questions.copy_(torch.from_numpy(keys))
    return memory


@pytest.fixture
def study() -> StudyRows:
    """Twelve questions of five sentences."""
    none = np.zeros(0, np.int32)
    places = np.random.default_rng(2).integers(5, size=12).astype(np.int32)
    return StudyRows(
        np.zeros((0, 8), np.float16),
        none,
        none,
        directions(12, 16, 0),
        directions(5, 16, 1),
        places,
    )


@pytest.fixture
def keys(study: StudyRows) -> npt.NDArray[np.float32]:
    return question_keys(study)


def test_a_key_is_the_question_and_half_its_sentence(study: StudyRows) -> None:
    numbers = np.array([7, 0, 11])
    found = question_keys(study, numbers)
    for key, number in zip(found, numbers, strict=True):
        expected = study.query_vectors[number] + study.source_vectors[study.sources[number]] / 2
        np.testing.assert_allclose(key, expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found, found.astype(np.float16), "as it is stored")
    np.testing.assert_array_equal(question_keys(study)[numbers], found)
    without = replace(study, source_vectors=np.zeros_like(study.source_vectors))
    np.testing.assert_allclose(question_keys(without), study.query_vectors, rtol=1e-3, atol=1e-4)


def test_what_is_taught_is_what_is_recalled(keys: npt.NDArray[np.float32]) -> None:
    asked = torch.from_numpy(keys)
    torch.testing.assert_close(memory_of(keys).recall(asked), asked, rtol=0, atol=0)


def test_the_recalled_question_by_brute_force(keys: npt.NDArray[np.float32]) -> None:
    asked = directions(40, 16, 3)
    found = memory_of(keys).recall(torch.from_numpy(asked)).numpy()
    chosen = set()
    for vector, request in zip(found, asked, strict=True):
        best = max(range(12), key=lambda number: float(keys[number] @ request))
        np.testing.assert_array_equal(vector, keys[best])
        chosen.add(best)
    assert len(chosen) > 3


def test_who_asks_nothing_is_taken_for_nothing(keys: npt.NDArray[np.float32]) -> None:
    memory = memory_of(keys)
    asked = torch.from_numpy(directions(3, 16, 4))
    asked[1] = 0
    found = memory.recall(asked)
    assert found.ne(0).any(1).tolist() == [True, False, True]


def test_free_places_are_never_recalled(keys: npt.NDArray[np.float32]) -> None:
    with_room = memory_of(np.concatenate([keys, np.zeros((9, 16), np.float32)]))
    asked = torch.from_numpy(np.abs(keys)) + torch.from_numpy(keys)
    torch.testing.assert_close(with_room.recall(asked), memory_of(keys).recall(asked))


def test_a_memory_of_no_questions_takes_requests_as_they_are() -> None:
    memory, asked = memory_of(np.zeros((0, 16), np.float32)), torch.ones(3, 16)
    assert memory.recall(asked) is asked
    assert memory.familiarity(asked) == [0.0] * 3


def test_a_memory_that_does_not_recall_knows_what_is_familiar(
    keys: npt.NDArray[np.float32],
) -> None:
    memory = memory_of(keys)
    plain = Memory(replace(memory.config, recalls=False))
    plain.questions.copy_(memory.questions)
    asked = torch.from_numpy(directions(9, 16, 5))
    assert plain.recall(asked) is asked
    assert plain.familiarity(asked) == memory.familiarity(asked)


def test_familiarity_is_the_cosine_to_what_is_recalled(keys: npt.NDArray[np.float32]) -> None:
    asked = torch.from_numpy(directions(9, 16, 5))
    memory = memory_of(keys)
    expected = F.cosine_similarity(asked, memory.recall(asked))
    torch.testing.assert_close(torch.tensor(memory.familiarity(asked)), expected)
    assert max(memory.familiarity(torch.from_numpy(keys))) == pytest.approx(1.0, abs=1e-5)


def test_what_supports_an_answer_by_brute_force() -> None:
    """Of forty questions with six answers, at two of which there is room, the nearest sixteen."""
    keys = directions(42, 16, 0)
    keys[[5, 30]] = 0
    taught = [[4, 9, -1], [4, -1, -1], [7, 8, 9], [7, 8, 2], [9, 4, -1], [3, 3, 3]]
    which = np.random.default_rng(1).integers(6, size=42)
    memory = memory_of(keys)
    memory = Memory(replace(memory.config, draft_size=3))
    memory.questions.copy_(torch.from_numpy(keys))
    memory.drafts.copy_(torch.tensor(taught)[which])
    asked = torch.from_numpy(directions(6, 16, 5))
    asked[4] = 0
    given = [[4, 9], [4], [7, 8, 9, 1, 1], [9, 4], [4], [6]]
    for line, (answer, request) in enumerate(zip(given, asked, strict=True)):
        scores = {n: float(request @ torch.from_numpy(keys[n])) for n in range(42) if keys[n].any()}
        nearest = sorted(scores, key=lambda n: -scores[n])[:16]
        weights = {n: np.exp(30 * scores[n]) for n in nearest if request.any()}
        begun = [*answer, -1, -1][:3]
        same = sum(w for n, w in weights.items() if taught[which[n]] == begun)
        expected = same / sum(weights.values()) if weights else 0.0
        found = memory.support(memory.candidates(asked).of(line), torch.tensor([answer]))
        assert found == pytest.approx([expected], abs=1e-5)
        assert (expected > 0) == (line < 4), "the fifth is no request, the sixth was not taught"


def test_without_drafts_nothing_is_supported(keys: npt.NDArray[np.float32]) -> None:
    memory, asked = memory_of(keys), torch.from_numpy(directions(3, 16, 5))
    answers = torch.zeros((3, 2), dtype=torch.long)
    assert memory.support(memory.candidates(asked), answers) == [0.0] * 3


def question(text: str, answer: str, source: str = "Ines came.", document: str = "a") -> Question:
    return Question(text, answer, source, document)


def test_beyond_the_limit_other_wordings_go_first() -> None:
    questions = [
        question("Who came?", "Ines", "Ines came in 1887."),
        question("Who was it that came?", "ines.", "Ines came in 1887."),
        question("When did Ines come?", "1887", "Ines came in 1887."),
        question("Who came, again?", "Ines", "Ines came in 1887."),
        question("Who left?", "Ines", "Ines left."),
    ]

    def kept(most: int) -> list[int]:
        return [questions.index(question) for question in varied(questions, most)]

    assert kept(9) == kept(5) == [0, 1, 2, 3, 4]
    assert kept(4) == [0, 1, 2, 4], "a third wording"
    assert kept(3) == [0, 2, 4], "a second one"
    assert kept(2) == [0, 4], "another answer of a sentence"
    assert kept(1) == [0], "another sentence"
    assert kept(0) == []


def test_the_same_words_with_the_title_go_before_other_words() -> None:
    texts = ["Who came?", "Who came (Quay)?", "Who was it?", "Who was it (Quay)?"]
    questions = [question(text, "Ines") for text in texts]
    kept = [[q.text for q in varied(questions, most)] for most in (3, 2, 1)]
    assert kept == [[texts[0], texts[1], texts[2]], [texts[0], texts[2]], [texts[0]]]


def test_beyond_the_limit_questions_are_spread_over_the_documents() -> None:
    questions = [
        question(f"What is {word} of {document}?", word, f"Sentence {sentence}.", f"{document}")
        for document in range(100)
        for sentence in range(3)
        for word in ("one", "two")
    ]
    kept = varied(questions, 150)
    assert {q.answer for q in kept} == {"one"}
    assert [q.document for q in kept] == sorted((q.document for q in kept), key=int)
    counts = Counter(q.document for q in kept)
    assert len(counts) == 100
    assert set(counts.values()) == {1, 2}
    few = varied(questions, 50)
    assert np.diff([int(q.document) for q in few]).tolist() == [2] * 49


def test_beyond_the_limit_some_answers_keep_two_wordings_to_hold_one_out() -> None:
    questions = [
        question(f"{word} came on day {day}?", f"day {day}")
        for day in range(2000)
        for word in ("Who", "Which of them", "What")
    ]
    kept = varied(questions, 1600)
    answers = Counter(q.answer for q in kept)
    assert len(kept) == 1600
    assert sorted(answers.values()) == [1] * 1200 + [2] * 200
    split = split_questions(kept, np.zeros(len(kept), bool), validated=True, seed=0)
    learned = {kept[number].answer for number in split.train}
    held_out = {kept[number].answer for number in split.known}
    assert held_out
    assert held_out <= learned


def test_a_draft_is_how_the_answer_was_taught(study: StudyRows) -> None:
    answers: dict[int, list[int]] = {0: [5, 9], 1: [7], 4: list(range(20, 40)), 11: [3, 3, 8]}
    rows = replace(
        study,
        next_tokens=np.concatenate(list(answers.values())).astype(np.int32),
        questions=np.repeat(list(answers), [len(a) for a in answers.values()]).astype(np.int32),
    )
    assert longest_draft(rows) == DRAFT_TOKENS < 20
    found = answer_drafts(rows, np.array([11, 2, 4, 0]), 4)
    assert found.tolist() == [[3, 3, 8, -1], [-1] * 4, [20, 21, 22, 23], [5, 9, -1, -1]]
    assert found.dtype == np.int32


def test_no_answers_no_drafts(study: StudyRows) -> None:
    assert longest_draft(study) == 0
    assert answer_drafts(study, np.array([1, 2]), 0).shape == (2, 0)


def test_in_half_precision_the_nearest_key_is_still_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its products alone would have many keys agree alike; in pieces they are the same."""
    keys = directions(2000, 64, 3)
    memory = memory_of(keys).to(torch.bfloat16)
    one, other = memory.questions[:900:30].float(), memory.questions[1000:1900:30].float()
    asked = F.normalize(one + 1.002 * other, dim=-1)  # a little nearer to the later one
    expected = (asked.double() @ memory.questions.double().T).argmax(-1)
    alike = (asked.bfloat16() @ memory.questions.T).argmax(-1)
    assert (alike != expected).any(), "the test can tell"
    assert torch.equal(memory.nearest(asked), expected)
    monkeypatch.setattr("mlpmem_rag.memory.PIECE", 300)
    assert torch.equal(memory.nearest(asked), expected)
