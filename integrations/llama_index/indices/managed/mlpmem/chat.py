"""How much of a conversation a memory is shown."""

from __future__ import annotations

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import Memory

from llama_index.llms.mlpmem import MLPMemLLM


def conversation(llm: MLPMemLLM, history: list[ChatMessage] | None) -> Memory:
    """As much as the model can read and answer, counted in its own tokens."""
    metadata, tokenizer = llm.metadata, llm.model.tokenizer
    return Memory.from_defaults(
        chat_history=history or [],
        token_limit=metadata.context_window - metadata.num_output,
        tokenizer_fn=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
