"""Many requests at once on one memory, and how soon a stream begins and ends beside RAG's.

Each round asks the same questions one by one, all at once from asyncio, from eight threads, and all
at once to be generated in batches of eight, in turns of order. The answers have to be the same; in
batches, how many are is told. Then the same once more with a timer of one millisecond in the event
loop, not timed, since the timer takes its share: its longest wait stands beside that of a loop with
nothing to do, in a process of its own at the same time: what the machine's other load does to any
loop. Then every question is asked as a stream, one engine after the other: of the memory and, on
the same documents and language model, of LlamaIndex's `VectorStoreIndex` query engine with its
defaults and with the setting that answers the sample corpus's questions best. Ratios are of the
sums, with a 95 % bootstrap interval over rounds or questions.
"""

from __future__ import annotations

import asyncio
import json
import operator
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core.base.base_query_engine import BaseQueryEngine

from benchmarks import rounds as timing
from benchmarks.figures import Figure, Goal
from benchmarks.setup import Setup
from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_eval.embedding import EncoderEmbedding
from mlpmem_eval.rag import (
    FEW_SHOT,
    RagSetting,
    native_engine,
    native_index,
    passage_index,
    tuned_engine,
)
from mlpmem_eval.workbench import sentence_encoder
from mlpmem_rag.reading import STOP

THREADS = 8
BATCH = 8
BATCHES = f"in batches of {BATCH}"
REQUESTS = 32
STREAMED = 16
ROUNDS = 3
MAX_NEW_TOKENS = 24
FIRST_TOKEN = Goal(at_least=5.0)
WHOLE_ANSWER = Goal(at_least=4.0)
AT_LEAST_AS_FAST = Goal(at_least=1.0)
TUNED = RagSetting(1, 0, FEW_SHOT)
"""Whole documents with examples in plain text (docs/experiments.md, "RAG's best setting")."""
TICK = 0.001
Floats = npt.NDArray[np.float64]
Ask = Callable[[str], Awaitable[object]]


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums with its 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass
class Loop:
    """How long an event loop kept a timer waiting, and when it was watched, in seconds."""

    waits: list[float] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    async def watch(self) -> None:
        begun = started = time.perf_counter()
        try:
            while True:
                started = time.perf_counter()
                await asyncio.sleep(TICK)
                self.waits.append(time.perf_counter() - started - TICK)
        finally:  # the wait that is cut short counts, too
            ended = time.perf_counter()
            self.waits.append(max(0.0, ended - started - TICK))
            self.spans.append((begun, ended))


IDLE = """
import asyncio, json, sys, time

async def main(tick):
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    waits = []
    ended = time.perf_counter()
    print("ready", flush=True)
    while not over.done():
        started = ended
        await asyncio.sleep(tick)
        ended = time.perf_counter()
        waits.append((started, ended - started - tick))
    print(json.dumps(waits))

asyncio.run(main(float(sys.argv[1])))
"""


def longest_idle(idle: subprocess.Popen[str], spans: Sequence[tuple[float, float]]) -> float:
    """The longest wait of the idle process's loop within spans of time (one clock for all)."""
    waits: list[tuple[float, float]] = json.loads(idle.communicate("")[0])
    return max(w for at, w in waits if any(low <= at + w and at <= high for low, high in spans))


def one_by_one(engine: BaseQueryEngine, questions: Sequence[str]) -> list[str]:
    return [str(engine.query(question)) for question in questions]


def from_threads(engine: BaseQueryEngine, questions: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda question: str(engine.query(question)), questions))


def all_at_once(ask: Ask, questions: Sequence[str]) -> list[str]:
    return asyncio.run(_together(ask, questions))


def all_watched(ask: Ask, questions: Sequence[str], loop: Loop) -> list[str]:
    async def watched() -> list[str]:
        watching = asyncio.create_task(loop.watch())
        answers = await _together(ask, questions)
        watching.cancel()
        return answers

    return asyncio.run(watched())


async def _together(ask: Ask, questions: Sequence[str]) -> list[str]:
    responses = await asyncio.gather(*map(ask, questions))
    return [str(response) for response in responses]


