"""How long a self-study goes on, which follows from its rows and questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlpmem_rag.distill import DistillConfig, Rows
from mlpmem_rag.questions import Question
from mlpmem_rag.scoring import exact_match
from mlpmem_rag.study import StudyRows

MIN_STEPS = 600
"""Fewer leave even a small memory unfinished."""
ENOUGH_STEPS = 2000
"""Up to here, questions that look alike get twice the epochs."""
LOOK_ALIKE = 0.22
"""Questions do when fewer of their nearest neighbours than this have the same answer."""
SAMPLE = 512
COMPARED_AT_ONCE = 8192
ENDING = 0.25
"""Share of the epochs that end a self-study, with what had been held out until then."""
CATCHING_UP = round(1 / ENDING)
"""How often that comes in each of them, so that in the end all rows were learned as often."""


def look_alike(questions: Sequence[Question], study: StudyRows) -> bool:
    """Whether what is near to a question mostly has another answer.

    So it is with records of many people or products. They take long to be told apart, where prose
    is only learned too much by heart (docs/experiments.md).
    """
    if study.query_vectors.shape[1] == 0:
        return False  # no encoder: nothing is near
    asked = np.unique(study.questions)
    sample = np.random.default_rng(0).permutation(asked)[:SAMPLE]
    nearest, most = np.zeros(len(sample), dtype=np.int64), np.full(len(sample), -np.inf)
    for first in range(0, len(asked), COMPARED_AT_ONCE):
        here = asked[first : first + COMPARED_AT_ONCE]
        similarity = study.query_vectors[sample] @ study.query_vectors[here].T
        similarity[sample[:, None] == here] = -np.inf
        nearer = similarity.max(1) > most
        nearest[nearer] = here[similarity.argmax(1)][nearer]
        most = np.maximum(most, similarity.max(1))
    same = [
        exact_match(questions[near].answer, [questions[number].answer])
        for near, number in zip(nearest.tolist(), sample.tolist(), strict=True)
    ]
    return float(np.mean(same)) < LOOK_ALIKE


def long_enough(config: DistillConfig, num_rows: int, *, alike: bool) -> DistillConfig:
    """With more epochs where these are few steps, or few for questions that look alike."""
    steps = math.ceil(num_rows / config.batch_rows)
    more = min(2 * config.epochs, math.ceil(ENOUGH_STEPS / steps)) if alike else 0
    epochs = max(config.epochs, more, math.ceil(MIN_STEPS / steps))
    return replace(config, epochs=epochs, patience=epochs)


def in_two_parts(config: DistillConfig) -> tuple[DistillConfig, DistillConfig]:
    """The epochs without what is held out, and those with everything, at half the rate."""
    last = max(1, round(ENDING * config.epochs))
    first = max(1, config.epochs - last)
    return (
        replace(config, epochs=first, patience=first),
        replace(config, epochs=last, patience=last, learning_rate=config.learning_rate / 2),
    )


def catching_up(num_rows: int, learned: Rows) -> Rows:
    """All rows, those that were not learned so far `CATCHING_UP` times. *Shape:* (R,) -> (S,)."""
    rows = np.arange(num_rows)
    return np.concatenate([rows, np.repeat(np.setdiff1d(rows, learned), CATCHING_UP - 1)])
