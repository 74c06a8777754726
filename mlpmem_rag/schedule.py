"""How long a self-study goes on, which follows from its rows and questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlpmem_rag.distill import DistillConfig
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
FINISHING = 0.25
"""Epochs that end a self-study with what had been held out, as a share of all epochs."""


def look_alike(questions: Sequence[Question], study: StudyRows) -> bool:
    """Whether what is near to a question mostly has another answer.

    So it is with records of many people or products. They take long to be told apart, where prose
    is only learned too much by heart (docs/experiments.md).
    """
    if study.query_vectors.shape[1] == 0:
        return False  # no encoder: nothing is near
    asked = np.unique(study.questions)
    sample = np.random.default_rng(0).permutation(asked)[:SAMPLE]
    similarity = study.query_vectors[sample] @ study.query_vectors[asked].T
    similarity[sample[:, None] == asked] = -np.inf
    nearest = asked[similarity.argmax(1)]
    same = [
        exact_match(questions[near].answer, [questions[number].answer])
        for near, number in zip(nearest, sample, strict=True)
    ]
    return float(np.mean(same)) < LOOK_ALIKE


def long_enough(config: DistillConfig, num_rows: int, *, alike: bool) -> DistillConfig:
    """With more epochs where these are few steps, or few for questions that look alike."""
    steps = math.ceil(num_rows / config.batch_rows)
    more = min(2 * config.epochs, math.ceil(ENOUGH_STEPS / steps)) if alike else 0
    epochs = max(config.epochs, more, math.ceil(MIN_STEPS / steps))
    return replace(config, epochs=epochs, patience=epochs)


def finishing(config: DistillConfig, num_rows: int, *, alike: bool) -> DistillConfig:
    """What comes after `long_enough`: all rows for a short while, at half the rate."""
    config = long_enough(config, num_rows, alike=alike)
    epochs = max(1, round(FINISHING * config.epochs))
    return replace(config, epochs=epochs, learning_rate=config.learning_rate / 2)
