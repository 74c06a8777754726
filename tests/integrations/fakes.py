"""Language models that say what a test has written for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import MockLLM


class ScriptedLLM(MockLLM):
    """Says its texts one after the other."""

    texts: list[str] = Field(default_factory=list)
    asked: list[str] = Field(default_factory=list)

    def __init__(self, texts: list[str]) -> None:
        super().__init__(is_chat_model=True)
        self.texts = list(texts)

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True)

    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:  # noqa: ANN401
        self.asked.append(prompt)
        return CompletionResponse(text=self.texts.pop(0))

    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:  # noqa: ANN401
        self.asked.append(str(messages[-1].content))
        message = ChatMessage(role=MessageRole.ASSISTANT, content=self.texts.pop(0))
        return ChatResponse(message=message)

    async def astream_chat(
        self,
        messages: Sequence[ChatMessage],
        **_: Any,  # noqa: ANN401
    ) -> ChatResponseAsyncGen:
        reply = self.chat(messages)

        async def one() -> AsyncGenerator[ChatResponse, None]:
            yield reply.model_copy(update={"delta": reply.message.content})

        return one()
