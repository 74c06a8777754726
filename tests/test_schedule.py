"""How many epochs a self-study has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.questions import Question
from mlpmem_rag.schedule import catching_up, in_two_parts, long_enough, look_alike
from mlpmem_rag.study import StudyRows

CONFIG = DistillConfig(epochs=8, batch_rows=512, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("steps", "prose", "records"),
    [
        (1, 600, 600),
        (5, 120, 120),
        (42, 15, 16),
        (112, 8, 16),
        (125, 8, 16),
        (222, 8, 10),
        (249, 8, 9),
        (1304, 8, 8),
    ],
)
def test_small_corpora_and_records_are_learned_for_longer(
    steps: int, prose: int, records: int
) -> None:
    """600 steps at least; records up to 2,000 with twice the epochs at most."""
    for rows in (512 * steps, 512 * steps - 511):
        for alike, epochs in ((False, prose), (True, records)):
            longer = long_enough(CONFIG, rows, alike=alike)
            assert (longer.epochs, longer.patience) == (epochs, epochs)
            assert longer.learning_rate == CONFIG.learning_rate


@pytest.mark.parametrize(
    ("epochs", "first", "last"), [(1, 1, 1), (2, 1, 1), (8, 6, 2), (15, 11, 4), (16, 12, 4)]
)
def test_a_quarter_of_the_epochs_comes_with_everything_at_half_the_rate(
    epochs: int, first: int, last: int
) -> None:
    parts = in_two_parts(replace(CONFIG, epochs=epochs))
    assert [part.epochs for part in parts] == [part.patience for part in parts] == [first, last]
    assert [part.learning_rate for part in parts] == [1e-3, 5e-4]


@pytest.mark.parametrize("epochs", [4, 8, 16, 120])
def test_in_the_end_every_row_was_learned_as_often(epochs: int) -> None:
    learned = np.array([0, 2, 3, 6])
    first, last = in_two_parts(replace(CONFIG, epochs=epochs))
    rows = catching_up(8, learned)
    times = first.epochs * np.bincount(learned, minlength=8)
    times += last.epochs * np.bincount(rows, minlength=8)
    assert times.tolist() == [epochs] * 8


@pytest.mark.parametrize(("same", "alike"), [(0, True), (2, True), (3, False), (10, False)])
def test_questions_look_alike_when_their_neighbours_have_other_answers(
    same: int, alike: bool
) -> None:
    """Ten pairs of neighbours on a circle, of which some share their answer; one has no rows."""
    angles = np.repeat(np.arange(10) * 0.6, 2) + np.tile([0.0, 0.01], 10)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    answers = [f"{n // 2}" if n // 2 < same else f"{n}" for n in range(20)]
    questions = [Question(f"{n}?", answer, "s", "d") for n, answer in enumerate(answers)]
    questions.append(Question("too long?", "0", "s", "d"))
    numbers = np.arange(20, dtype=np.int32)
    study = StudyRows(
        keys=np.zeros((20, 1), np.float16),
        next_tokens=numbers,
        questions=numbers,
        query_vectors=np.concatenate([vectors, vectors[:1]]),
        source_vectors=vectors[:1],
        sources=np.zeros(21, np.int32),
    )
    assert look_alike(questions, study) == alike
    blind = replace(study, query_vectors=np.zeros((21, 0), np.float32))
    assert not look_alike(questions, blind)
