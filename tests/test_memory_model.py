"""Asking: the same text as transformers gives, with true figures, from any number of threads."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LogitsProcessor

from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import load_backbone
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import AnswerStream, MemoryModel
from mlpmem_rag.model import attach_memory

CONTEXT = 96
QUESTION = "What was found in the old mill?"
TWO = "Question: Who?\nAnswer: Ada.\n\nChapter two"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who found the map?"},
    {"role": "assistant", "content": "Ines Maro."},
    {"role": "user", "content": "Where? "},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def memory_on(folder: Path, corpus_tokens: torch.Tensor) -> MemoryModel:
    """The base model of a folder with a random memory."""
    backbone = load_backbone(str(folder), device="cpu", dtype="float32")
    config = MemoryConfig(32, 24, 1, "silu", gated=True, vocab_size=len(corpus_tokens))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        memory = Memory(config)
    memory.corpus_tokens = corpus_tokens
    settings = MemorySettings(backbone.reference, backbone.layer, config, 0.3, 0.2)
    return MemoryModel(attach_memory(backbone, memory, settings), backbone.tokenizer)


@pytest.fixture(scope="module")
def memory(tiny_folder: Path) -> MemoryModel:
    """A memory whose tokenizer has no chat template."""
    return memory_on(tiny_folder, torch.arange(259, 300))


@pytest.fixture(scope="module")
def bare(bare_folder: Path) -> MemoryModel:
    """A memory whose tokenizer has no special tokens at all."""
    return memory_on(bare_folder, torch.arange(259, 300))


@pytest.fixture(scope="module")
def chatty(memory: MemoryModel) -> MemoryModel:
    """A memory whose tokenizer has a chat template."""
    tokenizer = copy.deepcopy(memory.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return MemoryModel(memory.model, tokenizer)


def expected(
    memory: MemoryModel, prompt: str, count: int, lambda_: float | None = None
) -> tuple[str, int]:
    """Text and number of tokens that transformers' own generate gives."""
    ids = torch.tensor([encode(memory, prompt)[-(CONTEXT - count) :]])
    model: Any = memory.model
    templated = bool(memory.tokenizer.chat_template)
    stop = {} if templated else {"stop_strings": ["\n"], "tokenizer": memory.tokenizer}
    tokens = model.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        memory_lambda=lambda_,
        **stop,
    )[0, ids.shape[1] :]
    return decode(memory, tokens.tolist()).strip(), len(tokens)


def encode(memory: MemoryModel, prompt: str) -> list[int]:
    """A template writes the special tokens itself."""
    templated = bool(memory.tokenizer.chat_template)
    return list(memory.tokenizer(prompt, add_special_tokens=not templated)["input_ids"])


def decode(memory: MemoryModel, tokens: list[int]) -> str:
    return str(memory.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture
def on_forward(
    memory: MemoryModel,
    before_forward: Callable[[torch.nn.Module, Callable[[int], object]], None],
) -> Callable[[Callable[[int], object]], None]:
    """Has a function called before each forward pass of the base, with the pass's number."""
    return partial(before_forward, memory.model.base)


# The text.


@pytest.mark.parametrize("lambda_", [None, 0.0, 1.0])
def test_an_answer_is_what_generate_gives(memory: MemoryModel, lambda_: float | None) -> None:
    text, count = expected(memory, f"Question: {QUESTION}\nAnswer:", 24, lambda_)
    answer = memory.answer(QUESTION, max_new_tokens=24, lambda_=lambda_)
    assert text
    assert (answer.text, answer.new_tokens) == (text, count)


def test_the_memory_has_a_say(memory: MemoryModel) -> None:
    assert (
        len({memory.answer(QUESTION, max_new_tokens=24, lambda_=x).text for x in (0.0, 0.3, 1.0)})
        > 1
    )


def test_a_stream_is_the_answer_in_pieces(memory: MemoryModel) -> None:
    stream = memory.stream(QUESTION, max_new_tokens=24)
    pieces = list(stream)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces).strip() == stream.answer.text
    assert stream.answer.text == memory.answer(QUESTION, max_new_tokens=24).text
    assert list(stream) == []


