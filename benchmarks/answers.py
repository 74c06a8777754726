"""What a token of a memory's answers costs beside one of the bare base model's, as they are served.

Questions are asked alone and eight at a time. The time from the first token to the end of the
stream, what the confidence takes included, is divided by the tokens in between; the base model is
the same `MemoryModel` at lambda 0, which writes as many tokens as it may.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import LogitsProcessor

from benchmarks.figures import Figure, Goal
from benchmarks.rounds import median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.memory_model import MemoryModel

QUESTIONS = {1: 6, 8: 16}
"""By how many are asked at once; alone they take longer each."""
MAX_NEW_TOKENS = 24
GOALS = {1: Goal(at_most=1.15), 8: Goal(at_most=1.05)}


@dataclass(frozen=True)
class Span:
    """One stream: when its first piece came and when it ended, in seconds, and its tokens."""

    first: float
    end: float
    tokens: int


class Hold(LogitsProcessor):
    """Keeps a request from being answered until it may be."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.release.wait()
        return scores


async def asked(memory: MemoryModel, question: str, decoding: Decoding) -> Span:
    first = 0.0
    stream = memory.reply([{"role": "user", "content": question}], decoding)
    async for _ in stream:
        first = first or time.perf_counter()
    end = time.perf_counter()
    return Span(first or end, end, stream.answer.new_tokens)


async def asked_together(
    memory: MemoryModel, questions: Sequence[str], decoding: Decoding
) -> list[Span]:
    """All in one turn: another request is held until all of them wait."""
    hold = Hold()
    held = Decoding(max_new_tokens=1, logits_processors=(hold,))
    other = asyncio.create_task(asked(memory, questions[0], held))
    waiting = [asyncio.create_task(asked(memory, q, decoding)) for q in questions]
    await asyncio.sleep(0)  # each has run up to where it waits
    hold.release.set()
    await other
    return await asyncio.gather(*waiting)


def seconds_a_token(
    memory: MemoryModel, questions: Sequence[str], batch: int, lambda_: float | None
) -> float:
    """Of all steps after the first, in groups of so many questions."""
    decoding = Decoding(max_new_tokens=MAX_NEW_TOKENS, lambda_=lambda_, batch_size=batch)
    seconds, steps = 0.0, 0
    for start in range(0, len(questions) - batch + 1, batch):
        group = questions[start : start + batch]
        spans = asyncio.run(asked_together(memory, group, decoding))
        seconds += max(s.end for s in spans) - min(s.first for s in spans)
        steps += max(s.tokens for s in spans) - 1
    return seconds / max(1, steps)


def run(setup: Setup) -> list[Figure]:
    """Ratios of times, memory over base."""
    memory = MemoryModel.load(setup.memory_folder, device=setup.device, dtype=setup.dtype)
    figures = []
    for batch, goal in GOALS.items():
        questions = setup.asked[: QUESTIONS[batch]]
        took: dict[float | None, list[float]] = {None: [], 0.0: []}
        for number in range(-1, setup.rounds):  # the first is warm-up
            for lambda_ in list(took)[:: -1 if number % 2 else 1]:
                seconds = seconds_a_token(memory, questions, batch, lambda_)
                if number >= 0:
                    took[lambda_].append(seconds)
        figures.append(
            Figure(
                f"a token of an answer, batch {batch}",
                "ms",
                1e3 * statistics.median(took[None]),
                "bare base model",
                1e3 * statistics.median(took[0.0]),
                median_ratio(took[None], took[0.0]),
                goal,
            )
        )
    return figures
