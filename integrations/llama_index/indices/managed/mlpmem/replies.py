"""What a language model replied while a program made an object of it.

LlamaIndex's programs give the object alone; the reply's figures are in the event of the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.llms import callbacks

Reply = ChatResponse | CompletionResponse

_noted: ContextVar[list[Reply] | None] = ContextVar("mlpmem_replies", default=None)


class _Noting(BaseEventHandler):
    """Notes replies for the task or thread that asks for them."""

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "MLPMemReplies"

    def handle(self, event: BaseEvent, **_: Any) -> None:  # noqa: ANN401
        """Note a reply that is whole."""
        replies = _noted.get()
        if replies is None or not isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent):
            return
        if event.response is not None:
            replies.append(event.response)


@contextmanager
def noted_replies() -> Iterator[list[Reply]]:
    """The replies to calls within, in their order."""
    replies: list[Reply] = []
    token = _noted.set(replies)
    try:
        yield replies
    finally:
        _noted.reset(token)


callbacks.dispatcher.add_event_handler(_Noting())
