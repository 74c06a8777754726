"""Memory and RAG together: passages are found, and memory and reader agree on an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import (
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)

from mlpmem_eval.answerers import Reply, source_documents
from mlpmem_rag.memory_model import MemoryModel

dispatcher = get_dispatcher(__name__)


@dataclass(frozen=True)
class AgreedAnswerer:
    """`MemoryModel.answer` with passages.

    Nothing of the answer is certain before its end, so the first token counts as coming then.

    Attributes:
        name: of the arm.
        memory: remembers and reads.
        retriever: finds the passages.
        max_new_tokens: most tokens of each of the two answers.
        settings: what decides its answers.
    """

    name: str
    memory: MemoryModel
    retriever: BaseRetriever
    max_new_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    def answer(self, question: str) -> Reply:
        """Retrieve, remember, read, agree."""
        nodes = self.retriever.retrieve(question)
        dispatcher.event(
            LLMCompletionStartEvent(prompt=question, additional_kwargs={}, model_dict={})
        )
        answer = self.memory.answer(
            question,
            max_new_tokens=self.max_new_tokens,
            passages=[node.node.get_content() for node in nodes],
        )
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.new_tokens,
        }
        response = CompletionResponse(text=answer.text, raw={"usage": usage})
        dispatcher.event(LLMCompletionEndEvent(prompt=question, response=response))
        return Reply(answer.text, answer.confidence, source_documents(nodes))
