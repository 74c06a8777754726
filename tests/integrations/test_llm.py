"""MLPMemLLM: what LlamaIndex asks of an LLM, and what others get wrong."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.types import ImageBlock, MessageRole
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.llms.loading import load_llm

from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.loading import reload
from mlpmem_rag.backbone import load_backbone
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.memory_model import MemoryModel

QUESTION = "What was found in the old mill?"
ASKED = [ChatMessage(QUESTION)]
CALLS = ("complete", "chat", "stream_complete", "stream_chat")


@pytest.fixture(params=["chat_model", "plain_model"])
def model(request: pytest.FixtureRequest) -> MemoryModel:
    """With and without a chat template."""
    found: MemoryModel = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def llm(chat_model: MemoryModel) -> MLPMemLLM:
    return MLPMemLLM.from_model(chat_model, max_new_tokens=20)


def call(llm: MLPMemLLM, name: str, asynchronous: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
    """The last response of one of the eight calls."""
    given: Any = ASKED if name.endswith("chat") else QUESTION
    if not asynchronous:
        response = getattr(llm, name)(given, **kwargs)
        return list(response)[-1] if name.startswith("stream") else response

    async def wait() -> Any:  # noqa: ANN401
        response = await getattr(llm, f"a{name}")(given, **kwargs)
        return [r async for r in response][-1] if name.startswith("stream") else response

    return asyncio.run(wait())


def text_of(response: Any) -> str:  # noqa: ANN401
    return str(response.text if hasattr(response, "text") else response.message.content)


# The answers.


def test_it_is_an_llm() -> None:
    assert "LLM" in [base.__name__ for base in MLPMemLLM.__mro__]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_gives_the_models_answer(
    model: MemoryModel, name: str, asynchronous: bool
) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=20)
    expected = model.answer(QUESTION, max_new_tokens=20).text
    assert expected
    assert text_of(call(llm, name, asynchronous)) == expected


@pytest.mark.parametrize("name", ["stream_complete", "stream_chat"])
def test_a_stream_gives_what_is_new_and_all_so_far(llm: MLPMemLLM, name: str) -> None:
    parts = list(getattr(llm, name)(ASKED if name.endswith("chat") else QUESTION))
    text = ""
    for part in parts:
        text += part.delta
        assert text_of(part) == text
    assert len(parts) > 2
    assert [part.raw is not None for part in parts] == [False] * (len(parts) - 1) + [True]


def test_a_conversation_is_continued(llm: MLPMemLLM) -> None:
    talk = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Who found the map?"),
        ChatMessage(role="assistant", content="Ines Maro."),
        ChatMessage(role="user", content="Where?"),
    ]
    said = [{"role": m.role.value, "content": m.content or ""} for m in talk]
    expected = llm.model.answer(said, max_new_tokens=20).text
    assert llm.chat(talk).message.content == expected != llm.chat(talk[3:]).message.content


@pytest.mark.parametrize(
    ("role", "taken_for"),
    [("tool", "user"), ("function", "user"), ("model", "assistant"), ("developer", "system")],
)
def test_every_role_is_known_to_the_template(llm: MLPMemLLM, role: str, taken_for: str) -> None:
    other = llm.chat([ChatMessage(role=MessageRole(role), content="So."), *ASKED])
    same = llm.chat([ChatMessage(role=MessageRole(taken_for), content="So."), *ASKED])
    assert other.message.content == same.message.content
    assert usage(other) == usage(same)


def test_a_formatted_prompt_is_continued_as_it_stands(model: MemoryModel) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=16)
    prompt = "In the old mill, two surveyors"
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    mixed: Any = model.model
    new = mixed.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )[0, ids.shape[1] :]
    response = llm.complete(prompt, formatted=True)
    assert response.text == model.tokenizer.decode(new, skip_special_tokens=True)
    assert usage(response)[0] == ids.shape[1]
    assert usage(llm.complete(prompt))[0] > ids.shape[1]  # in the template


def test_with_lambda_0_it_is_the_base_model(chat_folder: Path, llm: MLPMemLLM) -> None:
    base = load_backbone(str(chat_folder), device="cpu", dtype="float32")
    prompt = "In the old mill, two surveyors"
    ids = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    model: Any = base.model
    new = model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )[0, ids.shape[1] :]
    plain = MLPMemLLM.from_model(llm.model, lambda_=0.0, max_new_tokens=16)
    text = plain.complete(prompt, formatted=True).text
    assert text == base.tokenizer.decode(new, skip_special_tokens=True)
    assert text == llm.complete(prompt, formatted=True, lambda_=0.0, max_tokens=16).text
    assert text != llm.complete(prompt, formatted=True, max_tokens=16).text
    assert (plain.mixing_weight, llm.mixing_weight) == (0.0, llm.model.model.memory_lambda)


# The arguments of one call.


def usage(response: Any) -> tuple[int, int]:  # noqa: ANN401
    told = response.raw["usage"]
    assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    return told["prompt_tokens"], told["completion_tokens"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_a_call_are_honoured(llm: MLPMemLLM, name: str, asynchronous: bool) -> None:
    def ask(**kwargs: Any) -> Any:  # noqa: ANN401
        return call(llm, name, asynchronous, **kwargs)

    whole = text_of(ask())
    assert usage(ask(max_tokens=3))[1] == usage(ask(max_new_tokens=3))[1] == 3
    stopped = ask(stop=[whole[4:6]])
    assert text_of(stopped) == whole[: whole.index(whole[4:6])].rstrip()
    assert stopped.raw["finish_reason"] == "stop"
    assert text_of(ask(lambda_=0.0)) != whole
    assert ask(lambda_=0.25).raw["mlpmem"]["lambda"] == 0.25
    drawn = [text_of(ask(temperature=1.5, top_p=0.99, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({*drawn, whole}) == 3
    assert text_of(ask()) == whole


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_unknown_arguments_are_refused(llm: MLPMemLLM, name: str, asynchronous: bool) -> None:
    with pytest.raises(ConfigError, match=r"unknown argument\(s\) tempertaure.*max_tokens"):
        call(llm, name, asynchronous, tempertaure=1)
    with pytest.raises(ConfigError, match="mean the same"):
        call(llm, name, asynchronous, max_tokens=1, max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"top_p = 2: allowed"):
        call(llm, name, asynchronous, top_p=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": "3"}, r"max_tokens = '3': allowed is a whole number"),
        ({"max_new_tokens": 3.5}, r"max_new_tokens = 3\.5: allowed is a whole number"),
        ({"temperature": "hot"}, r"temperature = 'hot': allowed is a number"),
        ({"seed": "a"}, r"seed = 'a': allowed is a whole number"),
        ({"stop": 5}, r"stop = 5: allowed is strings"),
        ({"stop": ["a", None]}, r"stop = \['a', None\]: allowed is strings"),
        ({"logits_processor": 5}, r"logits_processor = 5: allowed is LogitsProcessors"),
        ({"asked": " "}, r"asked = ' ': allowed is a text"),
        ({"asked": 5}, r"asked = 5: allowed is a text"),
    ],
)
def test_values_of_another_kind_are_refused(
    llm: MLPMemLLM, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        llm.complete(QUESTION, **given)


def test_numbers_may_be_numpys(llm: MLPMemLLM) -> None:
    given: dict[str, Any] = {
        "max_tokens": np.int64(3),
        "lambda_": np.float32(0.5),
        "seed": np.int32(1),
    }
    expected = llm.complete(QUESTION, max_tokens=3, lambda_=0.5, seed=1)
    assert llm.complete(QUESTION, **given).text == expected.text


@pytest.mark.parametrize("name", CALLS)
def test_none_means_not_given(llm: MLPMemLLM, name: str) -> None:
    given = call(llm, name, max_tokens=None, stop=None, temperature=None, seed=None)
    assert text_of(given) == text_of(call(llm, name))


def test_settings_of_the_object_are_those_of_every_call(llm: MLPMemLLM) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "lambda_": 0.5, "stop": ["e"]}
    made = MLPMemLLM.from_model(llm.model, max_new_tokens=20, **settings)
    assert made.complete(QUESTION).text == llm.complete(QUESTION, **settings).text


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(llm: MLPMemLLM, prompt: str) -> None:
    for ask in (
        lambda: llm.complete(prompt),
        lambda: llm.complete(prompt, formatted=True),
        lambda: list(llm.stream_complete(prompt)),
        lambda: llm.chat([ChatMessage(prompt)]),
        lambda: llm.chat([]),
    ):
        with pytest.raises(ConfigError, match="the question is empty"):
            ask()


@pytest.mark.parametrize(
    "field",
    [
        {"system_prompt": "Be brief."},
        {"messages_to_prompt": lambda _: "A prompt."},
        {"completion_to_prompt": lambda text: f"Q: {text} A:"},
    ],
)
def test_what_stands_around_a_prompt_is_no_question(
    chat_model: MemoryModel, field: dict[str, Any]
) -> None:
    llm = MLPMemLLM.from_model(chat_model, max_new_tokens=4, **field)
    asks: list[Callable[[], object]] = [
        lambda: llm.complete(" "),
        lambda: llm.chat([]),
        lambda: llm.chat([ChatMessage()]),
    ]
    for ask in asks:
        with pytest.raises(ConfigError, match="the question is empty"):
            ask()


def test_an_image_is_refused(llm: MLPMemLLM) -> None:
    message = ChatMessage(blocks=[ImageBlock(image=b"\x89PNG\r\n\x1a\n")])
    with pytest.raises(ConfigError, match="ImageBlock; this language model reads text only"):
        llm.chat([message])


# Prompts.


@pytest.mark.parametrize("name", CALLS)
def test_a_system_prompt_goes_in_front_of_every_call(model: MemoryModel, name: str) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=20, system_prompt="Be brief.")
    plain = MLPMemLLM.from_model(model, max_new_tokens=20)
    expected = plain.chat([ChatMessage(role="system", content="Be brief."), *ASKED])
    response = call(llm, name)
    assert text_of(response) == expected.message.content
    assert usage(response) == usage(expected)


def test_a_system_prompt_is_there_once(
    model: MemoryModel, caplog: pytest.LogCaptureFixture
) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=20, system_prompt="Be brief.")
    # `predict` puts it there by itself, and so may the caller.
    system = ChatMessage(role="system", content="Be brief.")
    assert llm.predict(PromptTemplate("{q}"), q=QUESTION) == text_of(llm.chat(ASKED))
    assert usage(llm.chat([system, *ASKED])) == usage(llm.chat(ASKED))
    # Templates take one: the caller's own goes behind it.
    other = ChatMessage(role="system", content="And kind.")
    both = ChatMessage(role="system", content="Be brief.\n\nAnd kind.")
    plain = MLPMemLLM.from_model(model, max_new_tokens=20)
    assert usage(llm.chat([other, *ASKED])) == usage(plain.chat([both, *ASKED]))


def test_completion_to_prompt_is_for_what_is_not_formatted(llm: MLPMemLLM) -> None:
    own = MLPMemLLM.from_model(
        llm.model, max_new_tokens=20, completion_to_prompt=lambda text: f"Q: {text} A:"
    )
    as_text = llm.complete(f"Q: {QUESTION} A:", formatted=True, asked=QUESTION)
    assert own.complete(QUESTION).text == as_text.text.strip()
    assert usage(own.complete(QUESTION)) == usage(as_text)
    assert own.complete("Who", formatted=True).text == llm.complete("Who", formatted=True).text


def test_messages_to_prompt_replaces_the_template(llm: MLPMemLLM) -> None:
    own = MLPMemLLM.from_model(
        llm.model,
        max_new_tokens=20,
        system_prompt="Be brief.",
        messages_to_prompt=lambda messages: "|".join(m.content or "" for m in messages),
    )
    as_text = llm.complete(f"Be brief.|{QUESTION}", formatted=True, asked=QUESTION)
    assert own.chat(ASKED).message.content == as_text.text.strip()
    assert usage(own.chat(ASKED)) == usage(as_text)


@pytest.mark.parametrize(
    ("settings", "arguments", "asked"),
    [
        ({}, {}, None),
        ({}, {"asked": QUESTION}, QUESTION),
        ({"is_chat_model": False}, {}, "Q: Who? A:"),
        ({"is_chat_model": False}, {"asked": QUESTION}, QUESTION),
    ],
)
def test_a_formatted_text_asks_something_where_templates_are_sent_so(
    llm: MLPMemLLM,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    arguments: dict[str, Any],
    asked: str | None,
) -> None:
    given: list[str | None] = []
    continue_text = MemoryModel.continue_text

    def note(self: MemoryModel, text: str, decoding: Any, **options: Any) -> Any:  # noqa: ANN401
        given.append(options["asked"])
        return continue_text(self, text, decoding, **options)

    monkeypatch.setattr(MemoryModel, "continue_text", note)
    own = MLPMemLLM.from_model(llm.model, max_new_tokens=1, **settings)
    own.complete("Q: Who? A:", formatted=True, **arguments)
    assert given == [asked]


def test_a_mark_of_beginning_is_there_once(model: MemoryModel) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=1)
    tokens = model.tokenizer("Who?")["input_ids"]
    assert tokens[0] == model.tokenizer.bos_token_id
    assert usage(llm.complete("Who?", formatted=True))[0] == len(tokens)
    assert usage(llm.complete("<s>Who?", formatted=True))[0] == len(tokens)


def test_a_prompt_too_long_loses_its_beginning_with_a_warning(
    llm: MLPMemLLM, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(f"{n}?" for n in range(100))
    with caplog.at_level(logging.WARNING):
        response = llm.complete(long)
    window = llm.metadata.context_window
    assert usage(response)[0] == window - 20
    assert response.text == llm.model.answer(long, max_new_tokens=20).text
    cut = response.raw["mlpmem"]["cut_tokens"]
    (warning,) = caplog.messages
    assert f"first {cut} tokens were left out" in warning
    caplog.clear()
    llm.complete(QUESTION)
    assert not caplog.messages


# What a response tells.


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_raw_is_json_with_the_right_counts(
    model: MemoryModel, name: str, asynchronous: bool
) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=20)
    response = call(llm, name, asynchronous)
    answer = model.answer(QUESTION, max_new_tokens=20)
    assert json.loads(json.dumps(response.raw)) == response.raw
    assert usage(response) == (answer.prompt_tokens, answer.new_tokens)
    assert response.raw["mlpmem"]["confidence"] == answer.confidence
    assert 0 < response.raw["mlpmem"]["ttft_seconds"] <= response.raw["mlpmem"]["seconds"]


def test_metadata_tells_the_truth(model: MemoryModel) -> None:
    llm = MLPMemLLM.from_model(model, max_new_tokens=20)
    metadata = llm.metadata
    assert metadata.context_window == 96
    assert metadata.num_output == 20
    assert metadata.is_chat_model
    assert not metadata.is_function_calling_model
    assert model.folder is not None
    assert metadata.model_name == f"mlpmem:{model.folder.name}"
    assert MLPMemLLM.from_model(model).metadata.num_output == 48  # half of a small window
    assert not MLPMemLLM.from_model(model, is_chat_model=False).metadata.is_chat_model


# Objects.


def test_objects_of_one_folder_share_the_model(chat_memory: Path) -> None:
    first = MLPMemLLM(chat_memory, device="cpu", lambda_=0.2, max_new_tokens=5)
    second = MLPMemLLM(str(chat_memory), device="cpu", lambda_=0.0)
    assert first.model is second.model
    assert (first.mixing_weight, second.mixing_weight) == (0.2, 0.0)


def test_however_the_place_is_said_the_model_is_the_same(chat_memory: Path) -> None:
    said: list[dict[str, Any]] = [{}, {"device": "cpu"}, {"dtype": "float32"}]
    if not torch.cuda.is_available() and not has_bfloat16(torch.device("cpu")):
        llms = [MLPMemLLM(chat_memory, **fields) for fields in said]
        assert len({id(llm.model) for llm in llms}) == 1
    first, second = (MLPMemLLM(chat_memory, device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    both = [first.model.model, second.model.model]
    reload(first.model)
    assert not {id(first.model.model), id(second.model.model)} & set(map(id, both))
    assert second.model.model.dtype == torch.bfloat16


def test_a_folder_trained_anew_is_loaded_anew(chat_memory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    shutil.copytree(chat_memory, folder, ignore=shutil.ignore_patterns("work"))
    before = MLPMemLLM(folder, device="cpu")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert MLPMemLLM(folder, device="cpu").model is not before.model


def test_a_folder_that_is_as_it_was_is_loaded_anew(chat_memory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    shutil.copytree(chat_memory, folder, ignore=shutil.ignore_patterns("work"))
    llm, manifest = MLPMemLLM(folder, device="cpu"), folder / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before + "\n")
    reload(llm.model)  # as after a training
    assert MLPMemLLM(folder, device="cpu").model is llm.model
    manifest.write_text(before)
    assert MLPMemLLM(folder, device="cpu").model is not llm.model


def test_a_loaded_model_stays_where_it_is(chat_model: MemoryModel) -> None:
    llm = MLPMemLLM.from_model(chat_model, device="cpu", dtype="float32", max_new_tokens=4)
    assert (llm.device, llm.dtype, llm.model) == ("cpu", "float32", chat_model)
    with pytest.raises(ConfigError, match=r"device = 'cuda': .* loaded already, with cpu; leave"):
        MLPMemLLM.from_model(chat_model, device="cuda")
    with pytest.raises(ConfigError, match=r"dtype = 'float16': .* already, with float32; leave"):
        MLPMemLLM.from_model(chat_model, dtype="float16")


def test_it_comes_back_from_what_it_was_stored_as(chat_memory: Path) -> None:
    llm = MLPMemLLM(
        chat_memory,
        device="cpu",
        lambda_=0.4,
        max_new_tokens=7,
        temperature=0.5,
        stop=["x"],
        seed=4,
        system_prompt="Be brief.",
        messages_to_prompt=plain_text,
    )
    stored = llm.to_dict()
    assert json.loads(json.dumps(stored)) == stored
    restored: list[LLM] = [
        load_llm(stored),
        MLPMemLLM.from_dict(stored),
        MLPMemLLM.from_json(llm.to_json()),
        pickle.loads(pickle.dumps(llm)),
        copy.copy(llm),
        copy.deepcopy(llm),
        llm.model_copy(update={"lambda_": 0.4}),
    ]
    for other in restored:
        assert isinstance(other, MLPMemLLM)
        assert other.to_dict() == stored
        assert other.model is llm.model
    # Functions are not in a dictionary, but go with the others.
    assert [other.messages_to_prompt is plain_text for other in restored] == [False] * 3 + [
        True
    ] * 4


def plain_text(messages: Any) -> str:  # noqa: ANN401
    return "\n".join(message.content for message in messages)


def test_an_llm_without_a_folder_says_so_when_restored(chat_model: MemoryModel) -> None:
    unnamed = MemoryModel(chat_model.model, chat_model.tokenizer)
    llm = MLPMemLLM.from_model(unnamed, max_new_tokens=4)
    assert copy.copy(llm).model is unnamed
    with pytest.raises(ConfigError, match=r"memory is empty.*from_model"):
        MLPMemLLM.from_dict(llm.to_dict())


def test_a_folder_that_is_no_memory_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a memory"):
        MLPMemLLM(tmp_path)
    with pytest.raises(ArtifactError, match="not a memory"):
        MLPMemLLM(tiny_folder)


def test_a_base_model_that_does_not_fit_is_refused(chat_memory: Path, bare_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="this memory was trained on"):
        MLPMemLLM(chat_memory, base_model=str(bare_folder))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"lambda_": 2.0}, "lambda = 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 96}, "allowed are fewer"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"stop": [""]}, "empty stop string"),
        ({"context_windw": 4096}, "context_windw"),
        ({"query_wrapper_prompt": PromptTemplate("Q: {query_str}")}, "give completion_to_prompt"),
    ],
)
def test_settings_are_checked_when_they_are_made(
    chat_model: MemoryModel, field: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        MLPMemLLM.from_model(chat_model, **field)


def test_without_llama_index_the_message_holds_the_command() -> None:
    code = (
        "import sys; sys.modules['llama_index.core'] = None\n"
        "for name in ('llms.mlpmem', 'indices.managed.mlpmem'):\n"
        "    try:\n"
        "        __import__(f'llama_index.{name}')\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'mlpmem-rag[llama-index]'") == 2


# Wherever LlamaIndex takes an LLM.


def test_predict_and_stream_take_templates(llm: MLPMemLLM) -> None:
    expected = llm.complete(QUESTION).text
    template = PromptTemplate("What was found in {place}?")
    assert llm.predict(template, place="the old mill") == expected
    assert "".join(llm.stream(template, place="the old mill")) == expected
    assert asyncio.run(llm.apredict(template, place="the old mill")) == expected


def test_it_can_be_the_llm_of_the_settings(llm: MLPMemLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", None)
    Settings.llm = llm
    assert Settings.llm is llm
