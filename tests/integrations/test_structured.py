"""Answers as objects: by a program, and held to their form by a grammar."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.llms import ChatMessage
from llama_index.core.program import LLMTextCompletionProgram

from llama_index.indices.managed.mlpmem import MLPMemIndex
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.grammar import closed
from mlpmem_rag.errors import ConfigError, MissingDependencyError
from mlpmem_rag.memory_model import MemoryModel

from .fakes import Script

QUESTION = "Who found wild honey in the old mill?"


class Person(BaseModel):
    """Somebody."""

    name: str


class Find(BaseModel):
    """Something that was found, in so few words that any model comes to an end."""

    who: Literal["Ines", "Tollen"]
    year: int = Field(ge=1800, le=1899)


@pytest.fixture
def llm(chat_model: MemoryModel) -> MLPMemLLM:
    return MLPMemLLM.from_model(chat_model, max_new_tokens=48)


# Without a grammar.


def test_a_processor_makes_objects(index: MLPMemIndex) -> None:
    tokenizer, written = index.llm.model.tokenizer, '{"name": "Ines"}'
    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Person, prompt_template_str="Who?", llm=index.as_llm(max_new_tokens=30)
    )
    said = {"logits_processor": Script(tokenizer, written)}
    assert program(llm_kwargs=said) == Person(name="Ines")
    llm = index.as_llm(max_new_tokens=30, logits_processor=Script(tokenizer, written))
    response: Any = index.as_query_engine(llm=llm, output_cls=Person).query(QUESTION)
    assert response.response == Person(name="Ines")
    with pytest.raises(ConfigError, match="does not go with streaming"):
        index.as_query_engine(output_cls=Person, streaming=True)


# With one.


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("given", [{}, {"temperature": 1.5, "seed": 1}])
def test_every_answer_keeps_to_the_schema(
    llm: MLPMemLLM, lambda_: float, given: dict[str, Any]
) -> None:
    for schema in (Find, Find.model_json_schema()):
        reply = llm.complete(QUESTION, json_schema=schema, lambda_=lambda_, **given)
        Find.model_validate_json(reply.text)
        assert reply.raw["finish_reason"] == "stop"
    assert llm.complete(QUESTION, lambda_=lambda_, **given).text != reply.text


def test_programs_and_chats_take_a_schema(llm: MLPMemLLM) -> None:
    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Find, prompt_template_str="Who found {what}?", llm=llm
    )
    kept = {"json_schema": Find}
    assert program(llm_kwargs=kept, what="honey") == asyncio.run(
        program.acall(llm_kwargs=kept, what="honey")
    )
    parts = list(llm.stream_chat([ChatMessage(QUESTION)], json_schema=Find))
    Find.model_validate_json("".join(part.delta or "" for part in parts))


def test_wherever_an_object_is_asked_for_it_keeps_to_its_form(index: MLPMemIndex) -> None:
    llm = index.as_llm(max_new_tokens=48)
    template = PromptTemplate("Who found {what}?")
    found = llm.structured_predict(Find, template, what="honey")
    assert isinstance(found, Find)
    assert asyncio.run(llm.astructured_predict(Find, template, what="honey")) == found
    assert isinstance(llm.as_structured_llm(Find).chat([ChatMessage(QUESTION)]).raw, Find)
    engine = index.as_query_engine(llm=llm, output_cls=Find)
    response: Any = engine.query(QUESTION)
    assert isinstance(response.response, Find)
    again: Any = asyncio.run(engine.aquery(QUESTION))
    assert again.response == response.response
    assert json.loads(str(response)) == response.response.model_dump()


async def last(stream: Any) -> Any:  # noqa: ANN401
    return [item async for item in await stream][-1]


@pytest.mark.filterwarnings("ignore:The `json` method:DeprecationWarning")  # in LlamaIndex
def test_objects_that_come_in_pieces_keep_to_their_form_at_the_end(index: MLPMemIndex) -> None:
    llm, template = index.as_llm(max_new_tokens=48), PromptTemplate("Who found {what}?")
    expected = llm.structured_predict(Find, template, what="honey")
    parts = list(llm.stream_structured_predict(Find, template, what="honey"))
    assert len(parts) > 4
    assert parts[-1] == expected
    stream = llm.astream_structured_predict(Find, template, what="honey")
    assert asyncio.run(last(stream)) == expected
    structured, asked = llm.as_structured_llm(Find), [ChatMessage("Who found honey?")]
    assert list(structured.stream_chat(asked))[-1].raw == expected
    assert asyncio.run(last(structured.astream_chat(asked))).raw == expected


ASKED = [ChatMessage(QUESTION)]
TALK = [
    ChatMessage("Be brief.", role="system"),
    ChatMessage("Who?"),
    ChatMessage("Ines.", role="assistant"),
    *ASKED,
]
TEMPLATE = PromptTemplate("Who found {what} in the old mill?")
WAYS: dict[str, Callable[[MLPMemLLM], object]] = {
    "whole": lambda llm: llm.structured_predict(Find, TEMPLATE, what="wild honey"),
    "stream": lambda llm: list(llm.stream_structured_predict(Find, TEMPLATE, what="wild honey")),
    "a whole": lambda llm: asyncio.run(llm.astructured_predict(Find, TEMPLATE, what="wild honey")),
    "a stream": lambda llm: asyncio.run(
        last(llm.astream_structured_predict(Find, TEMPLATE, what="wild honey"))
    ),
    "chat": lambda llm: llm.as_structured_llm(Find).chat(ASKED),
    "talk": lambda llm: llm.as_structured_llm(Find).chat(TALK),
    "completion": lambda llm: llm.as_structured_llm(Find).complete(QUESTION),
    "own": lambda llm: llm.structured_predict(Find, PromptTemplate("So?"), {"asked": QUESTION}),
}


@pytest.fixture
def seen(index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the memory is asked."""
    encoder: Any = index.llm.model.encoder
    texts: list[str] = []
    encode = encoder.encode

    def noting(_: object, asked: list[str]) -> Any:  # noqa: ANN401
        texts.extend(asked)
        return encode(asked)

    monkeypatch.setattr(type(encoder), "encode", noting)
    return texts


