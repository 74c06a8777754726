"""Many requests at once on one memory, and how soon a stream begins beside RAG's.

    python -m benchmarks.serving MEMORY CORPUS QUESTIONS [--requests 32] [--rounds 8]

Each round asks the same questions one by one, all at once from asyncio, and from eight threads, in
turns of order; the answers have to be the same. The event loop's longest wait is that of a timer of
one millisecond; beside it stands that of a loop with nothing to do, in a process of its own at the
same time: what the machine's other load does to any loop. Then every question is asked as a stream,
of the memory and of LlamaIndex's `VectorStoreIndex` query engine with its defaults on the same
documents and language model, one after the other. Ratios are of the sums, with a 95 % bootstrap
interval over rounds or questions.
"""

from __future__ import annotations

import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from llama_index.core.base.base_query_engine import BaseQueryEngine

from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_eval.embedding import EncoderEmbedding
from mlpmem_eval.rag import native_engine, native_index
from mlpmem_eval.workbench import sentence_encoder
from mlpmem_rag.corpus import read_corpus
from mlpmem_rag.hardware import dtype_name

THREADS = 8
TICK = 0.001
Floats = npt.NDArray[np.float64]


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
        begun = time.perf_counter()
        try:
            while True:
                started = time.perf_counter()
                await asyncio.sleep(TICK)
                self.waits.append(time.perf_counter() - started - TICK)
        finally:
            self.spans.append((begun, time.perf_counter()))


IDLE = """
import asyncio, json, sys, time

async def main(tick):
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    waits = []
    while not over.done():
        started = time.perf_counter()
        await asyncio.sleep(tick)
        waits.append((started, time.perf_counter() - started - tick))
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


def all_at_once(engine: BaseQueryEngine, questions: Sequence[str], loop: Loop) -> list[str]:
    async def together() -> list[str]:
        watching = asyncio.create_task(loop.watch())
        responses = await asyncio.gather(*map(engine.aquery, questions))
        watching.cancel()
        return [str(response) for response in responses]

    return asyncio.run(together())


def throughput(engine: BaseQueryEngine, questions: Sequence[str], rounds: int) -> dict[str, Any]:
    """Requests a second of each way of asking.

    Raises:
        AssertionError: an answer differs from the one given alone.
    """
    loop = Loop()
    arms: dict[str, Callable[[], list[str]]] = {
        "one by one": lambda: one_by_one(engine, questions),
        "asyncio": lambda: all_at_once(engine, questions, loop),
        "threads": lambda: from_threads(engine, questions),
    }
    expected = one_by_one(engine, questions)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    command = [sys.executable, "-c", IDLE, str(TICK)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as idle:
        try:
            for number in range(rounds):
                for name in names[number % 3 :] + names[: number % 3]:
                    started = time.perf_counter()
                    answers = arms[name]()
                    seconds[name].append(time.perf_counter() - started)
                    assert answers == expected, f"{name}: not the answers that were given alone"
            longest = longest_idle(idle, loop.spans)
        finally:
            idle.kill()
    alone = np.array(seconds["one by one"])
    return {
        "requests_a_second": {
            name: len(questions) * rounds / sum(took) for name, took in seconds.items()
        },
        "faster_than_one_by_one": {
            name: asdict(ratio(alone, np.array(seconds[name]))) for name in names[1:]
        },
        "loop_ms": {
            "median": 1e3 * float(np.median(loop.waits)),
            "p99": 1e3 * float(np.quantile(loop.waits, 0.99)),
            "longest": 1e3 * max(loop.waits),
            "over_50": sum(wait > 0.05 for wait in loop.waits),
            "longest_idle": 1e3 * longest,
        },
    }


def first_token(engine: BaseQueryEngine, question: str) -> float:
    """Seconds from the question to the first piece of a streamed answer."""
    started = time.perf_counter()
    response: Any = engine.query(question)
    pieces = response.response_gen
    next((piece for piece in pieces if piece), "")
    took = time.perf_counter() - started
    pieces.close()
    return took


def streams(
    memory: BaseQueryEngine, rag: BaseQueryEngine, questions: Sequence[str]
) -> dict[str, Any]:
    """Time to first token of both, question by question in turns of order."""
    engines = {"memory": memory, "rag": rag}
    for engine in engines.values():  # warm-up
        first_token(engine, questions[0])
    took: dict[str, list[float]] = {name: [] for name in engines}
    for number, question in enumerate(questions):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            took[name].append(first_token(engines[name], question))
    return {
        "median_ms": {name: 1e3 * float(np.median(seconds)) for name, seconds in took.items()},
        "rag_over_memory": asdict(ratio(np.array(took["rag"]), np.array(took["memory"]))),
    }


def ratio(above: Floats, below: Floats, resamples: int = 4000) -> Ratio:
    """Of the sums of two rows that belong together. *Shapes:* (N,), (N,)."""
    rows = np.random.default_rng(0).integers(len(above), size=(resamples, len(above)))
    drawn = above[rows].sum(1) / below[rows].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Ratio(float(above.sum() / below.sum()), float(low), float(high))


def measured(
    index: MLPMemIndex, rag: BaseQueryEngine, questions: Sequence[str], rounds: int
) -> dict[str, Any]:
    whole = index.as_query_engine(attribution="none")
    stream = index.as_query_engine(attribution="none", streaming=True)
    return {
        "first_token": streams(stream, rag, questions),
        "throughput": throughput(whole, questions, rounds),
    }


def main(
    memory: Path,
    corpus: Path,
    questions: Path,
    requests: int = 32,
    rounds: int = 8,
    max_new_tokens: int = 24,
    device: str = "auto",
) -> None:
    index = MLPMemIndex.from_memory(memory, device=device, max_new_tokens=max_new_tokens)
    lines = questions.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines][:requests]
    model = index.llm.model
    embedding = EncoderEmbedding(sentence_encoder(model))
    with tempfile.TemporaryDirectory() as folder:
        native = native_index(read_corpus(corpus).documents, embedding, Path(folder))
    base = index.as_llm(lambda_=0.0, max_new_tokens=max_new_tokens)
    found = measured(index, native_engine(native.index, base), asked, rounds)
    about = {
        "requests": len(asked),
        "rounds": rounds,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype_name(model.model.dtype),
        "device": str(model.model.device),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
