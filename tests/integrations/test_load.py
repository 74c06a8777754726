"""MLPMemLLM under load: hundreds of requests of all kinds, left and failing ones among them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core.llms import ChatMessage
from transformers import LogitsProcessor

from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ClosedError, ConfigError
from mlpmem_rag.memory_model import MemoryModel

NEW_TOKENS = 4
FATES = ("answered", "left", "failing", "refused")
PROC = Path("/proc/self")


class Failing(LogitsProcessor):
    """What goes wrong in the middle of one request."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] % 2:
            raise RuntimeError(f"failure of {self.name}")
        return scores


@dataclass(frozen=True)
class Request:
    """One of the eight calls, with its end."""

    number: int
    chat: bool
    stream: bool
    asynchronous: bool
    fate: str

    @property
    def call(self) -> str:
        return f"{'stream_' if self.stream else ''}{'chat' if self.chat else 'complete'}"

    @property
    def given(self) -> Any:  # noqa: ANN401
        text = f"What was found in place {self.number}, and by whom{'?' * (self.number % 5)}"
        return [ChatMessage(text)] if self.chat else text

    @property
    def options(self) -> dict[str, Any]:
        if self.fate == "failing":
            return {"logits_processor": [Failing(str(self.number))]}
        if self.fate == "refused":
            return {"max_tokens": -1}
        return {"lambda_": self.number % 3 / 2}


def text_of(response: Any) -> str:  # noqa: ANN401
    message = getattr(response, "message", None)
    return str(response.text if message is None else message.content)


def ask(llm: MLPMemLLM, request: Request) -> str:
    response = getattr(llm, request.call)(request.given, **request.options)
    if not request.stream:
        return text_of(response)
    text = ""
    for piece in response:
        text = text_of(piece)
        if request.fate == "left":
            break
    return text


async def ask_async(llm: MLPMemLLM, request: Request) -> str:
    calling = getattr(llm, f"a{request.call}")(request.given, **request.options)
    if not request.stream:
        if request.fate == "left":
            return text_of(await asyncio.wait_for(calling, timeout=0.02 * (request.number % 7)))
        return text_of(await calling)
    text = ""
    async with aclosing(await calling) as pieces:
        async for piece in pieces:
            text = text_of(piece)
            if request.fate == "left":
                break
    return text


def outcome(llm: MLPMemLLM, request: Request) -> str:
    """The answer, or what was raised."""
    try:
        return ask(llm, request)
    except (RuntimeError, ConfigError) as error:
        return repr(error)


async def outcome_async(llm: MLPMemLLM, request: Request) -> str:
    try:
        return await ask_async(llm, request)
    except TimeoutError:
        return ""
    except (RuntimeError, ConfigError) as error:
        return repr(error)


def mixed(count: int) -> list[Request]:
    """Half of them answered, the others left, failing, or refused."""
    dice = random.Random(0)
    flags = [(c, s, a) for c in (False, True) for s in (False, True) for a in (False, True)]
    fates = dice.choices(FATES, weights=(3, 1, 1, 1), k=count)
    return [Request(n, *flags[n % 8], fate) for n, fate in enumerate(fates)]


def serve(llm: MLPMemLLM, requests: list[Request]) -> list[str]:
    """All at once: the plain ones from threads, the others from one event loop."""

    async def together() -> list[str]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(16) as threads:
            asked = [
                outcome_async(llm, r)
                if r.asynchronous
                else loop.run_in_executor(threads, outcome, llm, r)
                for r in requests
            ]
            return list(await asyncio.gather(*asked))

    return asyncio.run(together())


@pytest.fixture(params=[1, 8])
def llm(request: pytest.FixtureRequest, chat_model: MemoryModel) -> MLPMemLLM:
    """One request after another, or those that wait together."""
    return MLPMemLLM.from_model(chat_model, max_new_tokens=NEW_TOKENS, batch_size=request.param)


