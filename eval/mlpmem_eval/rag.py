"""Retrieval-augmented generation by LlamaIndex: with its defaults, or another setting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_index.core import Document as IndexDocument
from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import LLM
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from mlpmem_rag.corpus import Document
from mlpmem_rag.passages import passages
from mlpmem_rag.reading import EXAMPLES, reading_prompt
from mlpmem_rag.storage import folder_bytes

NATIVE = "llama-index"
FEW_SHOT = "few-shot"
QUOTED = "quoted"


@dataclass(frozen=True)
class RagSetting:
    """What RAG is tuned by.

    Attributes:
        k: passages in the prompt.
        words: most words in a passage; 0: whole documents.
        prompt: `llama-index` (its default, in the model's chat form), or `few-shot` or `quoted`
            (examples in plain text, of which the first line of the answer counts).
    """

    k: int
    words: int
    prompt: str


CANDIDATES = (
    RagSetting(1, 25, FEW_SHOT),
    RagSetting(1, 50, FEW_SHOT),
    RagSetting(1, 100, FEW_SHOT),
    RagSetting(1, 0, FEW_SHOT),
    RagSetting(2, 25, FEW_SHOT),
    RagSetting(2, 50, FEW_SHOT),
    RagSetting(3, 25, FEW_SHOT),
    RagSetting(3, 50, FEW_SHOT),
    RagSetting(1, 50, QUOTED),
    RagSetting(1, 50, NATIVE),
    RagSetting(2, 100, NATIVE),
    RagSetting(3, 50, NATIVE),
)
"""What RAG's setting is chosen from."""


@dataclass(frozen=True)
class Indexed:
    """A vector index and what it took to make.

    Attributes:
        index: LlamaIndex's, in its default store.
        seconds: cutting, embedding and storing.
        num_bytes: of it on the disk, as LlamaIndex writes it.
    """

    index: VectorStoreIndex
    seconds: float
    num_bytes: int


def native_index(documents: Sequence[Document], embedding: BaseEmbedding, folder: Path) -> Indexed:
    """LlamaIndex's own way: `VectorStoreIndex.from_documents` with its defaults."""
    started = time.perf_counter()
    index = VectorStoreIndex.from_documents(
        [IndexDocument(id_=document.id, text=document.text) for document in documents],
        embed_model=embedding,
    )
    return _stored(index, time.perf_counter() - started, folder)


def passage_index(
    documents: Sequence[Document], embedding: BaseEmbedding, words: int, folder: Path
) -> Indexed:
    """Passages of whole sentences, at most so many words each; 0: whole documents."""
    started = time.perf_counter()
    nodes = [
        TextNode(
            id_=f"{document.id}#{number}",
            text=text,
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document.id)},
        )
        for document in documents
        for number, text in enumerate(passages(document.text, words) if words else [document.text])
    ]
    index = VectorStoreIndex(nodes, embed_model=embedding)
    return _stored(index, time.perf_counter() - started, folder)


def native_engine(index: VectorStoreIndex, llm: LLM) -> BaseQueryEngine:
    """The default query engine, as a stream."""
    return index.as_query_engine(llm=llm, streaming=True)


def tuned_engine(
    index: VectorStoreIndex, setting: RagSetting, chat_llm: LLM, plain_llm: LLM
) -> BaseQueryEngine:
    """A query engine of a setting.

    Args:
        index: of passages of the setting's size.
        setting: what is to be used.
        chat_llm: for LlamaIndex's prompt.
        plain_llm: the same model, which continues text as it stands.
    """
    if setting.prompt == NATIVE:
        return index.as_query_engine(llm=chat_llm, similarity_top_k=setting.k, streaming=True)
    return index.as_query_engine(
        llm=plain_llm,
        similarity_top_k=setting.k,
        text_qa_template=PromptTemplate(template_of(setting.prompt)),
        response_mode=ResponseMode.SIMPLE_SUMMARIZE,  # all passages in one prompt, a line each
        streaming=True,
    )


def template_of(prompt: str) -> str:
    """A prompt with `{context_str}` and `{query_str}` to be filled in."""
    if prompt == FEW_SHOT:
        return reading_prompt("{query_str}", ["{context_str}"])
    shots = "".join(f"{text}\n\nQ: {q}\nA: {answer}\n\n###\n\n" for text, q, answer in EXAMPLES)
    return shots + "{context_str}\n\nQ: {query_str}\nA:"


def _stored(index: VectorStoreIndex, seconds: float, folder: Path) -> Indexed:
    started = time.perf_counter()
    index.storage_context.persist(persist_dir=str(folder))
    return Indexed(index, seconds + time.perf_counter() - started, folder_bytes(folder))
