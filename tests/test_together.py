"""Requests that wait are generated as one batch, and each gets what it would get alone."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.generation import Answer, _EachToken, generate_together
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.turns import Listener
from tests.conftest import save_model

T = TypeVar("T")
TEMPLATE = (
    "<system> You answer for the archive.\n"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n"
    "{% if 'forbidden' in m.content %}{{ raise_exception('not allowed') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = ("Who?", "What was found in the old mill?", "And by whom?", "Where is Lake Orsa?")


@pytest.fixture(scope="module", params=["plain", "chat"])
def memory(tiny_memory: Path, request: pytest.FixtureRequest) -> MemoryModel:
    """Without a chat template, and with one whose opening is shared."""
    loaded = MemoryModel.load(tiny_memory, device="cpu", dtype="float32")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = TEMPLATE if request.param == "chat" else None
    return MemoryModel(loaded.model, tokenizer, loaded.encoder, loaded.confidence)


class Passes:
    """Sequences in each forward pass of the base model; the first one waits for `go`."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.go = threading.Event()

    def __call__(self, _: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.widths.append(len(kwargs["input_ids"]))
        assert self.go.wait(10)


@pytest.fixture
def passes(memory: MemoryModel) -> Iterator[Passes]:
    noted = Passes()
    handle = memory.model.base.register_forward_pre_hook(noted, with_kwargs=True)
    yield noted
    handle.remove()


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def at_once(
    memory: MemoryModel, questions: Sequence[str], decoding: Decoding, passes: Passes
) -> list[tuple[Answer, int]]:
    """Answers to questions that waited together, and how many passes there were at their end."""

    async def answered(question: str) -> tuple[Answer, int]:
        stream = memory.reply(asked(question), decoding)
        async for _ in stream:
            pass
        return stream.answer, len(passes.widths)

    return asyncio.run(while_busy(memory, [answered(question) for question in questions], passes))


async def while_busy(
    memory: MemoryModel, works: Sequence[Coroutine[Any, Any, T]], passes: Passes
) -> list[T]:
    """Begin works while the model is held up by another one."""

    async def hold() -> None:
        async for _ in memory.reply(asked("Is it there?"), Decoding(max_new_tokens=1)):
            pass

    holding = asyncio.create_task(hold())
    while not passes.widths:
        await asyncio.sleep(0.001)
    running = [asyncio.create_task(work) for work in works]
    await asyncio.sleep(0)
    passes.go.set()
    await holding
    return await asyncio.gather(*running)


def alone(memory: MemoryModel, question: str, decoding: Decoding) -> Answer:
    stream = memory.reply(asked(question), decoding)
    for _ in stream:
        pass
    return stream.answer


def told(answer: Answer) -> tuple[str, int, int, bool]:
    return answer.text, answer.prompt_tokens, answer.new_tokens, answer.ended


@pytest.mark.parametrize("lambda_", [None, 0.0])
def test_each_gets_the_answer_it_gets_alone(
    memory: MemoryModel, passes: Passes, lambda_: float | None
) -> None:
    decoding = Decoding(max_new_tokens=10, lambda_=lambda_, batch_size=4)
    together = at_once(memory, QUESTIONS, decoding, passes)
    assert max(passes.widths) == 4
    expected = [alone(memory, question, decoding) for question in QUESTIONS]
    assert [told(answer) for answer, _ in together] == [told(answer) for answer in expected]
    assert len({answer.text for answer in expected}) > 1


def test_no_more_than_allowed_are_generated_together(memory: MemoryModel, passes: Passes) -> None:
    at_once(memory, QUESTIONS, Decoding(max_new_tokens=4, batch_size=3), passes)
    assert set(passes.widths) == {1, 3}


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=4),
        Decoding(max_new_tokens=4, temperature=1.0, seed=3, batch_size=4),
    ],
)
def test_draws_and_what_was_not_asked_for_stay_alone(
    memory: MemoryModel, passes: Passes, decoding: Decoding
) -> None:
    at_once(memory, QUESTIONS, decoding, passes)
    assert set(passes.widths) == {1}


