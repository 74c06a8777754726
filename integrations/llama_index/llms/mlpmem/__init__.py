"""A memory and its base model as a LlamaIndex LLM."""

from __future__ import annotations

from mlpmem_rag.errors import MissingDependencyError

try:
    import llama_index.core  # noqa: F401  the name llama_index alone is always there
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "LlamaIndex is not installed; pip install 'mlpmem-rag[llama-index]'"
    ) from error

from llama_index.llms.mlpmem.base import MLPMemLLM

__all__ = ["MLPMemLLM"]
