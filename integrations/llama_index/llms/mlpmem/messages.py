"""LlamaIndex's messages as those of a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.prompts import Message, asked_text, check_asked

# Most templates know three roles only.
ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Text and role of each; system messages at the beginning become one.

    Raises:
        ConfigError: a message holds something other than text.
    """
    out: list[Message] = []
    for message in messages:
        role, text = ROLES.get(message.role, "user"), message_text(message)
        if len(out) == 1 and role == out[0]["role"] == "system":
            out[0]["content"] += f"\n\n{text}"
        else:
            out.append({"role": role, "content": text})
    return out


def asked_of(messages: Sequence[ChatMessage]) -> str:
    """What a conversation asks: the user's last message.

    Raises:
        ConfigError: there is no message, the last one is empty, or one holds something other
            than text.
    """
    ours = to_messages(messages)
    check_asked(ours)
    return asked_text(ours)


def message_text(message: ChatMessage) -> str:
    """The text of a message.

    Raises:
        ConfigError: it holds something else, such as an image.
    """
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise ConfigError(
                f"a message holds a {type(block).__name__}; this language model reads text only"
            )
    return message.content or ""


def with_system(messages: Sequence[ChatMessage], system_prompt: str | None) -> list[ChatMessage]:
    """The LLM's own system prompt in front, unless it is there already.

    LlamaIndex puts it there itself on some of its ways (`predict`), and not on others (`chat`).
    """
    if not system_prompt:
        return list(messages)
    first = messages[0] if messages else None
    if first and first.role == MessageRole.SYSTEM and first.content == system_prompt:
        return list(messages)
    return [ChatMessage(role=MessageRole.SYSTEM, content=system_prompt), *messages]
