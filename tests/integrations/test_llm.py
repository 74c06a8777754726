"""MLPMemLLM: what LlamaIndex asks of an LLM, and what others get wrong."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.llms import ChatMessage

from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.memory_model import MemoryModel

QUESTION = "What was found in the old mill?"


@pytest.fixture
def llm(chat_model: MemoryModel) -> MLPMemLLM:
    return MLPMemLLM.from_model(chat_model, max_new_tokens=20)


def test_all_eight_calls_give_the_models_answer(llm: MLPMemLLM) -> None:
    expected = llm.model.answer(QUESTION, max_new_tokens=20).text
    assert expected
    messages = [ChatMessage(QUESTION)]
    assert llm.complete(QUESTION).text == expected
    assert llm.chat(messages).message.content == expected
    assert [r.text for r in llm.stream_complete(QUESTION)][-1] == expected
    assert [r.message.content for r in llm.stream_chat(messages)][-1] == expected

    async def asynchronously() -> list[str | None]:
        return [
            (await llm.acomplete(QUESTION)).text,
            (await llm.achat(messages)).message.content,
            [r.text async for r in await llm.astream_complete(QUESTION)][-1],
            [r.message.content async for r in await llm.astream_chat(messages)][-1],
        ]

    assert asyncio.run(asynchronously()) == [expected] * 4