@pytest.mark.parametrize("is_chat_model", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_memory_is_asked_the_question_and_not_the_schema(
    index: MLPMemIndex, seen: list[str], way: str, is_chat_model: bool
) -> None:
    llm = index.as_llm(max_new_tokens=48, is_chat_model=is_chat_model, system_prompt="Be kind.")
    for _ in range(2):  # a template is as it was before
        WAYS[way](llm)
        assert seen == [QUESTION]
        seen.clear()


def test_a_query_engine_asks_the_memory_the_question_alone(
    index: MLPMemIndex, seen: list[str]
) -> None:
    index.as_query_engine(llm=index.as_llm(max_new_tokens=48), output_cls=Find).query(QUESTION)
    assert seen == [QUESTION]


def test_a_template_stays_as_it_is(index: MLPMemIndex) -> None:
    llm, template = index.as_llm(max_new_tokens=48), PromptTemplate("Who found {what}?")
    before = llm.predict(template, what="honey")
    llm.structured_predict(Find, template, what="honey")
    assert llm.predict(template, what="honey") == before


class Bag(BaseModel):
    """A grammar cannot see to it that they differ; pydantic makes a set of them."""

    held: set[Literal["honey", "wax"]] = Field(max_length=2)


def test_what_no_grammar_can_see_to_is_left_to_the_class(llm: MLPMemLLM) -> None:
    found = llm.structured_predict(Bag, PromptTemplate("What was it?"))
    assert found.held <= {"honey", "wax"}
    with pytest.raises(ConfigError, match=r'kept to: .*"uniqueItems".*leave that out'):
        llm.complete(QUESTION, json_schema=Bag)


def test_objects_hold_what_is_named() -> None:
    one = {"type": "object", "properties": {"properties": {"type": "string"}}}
    open_one = {**one, "additionalProperties": True}
    schema = {"anyOf": [one, open_one], "$defs": {"a": {"items": one}}, "allOf": [one]}
    shut = {**one, "additionalProperties": False}
    assert closed({"additionalProperties": one}) == {"additionalProperties": shut}
    assert closed(schema) == {
        "anyOf": [shut, open_one],
        "$defs": {"a": {"items": shut}},
        "allOf": [one],
    }


# What cannot be.


def test_a_schema_that_is_none_is_refused(llm: MLPMemLLM) -> None:
    with pytest.raises(ConfigError, match="json_schema cannot be kept to"):
        llm.complete(QUESTION, json_schema={"type": "nothing of the kind"})
    for schema in ('{"type": "object"}', list[Find], Find(who="Ines", year=1850)):
        with pytest.raises(ConfigError, match=r"json_schema = .*allowed is a pydantic class, or"):
            llm.complete(QUESTION, json_schema=schema)


def test_a_tokenizer_without_an_end_is_refused(llm: MLPMemLLM) -> None:
    tokenizer = copy.deepcopy(llm.model.tokenizer)
    tokenizer.eos_token = None
    endless = MLPMemLLM.from_model(MemoryModel(llm.model.model, tokenizer), max_new_tokens=8)
    with pytest.raises(ConfigError, match="a token that ends a text"):
        endless.complete(QUESTION, json_schema=Find)


def test_without_the_library_the_message_holds_the_command(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llguidance" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = index.as_llm(max_new_tokens=30)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlpmem-rag\[structured\]'"):
        llm.complete(QUESTION, json_schema=Find)
    said = Script(index.llm.model.tokenizer, '{"name": "Ines"}')
    kept = {"logits_processor": said}
    # Objects can be asked for all the same; only nothing makes sure of their form.
    assert llm.structured_predict(Person, PromptTemplate("Who?"), kept) == Person(name="Ines")
    with pytest.raises(ValueError, match="extract json"):
        llm.structured_predict(Person, PromptTemplate("Who?"))
