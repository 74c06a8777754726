"""Which learned question is meant: the keys of written questions, kept inside a memory.

A person asks in other words than the writer of the questions, and a memory knows its answers by
the writer's. So once a request, its vector gives way to that of the learned question that it agrees
with most, by its key and then by its words (`mlpmem_rag.late_interaction`): a wide layer of fixed
weights of which only the strongest unit speaks. The number of units is limited, so that a request
costs the same whatever the size of the corpus.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlpmem_rag.query import Vectors
from mlpmem_rag.questions import Question, without_topic
from mlpmem_rag.scoring import normalize
from mlpmem_rag.study import StudyRows

Rows = npt.NDArray[np.int64] | npt.NDArray[np.int32]

MAX_QUESTIONS = 65_536
"""More are not taught either: what cannot be recalled would be learned in vain."""
REWORDED = 1 / 8
"""Of the questions taught, at least: other wordings of an answer, where there are so many."""
SOURCE_PART = 0.5
"""Of the sentence that answers a question, in its key (docs/experiments.md)."""
KEYS_AT_ONCE = 8192
"""What is made on the way to them needs more room than they do."""
DRAFT_TOKENS = 16
"""Of an answer, its end included, that have a share and are read ahead; few are longer."""


def question_keys(study: StudyRows, numbers: Rows | None = None) -> Vectors:
    """Each question's own vector and part of its sentence's, at length 1.

    By its key a question is recalled, and by its key the memory is taught it. Rounded to half
    precision, in which keys are stored. *Shape:* (M,), or all of them -> (M, Q).
    """
    chosen = np.arange(len(study.query_vectors)) if numbers is None else numbers
    out = np.empty((len(chosen), study.query_vectors.shape[1]), dtype=np.float32)
    for first in range(0, len(chosen), KEYS_AT_ONCE):
        here = chosen[first : first + KEYS_AT_ONCE]
        sources = study.source_vectors[study.sources[here]]
        keys = study.query_vectors[here] + SOURCE_PART * sources
        keys /= np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
        out[first : first + len(here)] = keys.astype(np.float16)
    return out


def longest_draft(study: StudyRows) -> int:
    """K, tokens of the longest draft."""
    return int(min(DRAFT_TOKENS, np.bincount(study.questions).max(initial=0)))


def answer_drafts(study: StudyRows, numbers: Rows, size: int) -> npt.NDArray[np.int32]:
    """How the answers of questions begin, -1 behind their end. *Shape:* (M,) -> (M, K)."""
    drafts = np.full((len(numbers), size), -1, dtype=np.int32)
    # A question's rows stand together, in the order of its answer.
    ends = np.searchsorted(study.questions, numbers, side="right")
    places = np.searchsorted(study.questions, numbers)
    for column in drafts.T:
        there = places < ends
        column[there] = study.next_tokens[places[there]]
        places += 1
    return drafts


def varied(questions: Sequence[Question], most: int) -> list[Question]:
    """At most so many questions, in their order, spread over all documents.

    Further wordings of an answer go first, then further answers of a sentence. Some answers keep
    two wordings, of which calibration holds one out.
    """
    if len(questions) <= most:
        return list(questions)
    answers: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    wordings: defaultdict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
    meant: list[tuple[str, str, int]] = []
    ranks: list[tuple[int, int, int]] = []
    for question in questions:
        here, said = (question.document, question.source), normalize(question.answer)
        answer = answers[here].setdefault(said, len(answers[here]))
        meant.append((*here, answer))
        told, words = wordings[meant[-1]], without_topic(question.text)
        # The same words with the title behind them say less than other words.
        ranks.append((told[words], len(told) - (words in told), answer))
        told[words] += 1
    first = [number for number, (*wording, _) in enumerate(ranks) if not any(wording)]
    other = [number for number, (*wording, _) in enumerate(ranks) if any(wording)]
    kept = _spread(first, ranks, most - min(len(other), int(most * REWORDED)))
    known = {meant[number] for number in kept}
    other = [number for number in other if meant[number] in known]
    kept += _spread(other, ranks, most - len(kept))
    return [questions[number] for number in sorted(kept)]


def _spread(numbers: list[int], ranks: Sequence[tuple[int, int, int]], most: int) -> list[int]:
    """Those of the lowest ranks; of the rank where it ends, evenly spaced ones."""
    if len(numbers) <= most:
        return numbers
    in_order = sorted(numbers, key=ranks.__getitem__)
    end = ranks[in_order[most]]
    kept = [number for number in in_order if ranks[number] < end]
    rivals = [number for number in in_order if ranks[number] == end]
    room = most - len(kept)
    return kept + [rivals[place * len(rivals) // room] for place in range(room)]
