"""Time to the first token as the corpus grows: what has to be searched is made larger.

What is added is never found: passages with vectors at random, and datastore rows far away. So every
answer stays the same, and only the search grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode

from mlpmem_eval.answerers import Answerer
from mlpmem_eval.latency import LatencyRecorder
from mlpmem_eval.questions import EvalQuestion
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress

FACTORS = (1, 4, 16)
QUESTIONS = 12
"""Asked of every arm at every size, in turns."""


@dataclass(frozen=True)
class Sized:
    """An arm on a corpus so many times as large."""

    answerer: Answerer
    factor: int


@dataclass(frozen=True)
class FirstToken:
    """Milliseconds to the first token, one for each question."""

    arm: str
    factor: int
    milliseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the questions."""
        return float(np.median(self.milliseconds))


def grown_index(
    index: VectorStoreIndex, embedding: BaseEmbedding, factor: int, *, seed: int = 0
) -> VectorStoreIndex:
    """The passages of an index and, for each, `factor` - 1 others that no question is near to.

    The index keeps its vectors in LlamaIndex's default store.
    """
    vectors = index.vector_store.to_dict()["embedding_dict"]
    nodes = [
        TextNode(id_=id_, text=index.docstore.get_node(id_).get_content(), embedding=vector)
        for id_, vector in vectors.items()
    ]
    width = len(next(iter(vectors.values())))
    noise = np.random.default_rng(seed).normal(size=(len(nodes) * (factor - 1), width))
    # The mean of all passages is what random vectors must not be near to by chance.
    away = -np.mean(list(vectors.values()), axis=0)
    noise = noise / np.linalg.norm(noise, axis=1, keepdims=True) + 3 * away / np.linalg.norm(away)
    more = [
        TextNode(id_=f"more-{number}", text="-", embedding=vector.tolist())
        for number, vector in enumerate(noise)
    ]
    return VectorStoreIndex([*nodes, *more], embed_model=embedding)


def first_tokens(
    arms: Sequence[Sized],
    questions: Sequence[EvalQuestion],
    recorder: LatencyRecorder,
    *,
    on_progress: OnProgress = ignore_progress,
) -> list[FirstToken]:
    """Time every arm at every size on the same questions, in turns, after one for warm-up."""
    times: list[list[float]] = [[] for _ in arms]
    for turn, question in enumerate([questions[0], *questions]):
        for place in range(len(arms)):
            number = (turn + place) % len(arms)
            _, timing = recorder.timed(partial(arms[number].answerer.answer, question.text))
            if turn:
                times[number].append(1000 * timing.ttft)
        on_progress(ProgressEvent("corpus size", turn, len(questions), "questions"))
    return [
        FirstToken(arm.answerer.name, arm.factor, tuple(values))
        for arm, values in zip(arms, times, strict=True)
    ]