def test_the_chat_template_makes_the_prompt(chatty: MemoryModel) -> None:
    prompt = f"<user> {QUESTION}\n<assistant>"
    text, count = expected(chatty, prompt, 30)
    answer = chatty.answer(QUESTION, max_new_tokens=30)
    assert (answer.text, answer.new_tokens) == (text, count)
    assert answer.prompt_tokens == len(encode(chatty, prompt))


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "memory",
            "Context: Be brief.\nQuestion: Who found the map?\nAnswer: Ines Maro.\n"
            "Question: Where?\nAnswer:",
        ),
        (
            "chatty",
            "<system> Be brief.\n<user> Who found the map?\n<assistant> Ines Maro.\n"
            "<user> Where? \n<assistant>",
        ),
    ],
)
def test_a_conversation_is_continued(
    request: pytest.FixtureRequest, name: str, prompt: str
) -> None:
    memory: MemoryModel = request.getfixturevalue(name)
    text, _ = expected(memory, prompt, 10)
    assert memory.answer(TALK, max_new_tokens=10).text == text


@pytest.mark.parametrize("end", ["\n", "</s>"])
def test_an_answer_ends_with_its_line_or_the_text(tiny_folder: Path, end: str) -> None:
    tokenizer = load_backbone(str(tiny_folder)).tokenizer
    (token,) = tokenizer(end, add_special_tokens=False)["input_ids"]
    memory = memory_on(tiny_folder, torch.tensor([token]))
    answer = memory.answer(QUESTION, max_new_tokens=8, lambda_=1.0)
    assert (answer.text, answer.new_tokens) == ("", 1)


def test_a_tokenizer_without_special_tokens_will_do(bare: MemoryModel) -> None:
    assert bare.tokenizer.bos_token is bare.tokenizer.eos_token is None
    answer = bare.answer(QUESTION, max_new_tokens=9)
    ids = encode(bare, f"Question: {QUESTION}\nAnswer:")
    assert answer.prompt_tokens == len(ids)
    for _ in range(answer.new_tokens):
        ids.append(int(bare.log_probs(ids)[-1].argmax()))
    new = decode(bare, ids[answer.prompt_tokens :])
    assert answer.text == new.strip()
    assert answer.new_tokens == 9 or new.endswith("\n")


def test_a_question_too_long_loses_its_beginning(memory: MemoryModel) -> None:
    long = " ".join(f"{n}?" for n in range(100))
    text, count = expected(memory, f"Question: {long}\nAnswer:", 20)
    answer = memory.answer(long, max_new_tokens=20)
    assert answer.prompt_tokens == CONTEXT - 20
    assert answer.cut_tokens == len(encode(memory, f"Question: {long}\nAnswer:")) - (CONTEXT - 20)
    assert (answer.text, answer.new_tokens) == (text, count)


# The figures.


def test_figures_of_an_answer(memory: MemoryModel) -> None:
    answer = memory.answer(QUESTION, max_new_tokens=24)
    prompt = f"Question: {QUESTION}\nAnswer:"
    assert answer.prompt_tokens == len(encode(memory, prompt))
    assert 0 < answer.ttft_seconds <= answer.seconds
    assert memory.answer(QUESTION, max_new_tokens=1).new_tokens == 1


