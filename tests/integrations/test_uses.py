"""Objects, chat engines and tools made of a memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.tools import QueryEngineTool
from transformers import LogitsProcessor

from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_rag.errors import ConfigError

QUESTION = "Who found wild honey in the old mill?"
JSON = '{"name": "Ines"}'


class Person(BaseModel):
    """Somebody."""

    name: str


class Forced(LogitsProcessor):
    """Lets one text through, whatever the prompt's length: a grammar with one sentence."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._start = input_ids.shape[1] if self._start is None else self._start
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[input_ids.shape[1] - self._start]] = 0.0
        return forced


def forced(index: MLPMemIndex) -> Forced:
    tokenizer = index.llm.model.tokenizer
    ids: Any = tokenizer(JSON, add_special_tokens=False)["input_ids"]
    return Forced([*ids, int(tokenizer.eos_token_id)])


def test_a_grammar_makes_objects(index: MLPMemIndex) -> None:
    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Person, prompt_template_str="Who?", llm=index.as_llm(max_new_tokens=30)
    )
    assert program(llm_kwargs={"logits_processor": forced(index)}) == Person(name="Ines")
    llm = index.as_llm(max_new_tokens=30, logits_processor=forced(index))
    response: Any = index.as_query_engine(llm=llm, output_cls=Person).query(QUESTION)
    assert response.response == Person(name="Ines")
    with pytest.raises(ConfigError, match="does not go with streaming"):
        index.as_query_engine(output_cls=Person, streaming=True)


def test_chat_engines_answer_from_the_memory(index: MLPMemIndex) -> None:
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16).text
    assert str(index.as_chat_engine().chat(QUESTION)) == answer
    assert str(index.as_chat_engine(chat_mode=ChatMode.SIMPLE).chat(QUESTION)) == answer
    assert str(asyncio.run(index.as_chat_engine().achat(QUESTION))) == answer
    stream = index.as_chat_engine().stream_chat(QUESTION)
    assert "".join(stream.response_gen) == answer
    with pytest.raises(ConfigError, match="chat mode 'context' reads retrieved passages"):
        index.as_chat_engine(chat_mode=ChatMode.CONTEXT)


def test_it_can_be_a_tool(index: MLPMemIndex) -> None:
    tool = QueryEngineTool.from_defaults(index.as_query_engine(), name="memory")
    answer = index.llm.model.answer(QUESTION, max_new_tokens=16).text
    assert tool.call(QUESTION).content == answer
