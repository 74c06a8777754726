"""Conversations with a memory."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.condense_question import DEFAULT_PROMPT
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.prompts import BasePromptTemplate

from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.refused import refuse_unknown
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ConfigError


class MemoryChatEngine(CondenseQuestionChatEngine):
    """Makes one question of a conversation; a stream's sources are there when it has ended."""

    def chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AgentChatResponse:
        """Answer."""
        return _told(super().chat(message, chat_history))

    async def achat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AgentChatResponse:
        """Like `chat`; the event loop stays free."""
        return _told(await super().achat(message, chat_history))

    def stream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer piece by piece."""
        return _with_sources(super().stream_chat(message, chat_history))

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like `stream_chat`; the event loop stays free."""
        return _with_sources(await super().astream_chat(message, chat_history))


def condensing_chat(
    query_engine: MemoryQueryEngine,
    llm: MLPMemLLM,
    memory: BaseMemory,
    prompt: BasePromptTemplate | None,
    verbose: bool,
    callback_manager: CallbackManager,
) -> MemoryChatEngine:
    """A chat that asks a query engine."""
    return MemoryChatEngine(
        query_engine,
        prompt or DEFAULT_PROMPT,
        memory,
        # Rewording is the base model's work: the memory would answer instead.
        llm.model_copy(update={"lambda_": 0.0}),
        verbose=verbose,
        callback_manager=callback_manager,
    )


def simple_chat(
    llm: MLPMemLLM,
    memory: BaseMemory,
    system_prompt: str | None,
    callback_manager: CallbackManager,
    unknown: dict[str, Any],
) -> SimpleChatEngine:
    """A chat that continues the conversation, without sources.

    Raises:
        ConfigError: an argument that would have no effect.
    """
    allowed = ("llm, memory, chat_history, system_prompt, verbose, callback_manager",)
    refuse_unknown(unknown, allowed, "simple chat")
    role = llm.metadata.system_role
    prefix = [] if system_prompt is None else [ChatMessage(content=system_prompt, role=role)]
    return SimpleChatEngine(llm, memory, prefix, callback_manager)


def conversation(
    llm: MLPMemLLM, memory: BaseMemory | None, history: list[ChatMessage] | None
) -> BaseMemory:
    """A memory of the conversation: the one given, else one of what the model can read and answer.

    Raises:
        ConfigError: both a memory and a history are given.
    """
    if memory is not None and history is not None:
        raise ConfigError(
            "memory and chat_history are both given, and one would be left out; put the history "
            "into the memory (memory.set(chat_history)), or give one of them"
        )
    if memory is not None:
        return memory
    metadata, tokenizer = llm.metadata, llm.model.tokenizer
    return ChatMemoryBuffer.from_defaults(
        chat_history=history or [],
        token_limit=metadata.context_window - metadata.num_output,
        tokenizer_fn=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )


def _with_sources(response: StreamingAgentChatResponse) -> StreamingAgentChatResponse:
    """The list that the query engine fills at the end: LlamaIndex has copied it before."""
    (tool,) = response.sources
    response.source_nodes = tool.raw_output.source_nodes
    return response


def _told(response: AgentChatResponse) -> AgentChatResponse:
    """With what the query engine has told of its answer."""
    (tool,) = response.sources
    response.metadata = tool.raw_output.metadata
    return response
