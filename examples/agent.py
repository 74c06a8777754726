"""An agent with the memory as a tool.

python examples/agent.py demo/index "Which constellation is Vega in?" --llm Qwen/Qwen3-4B

The agent's own model plans and words; it has to be one that keeps to a form, as models of a few
billion parameters do. What the documents say comes from the memory, in one call without passages.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from llama_index.core.agent.workflow import ReActAgent, ToolCallResult
from llama_index.core.llms import LLM
from llama_index.core.tools import QueryEngineTool
from llama_index.llms.huggingface import HuggingFaceLLM

from llama_index.indices.managed.mlpmem import MLPMemIndex


def memory_tool(index: MLPMemIndex) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(
        index.as_query_engine(attribution="none"),
        name="documents",
        description="Answers one short question about the documents.",
    )


async def ask(index: MLPMemIndex, llm: LLM, question: str) -> None:
    agent = ReActAgent(tools=[memory_tool(index)], llm=llm)
    handler = agent.run(question)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"{event.tool_name} {event.tool_kwargs} -> {event.tool_output.content}")
    print(await handler)


def main(
    index: Path,
    question: str,
    llm: Annotated[str, typer.Option(help="Folder or hub id; of the agent's own model.")],
) -> None:
    planner = HuggingFaceLLM(model_name=llm, tokenizer_name=llm, is_chat_model=True)
    asyncio.run(ask(MLPMemIndex.load(index), planner, question))


if __name__ == "__main__":
    typer.run(main)
