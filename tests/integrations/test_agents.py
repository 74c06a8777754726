"""The memory inside LlamaIndex's agents: as their language model, and as their tool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool, QueryEngineTool

from llama_index.indices.managed.mlpmem import MLPMemIndex

from .fakes import Script

QUESTION = "Who found wild honey in the old mill?"
RIGHT = "Ines Maro"
SURE = "Did Ines Maro find a map of the tunnels?"

# LlamaIndex's agents use old names of pydantic and of their own workflows.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("open_loop"),
]


@pytest.fixture
def tool(index: MLPMemIndex) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        index.as_query_engine(), name="documents", description="Answers about the documents."
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_it_drives_a_react_agent(index: MLPMemIndex, streaming: bool) -> None:
    said = Script(
        index.llm.model.tokenizer,
        'Thought: I look.\nAction: shout\nAction Input: {"text": "honey"}',
        "Thought: I can answer without using any more tools.\nAnswer: HONEY!",
    )
    llm = index.as_llm(max_new_tokens=200, logits_processor=said)

    def shout(text: str) -> str:
        """Say it louder."""
        return f"{text.upper()}!"

    async def run() -> tuple[list[Any], Any]:
        agent = ReActAgent(tools=[FunctionTool.from_defaults(shout)], llm=llm, streaming=streaming)
        handler = agent.run("Shout honey.")
        events = [event async for event in handler.stream_events()]
        return events, await handler

    events, response = asyncio.run(run())
    assert str(response) == "HONEY!"
    (called,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert (called.tool_kwargs, called.tool_output.content) == ({"text": "honey"}, "HONEY!")


def calls_once(question: str) -> MockFunctionCallingLLM:
    """A function-calling model that asks the documents, and repeats what they say."""

    def respond(messages: Sequence[ChatMessage], **given: Any) -> ChatMessage:  # noqa: ANN401
        last = messages[-1]
        if last.role == MessageRole.TOOL:
            return ChatMessage(f"It was {last.content}.", role=MessageRole.ASSISTANT)
        (tool,) = given["tools"]
        call = ToolCallBlock(
            tool_call_id="1", tool_name=tool.metadata.name, tool_kwargs={"input": question}
        )
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=[call])

    return MockFunctionCallingLLM(response_generator=respond, is_chat_model=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_another_models_agent_has_it_as_a_tool(tool: QueryEngineTool, streaming: bool) -> None:
    async def run() -> tuple[list[Any], Any]:
        agent = FunctionAgent(tools=[tool], llm=calls_once(QUESTION), streaming=streaming)
        handler = agent.run("Who had the honey?")
        events = [event async for event in handler.stream_events()]
        return events, await handler

    events, response = asyncio.run(run())
    (called,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert (called.tool_name, called.tool_kwargs) == ("documents", {"input": QUESTION})
    assert called.tool_output.content == RIGHT
    assert called.tool_output.raw_output.metadata["mlpmem"]["route"] == "memory"
    assert str(response) == f"It was {RIGHT}."
