"""The library's sentence encoder as a LlamaIndex embedding model."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from mlpmem_rag.query import QueryEncoder


class EncoderEmbedding(BaseEmbedding):
    """What retrieval and memory see of a text is then the same."""

    _encoder: QueryEncoder = PrivateAttr()

    def __init__(self, encoder: QueryEncoder, **fields: Any) -> None:  # noqa: ANN401
        super().__init__(**{"model_name": encoder.name, "embed_batch_size": 128, **fields})
        self._encoder = encoder

    @classmethod
    def class_name(cls) -> str:
        """Its name in LlamaIndex."""
        return "EncoderEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._encoder.encode(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)
