"""Conversations with a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer

from llama_index.indices.managed.mlpmem.refused import check_chat_mode, refuse_unknown
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ConfigError


def chat_engine(
    mode: ChatMode,
    llm: MLPMemLLM,
    query_engine: Callable[..., BaseQueryEngine],
    memory: BaseMemory,
    system_prompt: str | None,
    kwargs: dict[str, Any],
) -> BaseChatEngine:
    """An engine for a chat mode; `kwargs` are of the query engine that it asks.

    Raises:
        ConfigError: a mode that reads passages, or an argument that would have no effect.
    """
    check_chat_mode(mode)
    if mode == ChatMode.SIMPLE:
        refuse_unknown(kwargs, ("llm, memory, chat_history, system_prompt",), "simple chat")
        return SimpleChatEngine.from_defaults(memory=memory, system_prompt=system_prompt, llm=llm)
    if system_prompt is not None:
        raise ConfigError("system_prompt is for chat_mode='simple'; elsewhere set it on an llm")
    return CondenseQuestionChatEngine.from_defaults(
        query_engine=query_engine(llm=llm, **kwargs),
        memory=memory,
        # Rewording is the base model's work: the memory would answer instead.
        llm=llm.model_copy(update={"lambda_": 0.0}),
    )


def conversation(llm: MLPMemLLM, history: list[ChatMessage] | None) -> ChatMemoryBuffer:
    """As much as the model can read and answer, counted in its own tokens."""
    metadata, tokenizer = llm.metadata, llm.model.tokenizer
    return ChatMemoryBuffer.from_defaults(
        chat_history=history or [],
        token_limit=metadata.context_window - metadata.num_output,
        tokenizer_fn=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