def test_who_is_done_does_not_wait_for_the_others(memory: MemoryModel, passes: Passes) -> None:
    passes.go.set()
    decoding = Decoding(max_new_tokens=16, batch_size=4)
    first, *others = (alone(memory, question, decoding).text for question in QUESTIONS)
    pieces = (first[at : at + 3] for at in range(len(first) // 2))
    stop = next(piece for piece in pieces if not any(piece in text for text in others))
    passes.widths.clear()
    passes.go.clear()
    decoding = Decoding(max_new_tokens=16, batch_size=4, stop=(stop,))
    (short, ended), *longer = at_once(memory, QUESTIONS, decoding, passes)
    assert first.startswith(short.text)
    assert short.ended
    assert all(ended < at_end for _, at_end in longer)


def test_who_leaves_does_not_stop_the_others(memory: MemoryModel, passes: Passes) -> None:
    decoding = Decoding(max_new_tokens=10, batch_size=4)

    async def answered(question: str, pieces: int) -> str:
        stream = memory.reply(asked(question), decoding)
        async for _ in stream:
            pieces -= 1
            if pieces == 0:
                break
        return stream.answer.text

    works = [answered(q, 1 if q == QUESTIONS[1] else -1) for q in QUESTIONS]
    texts = asyncio.run(while_busy(memory, works, passes))
    expected = [alone(memory, question, decoding).text for question in QUESTIONS]
    assert [text for n, text in enumerate(texts) if n != 1] == expected[:1] + expected[2:]


@pytest.mark.parametrize("memory", ["chat"], indirect=True)  # only a template refuses a prompt
def test_a_prompt_that_cannot_be_made_fails_alone(memory: MemoryModel, passes: Passes) -> None:
    decoding = Decoding(max_new_tokens=6, batch_size=4)

    async def answered(question: str) -> str:
        stream = memory.reply(asked(question), decoding)
        try:
            async for _ in stream:
                pass
        except ConfigError as error:
            return str(error)
        return stream.answer.text

    questions = (QUESTIONS[0], "What is forbidden?", QUESTIONS[1])
    texts = asyncio.run(while_busy(memory, [answered(q) for q in questions], passes))
    assert max(passes.widths) == 2
    assert "not allowed" in texts[1]
    expected = [alone(memory, question, decoding).text for question in QUESTIONS[:2]]
    assert [texts[0], texts[2]] == expected


def test_transformers_is_told_anew_only_when_a_line_ends() -> None:
    class Counted:
        def __init__(self, tokens: int) -> None:
            self.left = tokens

        def take(self, _: int) -> bool:
            self.left -= 1
            return self.left == 0

        def end(self) -> None:
            assert self.left == 0

    writers: Any = [Counted(4), Counted(2)]
    each = _EachToken(writers)
    ids = torch.zeros(2, 1, dtype=torch.long)
    told: list[Any] = [each(ids, ids) for _ in range(4)]
    over = [[False, False], [False, True], [False, True], [True, True]]
    assert [told.tolist() for told in told] == over
    assert [told[0] is told[1], told[1] is told[2], told[2] is told[3]] == [False, True, False]


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size = 0: allowed is 1 or more"):
        Decoding(batch_size=0)


# Layers that see only what is near.


@pytest.mark.parametrize("lambda_", [0.3, 0.8])
def test_padding_takes_no_place_in_a_window(
    tmp_path: Path, memory_of: Callable[[Path], Path], lambda_: float
) -> None:
    folder = save_model(tmp_path / "windowed", "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 12}))
    loaded = MemoryModel.load(memory_of(folder), device="cpu", dtype="float32")
    loaded.tokenizer.chat_template = TEMPLATE
    decoding = Decoding(max_new_tokens=30, lambda_=lambda_, batch_size=4)
    expected = [alone(loaded, question, decoding).text for question in QUESTIONS]
    streams = [loaded.reply(asked(question), decoding) for question in QUESTIONS]
    found: list[list[Any]] = [[] for _ in QUESTIONS]
    listeners = [Listener(pieces.append) for pieces in found]
    generate_together([stream._generation for stream in streams], listeners)
    assert ["".join(p for p in pieces if isinstance(p, str)) for pieces in found] == expected
