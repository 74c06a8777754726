"""Self-study rows, compared with each question run alone through the whole prompt."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.errors import BaseModelError, ConfigError
from mlpmem_rag.processes import Team
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.query import PooledEncoder, Vectors
from mlpmem_rag.questions import Question
from mlpmem_rag.study import StudyRows, study_rows

QUESTIONS = [
    Question("Who kept the ledger?", "a clerk", "A clerk kept the ledger.", "a"),
    Question("Where was the lantern, and since when had it been there?", "quay", "It hung.", "b"),
    Question("What hung?", "the lantern over the quay", "It hung.", "b"),
]
TEMPLATE = "{% for m in messages %}the system speaks first.{{ m.content }}{% endfor %} answer:"


class CountingEncoder:
    """Encodes a text as its length, and remembers what it was given."""

    name = "counting"
    size = 1

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.seen += texts
        return np.array([[len(text)] for text in texts], dtype=np.float32)


def expected_keys(backbone: Backbone, question: Question) -> torch.Tensor:
    prompt = prompt_ids(backbone.tokenizer, [{"role": "user", "content": question.text}])
    answer = answer_ids(backbone.tokenizer, question.answer)
    ids = torch.tensor([prompt + answer])
    return backbone.hidden(ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_rows_equal_those_of_each_question_alone(
    family_folder: Path,
    template: str | None,
    batch_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlpmem_rag.study.BATCH_TOKENS", batch_tokens)
    backbone = load_backbone(str(family_folder), device="cpu", dtype="float32")
    backbone.tokenizer.chat_template = template
    rows = study_rows(backbone, PooledEncoder(backbone), QUESTIONS)
    for number, question in enumerate(QUESTIONS):
        mine = rows.questions == number
        answer = answer_ids(backbone.tokenizer, question.answer)
        assert rows.next_tokens[mine].tolist() == answer
        expected = expected_keys(backbone, question).numpy()
        np.testing.assert_allclose(rows.keys[mine], expected, atol=2e-3, rtol=2e-3)


MANY = [
    Question(
        f"What did number {n} keep in the {'old ' * (n % 5)}mill?", f"ledger {n}", "It hung.", "a"
    )
    for n in range(40)
]


@pytest.mark.parametrize("stop", [3, 9, 25])
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr("mlpmem_rag.study.BATCH_TOKENS", 40)
    monkeypatch.setattr("mlpmem_rag.notes.EVERY", 4)
    encoder = PooledEncoder(tiny_backbone)
    events: list[ProgressEvent] = []
    for name in ("once", "twice", "other"):
        (tmp_path / name).mkdir()
    once = study_rows(
        tiny_backbone, encoder, MANY, folder=tmp_path / "once", on_progress=events.append
    )
    assert len(events) > 28

    def interrupt(event: ProgressEvent) -> None:
        if event.done >= events[stop].done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_rows(tiny_backbone, encoder, MANY, folder=tmp_path / "twice", on_progress=interrupt)
    shutil.copytree(tmp_path / "twice", tmp_path / "other", dirs_exist_ok=True)
    resumed: list[ProgressEvent] = []
    twice = study_rows(
        tiny_backbone, encoder, MANY, folder=tmp_path / "twice", on_progress=resumed.append
    )
    assert resumed == events[4 * ((stop + 1) // 4) :]
    for field in fields(StudyRows):
        np.testing.assert_array_equal(getattr(twice, field.name), getattr(once, field.name))

    for name in ("keys.npy", "study.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()

    # Of other questions nothing is there yet.
    again: list[ProgressEvent] = []
    others = MANY[1:]
    found = study_rows(
        tiny_backbone, encoder, others, folder=tmp_path / "other", on_progress=again.append
    )
    assert again[0].done < events[3].done
    np.testing.assert_array_equal(found.keys, study_rows(tiny_backbone, encoder, others).keys)


def test_vectors_belong_to_their_questions(tiny_backbone: Backbone) -> None:
    encoder = CountingEncoder()
    rows = study_rows(tiny_backbone, encoder, QUESTIONS)
    assert rows.query_vectors[:, 0].tolist() == [len(q.text) for q in QUESTIONS]
    lengths = rows.source_vectors[rows.sources, 0].tolist()
    assert lengths == [len(q.source) for q in QUESTIONS]
    assert len(rows.source_vectors) == 2, "two questions have the same source"
    assert encoder.seen.count("It hung.") == 1


def test_a_question_beyond_the_context_window_has_no_rows(tiny_backbone: Backbone) -> None:
    long = Question("ledger " * 400, "a clerk", "s", "a")
    rows = study_rows(tiny_backbone, CountingEncoder(), [QUESTIONS[0], long, QUESTIONS[2]])
    assert set(rows.questions.tolist()) == {0, 2}


def test_rows_in_a_file_are_those_in_memory(tmp_path: Path, tiny_backbone: Backbone) -> None:
    rows = study_rows(tiny_backbone, CountingEncoder(), QUESTIONS)
    study_rows(tiny_backbone, CountingEncoder(), QUESTIONS, folder=tmp_path).save(tmp_path)
    stored = StudyRows.open(tmp_path)
    for field in fields(StudyRows):
        mine, theirs = (getattr(found, field.name) for found in (rows, stored))
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_a_team_writes_the_file_of_one_process(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpmem_rag.study.BATCH_TOKENS", 1)  # one question a batch
    barrier = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(Team, "wait", lambda _: barrier.wait())
    expected = study_rows(tiny_backbone, CountingEncoder(), QUESTIONS)
    events: tuple[list[ProgressEvent], list[ProgressEvent]] = ([], [])

    def study(index: int) -> StudyRows:  # two threads for two processes
        return study_rows(
            tiny_backbone,
            CountingEncoder(),
            QUESTIONS,
            folder=tmp_path,
            team=Team(index, 2),
            on_progress=events[index].append,
        )

    with ThreadPoolExecutor(2) as processes:
        both = list(processes.map(study, range(2)))
    asked = [[event for event in mine if event.stage == "study"] for mine in events]
    done = [[(event.done, event.total) for event in mine] for mine in asked]
    assert done == [[(1, 2), (2, 2)], [(1, 1)]], "the first leaves rows to the second"
    for found in both:
        assert np.asarray(found.keys).any(1).all()
        for field in fields(StudyRows):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    with pytest.raises(ConfigError, match="in a folder; give one"):
        study_rows(tiny_backbone, CountingEncoder(), QUESTIONS, team=Team(0, 2))


@pytest.mark.parametrize("where", ["answer", "padding"])
def test_a_state_too_large_for_float16_is_refused_where_it_is_kept(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    plain = Backbone.hidden_after

    def large(backbone: Backbone, *given: Any) -> torch.Tensor:  # noqa: ANN401
        with torch.inference_mode():
            hidden = plain(backbone, *given).clone()
            if where == "answer":
                hidden[0, -1] = 1e6
            else:  # the shortest question stands last
                hidden[-1, -1] = 1e6
        return hidden

    monkeypatch.setattr(Backbone, "hidden_after", large)
    if where == "answer":
        with pytest.raises(BaseModelError, match="does not fit into float16"):
            study_rows(tiny_backbone, CountingEncoder(), QUESTIONS)
    else:
        assert np.isfinite(study_rows(tiny_backbone, CountingEncoder(), QUESTIONS).keys).all()


def test_progress_counts_questions_that_have_rows(tiny_backbone: Backbone) -> None:
    events: list[ProgressEvent] = []
    asked = [*QUESTIONS, Question("ledger " * 400, "a clerk", "s", "a")]
    study_rows(tiny_backbone, CountingEncoder(), asked, on_progress=events.append)
    told = [event for event in events if event.stage == "study"]
    assert told[-1] == ProgressEvent("study", 3, 3, "questions")
    # All questions, and the text that answers them.
    texts = [ProgressEvent("vectors", done, 7, "texts") for done in (4, 7)]
    assert events[len(told) :] == texts


def test_no_questions_are_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="no questions to study"):
        study_rows(tiny_backbone, CountingEncoder(), [])
