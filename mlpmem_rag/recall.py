"""Which learned question is meant: the keys of written questions, kept inside a memory.

A person asks in other words than the writer of the questions, and a memory knows its answers by
the writer's. So once a request, its vector gives way to that of the learned question whose key it
agrees with most: a wide layer of fixed weights of which only the strongest unit speaks. The number
of units is limited, so that a request costs the same whatever the size of the corpus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlpmem_rag.query import Vectors
from mlpmem_rag.questions import Question
from mlpmem_rag.scoring import normalize

Numbers = npt.NDArray[np.int64]

MAX_QUESTIONS = 65_536


def num_recalled(vectors: Vectors) -> int:
    """M, how many of so many questions a memory keeps; 0 where there is no encoder.

    *Shape:* (G, Q).
    """
    questions, width = vectors.shape
    return min(MAX_QUESTIONS, questions) if width else 0


def question_keys(vectors: Vectors) -> Vectors:
    """By what questions are recalled, and what the memory is taught them by.

    Their own vectors, rounded to half precision, in which they are stored. *Shape:* (M, Q).
    """
    rounded: Vectors = vectors.astype(np.float16).astype(np.float32)
    return rounded


def varied(questions: Sequence[Question], numbers: Numbers, most: int) -> Numbers:
    """At most so many of the numbered questions: other wordings of one answer go first. Sorted."""
    wordings: Counter[tuple[str, str, str]] = Counter()
    ranks = np.empty(len(numbers), dtype=np.int64)
    for place, number in enumerate(numbers):
        question = questions[number]
        same = question.document, question.source, normalize(question.answer)
        ranks[place] = wordings[same]
        wordings[same] += 1
    return np.sort(numbers[np.argsort(ranks, kind="stable")[:most]])