def test_the_end_of_text_counts_as_a_token(
    chatty: MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = chatty.answer(QUESTION, max_new_tokens=12)
    ids = encode(chatty, f"<user> {QUESTION}\n<assistant>")
    tokens: list[int] = []
    for _ in range(4):
        tokens.append(int(chatty.log_probs(ids + tokens)[-1].argmax()))
    ends = tokens[3]
    monkeypatch.setattr(chatty.model.generation_config, "eos_token_id", [ends, 299])
    answer = chatty.answer(QUESTION, max_new_tokens=12)
    assert answer.new_tokens == tokens.index(ends) + 1 < free.new_tokens
    assert free.text.startswith(answer.text)


def test_the_times_are_those_of_the_first_and_the_last_token(
    memory: MemoryModel, on_forward: Callable[[Callable[[int], object]], None]
) -> None:
    on_forward(lambda number: time.sleep(0.2 if number in (1, 3) else 0))
    answer = memory.answer(QUESTION, max_new_tokens=4)
    assert answer.ttft_seconds >= 0.2
    assert answer.seconds >= answer.ttft_seconds + 0.2


# What goes wrong.


@pytest.mark.parametrize(
    "question",
    ["", " \n", [], [{"role": "user", "content": "  "}], [*TALK[:3], TALK[3] | {"content": ""}]],
)
def test_an_empty_question_is_refused(
    memory: MemoryModel, question: str | list[dict[str, str]]
) -> None:
    with pytest.raises(ConfigError, match="the question is empty"):
        memory.answer(question)


@pytest.mark.parametrize("count", [0, -3, CONTEXT, CONTEXT + 1])
def test_as_many_tokens_cannot_be_asked_for(memory: MemoryModel, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_new_tokens = {count}: .*allowed"):
        memory.stream(QUESTION, max_new_tokens=count)


def test_one_token_of_the_question_may_be_left(memory: MemoryModel) -> None:
    answer = memory.answer(QUESTION, max_new_tokens=CONTEXT - 1, lambda_=0.0)
    assert answer.prompt_tokens == 1


@pytest.mark.parametrize("lambda_", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_is_refused_before_the_work(memory: MemoryModel, lambda_: float) -> None:
    with pytest.raises(ConfigError, match="lambda"):
        memory.stream(QUESTION, lambda_=lambda_)


@pytest.mark.parametrize("fails_at", [1, 6])
def test_an_error_inside_reaches_the_one_who_asked(
    memory: MemoryModel,
    on_forward: Callable[[Callable[[int], object]], None],
    fails_at: int,
) -> None:
    def fail(number: int) -> None:
        if number == fails_at:
            raise RuntimeError("the device is gone")

    on_forward(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        memory.answer(QUESTION, max_new_tokens=20)
    assert memory.answer(QUESTION, max_new_tokens=2).new_tokens == 2  # the next one is served


# Threads.


@pytest.mark.parametrize("kept", [False, True])
def test_leaving_a_stream_early_stops_the_generation(
    memory: MemoryModel,
    on_forward: Callable[[Callable[[int], object]], None],
    kept: bool,
) -> None:
    passes: list[int] = []

    def slowly(number: int) -> None:
        passes.append(number)
        time.sleep(0.01)

    on_forward(slowly)
    count = CONTEXT - 40
    stream = memory.stream(QUESTION, max_new_tokens=count)
    pieces = iter(stream)
    assert any(next(pieces) for _ in range(count))
    if not kept:
        del stream
    del pieces
    memory.answer(QUESTION, max_new_tokens=1)  # served when the other has ended
    assert len(passes) < count


async def listed(stream: AnswerStream) -> list[str]:
    return [piece async for piece in stream]


def test_asyncio_gets_the_same_pieces(memory: MemoryModel) -> None:
    stream = memory.stream(QUESTION, max_new_tokens=24)
    pieces = asyncio.run(listed(stream))
    assert pieces == list(memory.stream(QUESTION, max_new_tokens=24))
    assert stream.answer.text == memory.answer(QUESTION, max_new_tokens=24).text
    assert asyncio.run(listed(stream)) == []


# Other ways to decode.


def test_a_text_goes_on_as_it_stands(memory: MemoryModel) -> None:
    prompt = "In the old mill, two surveyors"
    ids = torch.tensor([encode(memory, prompt)])
    model: Any = memory.model
    tokens = model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )[0, ids.shape[1] :].tolist()
    stream = memory.continue_text(prompt, Decoding(max_new_tokens=20))
    assert "".join(stream) == decode(memory, tokens)
    assert (stream.answer.prompt_tokens, stream.answer.new_tokens) == (ids.shape[1], len(tokens))
    assert stream.answer.confidence is None


def test_a_text_that_begins_with_its_mark_does_not_get_a_second_one(memory: MemoryModel) -> None:
    lengths = []
    for prompt in ("Who?", "<s>Who?"):
        stream = memory.continue_text(prompt, Decoding(max_new_tokens=1))
        list(stream)
        lengths.append(stream.answer.prompt_tokens)
    assert lengths[0] == lengths[1] == len(encode(memory, "Who?"))


def test_a_stop_string_ends_the_text_before_it(memory: MemoryModel) -> None:
    whole = "".join(memory.continue_text("Who", Decoding(max_new_tokens=24, lambda_=0.0)))
    stop = whole[10:12]
    stream = memory.continue_text("Who", Decoding(max_new_tokens=24, lambda_=0.0, stop=(stop,)))
    assert "".join(stream) == whole[: whole.index(stop)]
    assert stream.answer.new_tokens < 24
    assert stream.answer.ended


def test_a_special_token_can_be_a_stop_string(tiny_folder: Path) -> None:
    tokenizer = load_backbone(str(tiny_folder)).tokenizer
    memory = memory_on(tiny_folder, torch.tensor([tokenizer.pad_token_id]))
    decoding = Decoding(max_new_tokens=8, lambda_=1.0, stop=("<pad>",))
    stream = memory.continue_text("Who", decoding)
    assert list(stream) == ["", ""]
    assert (stream.answer.new_tokens, stream.answer.ended) == (1, True)


def test_draws_repeat_with_their_seed(memory: MemoryModel) -> None:
    def drawn(seed: int) -> str:
        return "".join(memory.continue_text("Who", Decoding(24, temperature=1.0, seed=seed)))

    greedy = "".join(memory.continue_text("Who", Decoding(24)))
    assert drawn(1) == drawn(1)
    assert len({drawn(1), drawn(2), greedy}) == 3


def test_a_logits_processor_decides_what_may_come(memory: MemoryModel) -> None:
    wanted = memory.tokenizer("{}", add_special_tokens=False)["input_ids"]

    class Only(LogitsProcessor):
        def __init__(self) -> None:
            self.left = list(wanted)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, self.left.pop(0)] = 0.0
            return forced

    stream = memory.continue_text("Who", Decoding(len(wanted), logits_processors=(Only(),)))
    assert "".join(stream) == "{}"


def test_the_question_decides_the_query_vector(memory: MemoryModel) -> None:
    seen: list[str] = []

    class Noting:
        name, size = "noting", 0

        def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            seen.extend(texts)
            return np.zeros((len(texts), 0), np.float32)

    asked = MemoryModel(memory.model, memory.tokenizer, Noting())
    asked.answer(TALK, max_new_tokens=1)
    "".join(asked.continue_text("A text.", Decoding(1)))
    "".join(asked.continue_text("A text.", Decoding(1), asked="Its question?"))
    "".join(asked.continue_text("Question: Who?\nAnswer:", Decoding(1)))
    "".join(asked.continue_text(TWO, Decoding(1)))
    "".join(asked.reply(TALK, Decoding(1), asked="Another?"))
    asked.answer(TALK, max_new_tokens=1, lambda_=0.0)  # the base model needs none
    assert seen == ["Where? ", "A text.", "Its question?", "Who?", TWO, "Another?"]


def test_two_threads_get_what_each_gets_alone(memory: MemoryModel) -> None:
    questions = [QUESTION, "Who?", "Why was the ledger of 1887 left there?", "Nobody asked."] * 3

    def ask(number: int) -> str:
        lambda_ = number % 3 / 2
        return memory.answer(questions[number], max_new_tokens=12, lambda_=lambda_).text

    alone = [ask(number) for number in range(len(questions))]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ask, range(len(questions)))) == alone


# Log-probabilities.


@pytest.mark.parametrize("lambda_", [None, 0.0, 1.0])
def test_log_probs_are_the_normalised_logits(memory: MemoryModel, lambda_: float | None) -> None:
    ids = [0, 40, 81, 122, 163]
    found = memory.log_probs(ids, lambda_=lambda_)
    assert found.shape == (5, 300)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5))
    with torch.no_grad():
        model: Any = memory.model if lambda_ is None else memory.model.base
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    if lambda_ == 1.0:
        assert torch.all(found[:, :259] == -torch.inf)
    else:
        torch.testing.assert_close(found, logits.log_softmax(-1))
