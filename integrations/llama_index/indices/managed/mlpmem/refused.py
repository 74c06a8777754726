"""What a memory cannot do as a vector store does, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms.utils import LLMType
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.storage.storage_context import StorageContext
from llama_index.core.vector_stores.simple import SimpleVectorStore

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
    "insert_batch_size": _NO_VECTORS,
    "store_nodes_override": "nodes are always stored",
}


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Refuse arguments that would have no effect.

    Raises:
        ConfigError: there are some; each is named with the reason.
    """
    if unknown := sorted(set(given)):
        named = "; ".join(f"{name} ({REASONS.get(name, 'not known')})" for name in unknown)
        raise ConfigError(f"{what} does not take {named}; allowed are {', '.join(allowed)}")


def refuse_native(given: Iterable[str]) -> None:
    """Refuse a vector store index's own arguments.

    Raises:
        ConfigError: there are some; each is named with the reason.
    """
    if native := sorted(set(given) & set(REASONS)):
        named = "; ".join(f"{name} ({REASONS[name]})" for name in native)
        raise ConfigError(f"MLPMemIndex does not take {named}; leave them out")


def check_stores(context: StorageContext | None) -> None:
    """Refuse a vector store of one's own, which would stay empty.

    Raises:
        ConfigError: there is one.
    """
    stores = {} if context is None else context.vector_stores
    for store in stores.values():
        if not isinstance(store, SimpleVectorStore):  # every context brings these
            raise ConfigError(
                f"storage_context has a {type(store).__name__}: a memory neither writes vectors "
                "nor reads them; give StorageContext.from_defaults(docstore=..., index_store=...) "
                "with the stores that are to hold nodes and index"
            )


def check_loading(llm: LLMType | None, fields: Iterable[str], **training: object) -> None:
    """Refuse arguments without effect on a memory that is there already.

    Raises:
        ConfigError: arguments of a training, or fields for an LLM when one is given.
    """
    if unused := [name for name, value in training.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(unused)} would have no effect: nothing is trained when an index is "
            "loaded; give it to from_documents or retrain, or leave it out"
        )
    if llm is not None and (unused := sorted(fields)):
        raise ConfigError(
            f"{', '.join(unused)} would have no effect beside llm, which has its own; give llm "
            "with these settings, or leave llm out"
        )


def check_fields(fields: Iterable[str]) -> None:
    """Refuse to change what was loaded.

    Raises:
        ConfigError: a field that needs another memory or base model.
    """
    if fixed := sorted(set(fields) & {"memory", "base_model"}):
        raise ConfigError(
            f"{', '.join(fixed)} cannot be changed: as_llm shares the index's loaded model; give "
            "it to MLPMemIndex.load, or load another with MLPMemLLM"
        )


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


def check_chat_mode(mode: ChatMode | str) -> ChatMode:
    """Refuse chat modes that read passages, that LlamaIndex has removed, or that are none.

    Raises:
        ConfigError: it is another than best, condense_question and simple.
    """
    name = mode.value if isinstance(mode, ChatMode) else mode
    if name not in [member.value for member in ChatMode]:
        raise ConfigError(
            f"chat mode {name!r} is not known; a memory chats in best, condense_question and simple"
        )
    if name not in (ChatMode.BEST, ChatMode.CONDENSE_QUESTION, ChatMode.SIMPLE):
        raise ConfigError(
            f"chat mode {name!r} reads retrieved passages or is an agent; a memory chats in "
            "best, condense_question and simple. For agents, give a QueryEngineTool to one"
        )
    return ChatMode(name)


def check_chat_attribution(attribution: str) -> None:
    """Refuse a laziness that does not last.

    Raises:
        ConfigError: it is `lazy`.
    """
    if attribution == "lazy":
        raise ConfigError(
            "attribution 'lazy' would have no effect: LlamaIndex's chat responses look at their "
            "sources at once; choose eager or none"
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
