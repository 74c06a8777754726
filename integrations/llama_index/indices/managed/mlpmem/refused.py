"""What a memory cannot do as a vector store does, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms.utils import LLMType
from llama_index.core.response_synthesizers import ResponseMode

from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_rag.errors import ConfigError

_NO_PASSAGES = "no passages are put into the prompt; simple_template changes the prompt"
_NO_VECTORS = "there are no vectors to choose from"
REASONS = {
    "text_qa_template": _NO_PASSAGES,
    "refine_template": _NO_PASSAGES,
    "summary_template": _NO_PASSAGES,
    "use_async": "there is one call only; use aquery",
    "response_synthesizer": "the memory is asked by its own; response modes are for passages",
    "filters": _NO_VECTORS,
    "vector_store_query_mode": _NO_VECTORS,
    "alpha": _NO_VECTORS,
    "node_ids": _NO_VECTORS,
    "doc_ids": _NO_VECTORS,
    "embed_model": "sources are found with the memory's own encoder",
    "vector_store": "the memory itself is the store",
}


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Refuse arguments that would have no effect.

    Raises:
        ConfigError: there are some; each is named with the reason.
    """
    if unknown := sorted(set(given)):
        named = "; ".join(f"{name} ({REASONS.get(name, 'not known')})" for name in unknown)
        raise ConfigError(f"{what} does not take {named}; allowed are {', '.join(allowed)}")


def check_response_mode(mode: ResponseMode | str) -> None:
    """Refuse every mode that reads passages.

    Raises:
        ConfigError: it is not `generation`.
    """
    if mode != ResponseMode.GENERATION:
        name = mode.value if isinstance(mode, ResponseMode) else mode
        raise ConfigError(
            f"response mode {name!r} reads retrieved passages, and a memory has none; leave "
            "response_mode out, or put a VectorStoreIndex behind MemoryFirstQueryEngine"
        )


def check_chat_mode(mode: ChatMode) -> None:
    """Refuse chat modes that read passages, or that LlamaIndex has removed.

    Raises:
        ConfigError: it is another than best, condense_question and simple.
    """
    if mode not in (ChatMode.BEST, ChatMode.CONDENSE_QUESTION, ChatMode.SIMPLE):
        raise ConfigError(
            f"chat mode {mode.value!r} reads retrieved passages or is an agent; a memory chats in "
            "best, condense_question and simple. For agents, give a QueryEngineTool to one"
        )


def check_question(text: str) -> None:
    """Refuse to ask nothing.

    Raises:
        ConfigError: the question is empty.
    """
    if not text.strip():
        raise ConfigError("the question is empty; ask something")


def check_own(llm: LLMType, folder: Path) -> MLPMemLLM:
    """Refuse an LLM that does not hold the memory of this folder.

    Raises:
        ConfigError: it is another kind of LLM, or holds another memory.
    """
    if not isinstance(llm, MLPMemLLM):
        raise ConfigError(
            f"llm is a {type(llm).__name__}: a memory answers through its own base model "
            "only; give index.as_llm(...), or nothing"
        )
    theirs = llm.model.folder
    if theirs is None or theirs.resolve() != folder.resolve():
        raise ConfigError(
            f"llm answers from the memory {theirs}, the index has {folder}; give "
            "index.as_llm(...), or nothing"
        )
    return llm
