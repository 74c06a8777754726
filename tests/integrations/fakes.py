"""Language models that say what a test has written for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch
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
from transformers import LogitsProcessor


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


class Script(LogitsProcessor):
    """Has a model say texts, one after the other, whatever it was asked."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:  # noqa: ANN401
        end = int(tokenizer.eos_token_id)
        self._texts = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts
        ]
        self._left: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._left:
            self._left = list(self._texts.pop(0))
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._left.pop(0)] = 0.0
        return forced