def throughput(
    engine: BaseQueryEngine, batching: BaseQueryEngine, questions: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Requests a second of each way of asking.

    Raises:
        AssertionError: an answer differs from the one given alone, other than in a batch.
    """
    arms: dict[str, Callable[[], list[str]]] = {
        "one by one": lambda: one_by_one(engine, questions),
        "asyncio": lambda: all_at_once(engine.aquery, questions),
        "threads": lambda: from_threads(engine, questions),
        BATCHES: lambda: all_at_once(batching.aquery, questions),
    }
    expected = one_by_one(engine, questions)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    same: dict[str, float] = {}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            answers = arms[name]()
            seconds[name].append(time.perf_counter() - started)
            same[name] = sum(map(operator.eq, answers, expected)) / len(questions)
            assert name == BATCHES or same[name] == 1, f"{name}: not the answers of one"
    alone = np.array(seconds["one by one"])
    return {
        "requests_a_second": {
            name: len(questions) * rounds / sum(took) for name, took in seconds.items()
        },
        "faster_than_one_by_one": {
            name: asdict(ratio(alone, np.array(seconds[name]))) for name in names[1:]
        },
        "same_answers": same,
        "loop_ms": loop_waits([engine.aquery, batching.aquery], questions),
    }


def loop_waits(asks: Sequence[Ask], questions: Sequence[str]) -> dict[str, float | int]:
    """How long an event loop waits while each of them answers all questions; milliseconds."""
    loop = Loop()
    command = [sys.executable, "-c", IDLE, str(TICK)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as idle:
        try:
            assert idle.stdout
            idle.stdout.readline()  # it watches from here on
            for ask in asks:
                all_watched(ask, questions, loop)
            longest = longest_idle(idle, loop.spans)
        finally:
            idle.kill()
    return {
        "median": 1e3 * float(np.median(loop.waits)),
        "p99": 1e3 * float(np.quantile(loop.waits, 0.99)),
        "longest": 1e3 * max(loop.waits),
        "over_50": sum(wait > 0.05 for wait in loop.waits),
        "longest_idle": 1e3 * longest,
    }


def first_token(engine: BaseQueryEngine, question: str) -> tuple[float, float]:
    """Seconds from the question to the first piece of a streamed answer, and to its end."""
    started = time.perf_counter()
    response: Any = engine.query(question)
    pieces = iter(response.response_gen)
    next((piece for piece in pieces if piece), "")
    first = time.perf_counter() - started
    for _ in pieces:
        pass
    return first, time.perf_counter() - started


def streams(
    memory: BaseQueryEngine, rags: Mapping[str, BaseQueryEngine], questions: Sequence[str]
) -> dict[str, Any]:
    """Time to the first token and to the end, of all, question by question in turns of order."""
    engines = {"memory": memory, **rags}
    for engine in engines.values():  # warm-up
        first_token(engine, questions[0])
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number, question in enumerate(questions):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            took[name].append(first_token(engines[name], question))
    columns = {name: np.array(seconds).T for name, seconds in took.items()}
    return {
        reached: {
            "median_ms": {name: 1e3 * float(np.median(columns[name][n])) for name in engines},
            "over_memory": {
                name: asdict(ratio(columns[name][n], columns["memory"][n])) for name in rags
            },
        }
        for n, reached in enumerate(("first_token", "whole_answer"))
    }


def ratio(above: Floats, below: Floats, resamples: int = 4000) -> Ratio:
    """Of the sums of two rows that belong together. *Shapes:* (N,), (N,)."""
    rows = np.random.default_rng(0).integers(len(above), size=(resamples, len(above)))
    drawn = above[rows].sum(1) / below[rows].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Ratio(float(above.sum() / below.sum()), float(low), float(high))


def measured(
    index: MLPMemIndex,
    rags: Mapping[str, BaseQueryEngine],
    questions: Sequence[str],
    rounds: int,
) -> dict[str, Any]:
    llm = index.as_llm(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH)
    whole = index.as_query_engine(attribution="none")
    batching = index.as_query_engine(attribution="none", llm=llm)
    stream = index.as_query_engine(attribution="none", streaming=True)
    return {
        **streams(stream, rags, questions[:STREAMED]),
        "throughput": throughput(whole, batching, questions, rounds),
    }


def run(setup: Setup) -> list[Figure]:
    """How soon and how fast, beside RAG; many at once beside one by one."""
    index = MLPMemIndex.from_memory(
        setup.memory_folder, device=setup.device, max_new_tokens=MAX_NEW_TOKENS
    )
    embedding = EncoderEmbedding(sentence_encoder(index.llm.model))
    documents = setup.documents.documents
    native = native_index(documents, embedding, setup.work / "index")
    passages = passage_index(documents, embedding, TUNED.words, setup.work / "passages")
    base = partial(index.as_llm, lambda_=0.0, max_new_tokens=MAX_NEW_TOKENS)
    chat, plain = base(), base(is_chat_model=False, stop=[STOP])
    rags = {
        "RAG": native_engine(native.index, chat),
        "tuned RAG": tuned_engine(passages.index, TUNED, chat, plain),
    }
    found = measured(index, rags, setup.asked[:REQUESTS], ROUNDS)
    served = found["throughput"]
    return [
        *_against_rag("time to the first token", found["first_token"], FIRST_TOKEN),
        *_against_rag("time to the whole answer", found["whole_answer"], WHOLE_ANSWER),
        *(_at_once(way, served) for way in served["same_answers"] if way != "one by one"),
    ]


def _against_rag(what: str, found: dict[str, Any], goal: Goal) -> list[Figure]:
    took = found["median_ms"]
    return [
        Figure(
            what if name == "RAG" else f"{what}, {name}",
            "ms",
            took["memory"],
            name,
            took[name],
            timing.Ratio(*times.values()),
            goal,
        )
        for name, times in found["over_memory"].items()
    ]


def _at_once(way: str, served: dict[str, Any]) -> Figure:
    rates = served["requests_a_second"]
    return Figure(
        f"{REQUESTS} requests at once, {way}",
        "requests/s",
        rates[way],
        "one by one",
        rates["one by one"],
        timing.Ratio(*served["faster_than_one_by_one"][way].values()),
        AT_LEAST_AS_FAST,
        details={f"loop_{name}": value for name, value in served["loop_ms"].items()}
        | {"same_answers": served["same_answers"][way]},
    )