def test_200_mixed_requests_each_get_their_own_end(llm: MLPMemLLM) -> None:
    requests = mixed(200)
    assert all(count > 20 for count in Counter(r.fate for r in requests).values())
    alone = [outcome(llm, r) if r.fate != "left" else "" for r in requests]
    assert len(set(alone)) > 60, "the answers tell the questions apart"
    found = serve(llm, requests)
    for request, text, expected in zip(requests, found, alone, strict=True):
        if request.fate == "failing" and "failure" in expected:
            assert text == repr(RuntimeError(f"failure of {request.number}"))
        elif request.fate == "left":
            whole = ask(llm, Request(request.number, request.chat, False, False, "answered"))
            assert whole.startswith(text.rstrip("\ufffd")), request
        else:
            assert text == expected, request


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    bytes: int
    threads: int
    files: int
    objects: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int((PROC / "statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE"),
            threading.active_count(),
            len(list((PROC / "fd").iterdir())),
            len(gc.get_objects()),
        )


@pytest.mark.skipif(not PROC.is_dir(), reason="this system does not list what a process holds")
@pytest.mark.parametrize("rounds", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_400_or_1000_requests_leave_nothing_behind(chat_model: MemoryModel, rounds: int) -> None:
    llm = MLPMemLLM.from_model(chat_model, max_new_tokens=2)
    requests = mixed(200)
    serve(llm, requests)  # pools and caches are filled
    held = [Held.now()]
    for _ in range(rounds):
        serve(llm, requests)
        held.append(Held.now())
    before, after = held[0], held[-1]
    assert after.threads == before.threads
    assert after.files == before.files
    # What leaks does so in every round; what libraries keep for good comes in some.
    more = [later.objects - earlier.objects for earlier, later in pairwise(held)]
    assert min(more) < 100, f"less than one for two requests: {more}"
    assert after.bytes - before.bytes < 16 * 2**20


# The end.


@pytest.fixture
def own_model(chat_memory: Path) -> Iterator[MemoryModel]:
    model = MemoryModel.load(chat_memory, device="cpu", dtype="float32")
    yield model
    model.close()


def test_a_closed_memory_ends_what_runs_and_what_waits(own_model: MemoryModel) -> None:
    llm = MLPMemLLM.from_model(own_model, max_new_tokens=40)
    begun = threading.Event()

    def slowly(*_: object) -> None:
        begun.set()
        time.sleep(0.01)

    handle = own_model.model.base.register_forward_pre_hook(slowly)
    ends: list[object] = []

    def wait(number: int) -> None:
        try:
            ends.append(llm.complete(f"What was found in place {number}?", lambda_=0.0).text)
        except Exception as error:
            ends.append(type(error))

    before = threading.active_count()
    with ThreadPoolExecutor(20) as threads:
        for number in range(20):
            threads.submit(wait, number)
        begun.wait(10)
        started = time.perf_counter()
        own_model.close()
        assert time.perf_counter() - started < 2.0
    handle.remove()
    assert len(ends) == 20
    assert ends.count(ClosedError) >= 18, f"all but what had ended by then: {ends}"
    assert threading.active_count() <= before
    with pytest.raises(ClosedError, match="this memory was closed; load it again"):
        llm.complete("Who?")
    with pytest.raises(ClosedError):
        asyncio.run(llm.acomplete("Who?"))


LEAVING = """
import sys, threading
from mlpmem_rag import MemoryModel
model = MemoryModel.load(sys.argv[1], device="cpu", dtype="float32")
asked = [model.stream("What was found?", max_new_tokens=10) for _ in range(5)]
streams = [iter(stream) for stream in asked]
threads = [threading.Thread(target=next, args=(s, None), daemon=True) for s in streams]
for thread in threads:
    thread.start()
print(next(iter(model.stream("Who?", max_new_tokens=9))) is not None, flush=True)
"""


def test_a_process_ends_by_itself_with_streams_unread(chat_memory: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(chat_memory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-500:]


OnForward = Callable[[Callable[[int], object]], None]


def test_after_a_failure_of_the_model_others_are_answered(
    chat_model: MemoryModel, on_forward: OnForward
) -> None:
    """The device fails for a while; those who ask then are told, and nobody else."""
    llm = MLPMemLLM.from_model(chat_model, max_new_tokens=4, batch_size=1)
    requests = [Request(n, False, False, bool(n % 2), "answered") for n in range(40)]
    alone = [outcome(llm, request) for request in requests]

    def fail(number: int) -> None:
        if 20 <= number < 30:
            raise RuntimeError("out of memory")

    on_forward(fail)
    found = serve(llm, requests)
    failed = [text for text in found if text == repr(RuntimeError("out of memory"))]
    assert len(failed) == 10, "each failure ends one request"
    assert all(t in (a, failed[0]) for t, a in zip(found, alone, strict=True))
