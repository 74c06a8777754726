"""A memory as a LlamaIndex index: train on documents, ask without retrieval."""

from __future__ import annotations

from mlpmem_rag.errors import MissingDependencyError

try:
    import llama_index.core  # noqa: F401  the name llama_index alone is always there
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "LlamaIndex is not installed; pip install 'mlpmem-rag[llama-index]'"
    ) from error

from llama_index.indices.managed.mlpmem.base import MLPMemIndex
from llama_index.indices.managed.mlpmem.hybrid import MemoryFirstQueryEngine, ThresholdFit
from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.reading import MemoryRAGQueryEngine, RecallQueryEngine
from llama_index.indices.managed.mlpmem.recalling import RecallRetriever

__all__ = [
    "MLPMemIndex",
    "MemoryFirstQueryEngine",
    "MemoryQueryEngine",
    "MemoryRAGQueryEngine",
    "RecallQueryEngine",
    "RecallRetriever",
    "ThresholdFit",
]
