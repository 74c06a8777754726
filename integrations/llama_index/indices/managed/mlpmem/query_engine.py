"""The query engine of a memory: it answers first, and looks for sources afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import QueryBundle
from llama_index.core.types import TokenAsyncGen, TokenGen
from llama_index_instrumentation import get_dispatcher

from llama_index.indices.managed.mlpmem.attribution import (
    AnsweredQuery,
    AttributionRetriever,
    LazyNodes,
)
from llama_index.indices.managed.mlpmem.synthesizer import (
    Details,
    MemorySynthesizer,
    details_of,
)
from mlpmem_rag.errors import ConfigError

dispatcher = get_dispatcher(__name__)

ATTRIBUTIONS = ("none", "lazy", "eager")

StaleSources = Callable[[str, str], dict[str, Any]]
"""From question and answer: which documents are stale, and which of them the answer touches."""


class MemoryQueryEngine(RetrieverQueryEngine):
    """Question to memory to response, whose metadata tells how sure the answer is.

    `response.metadata["mlpmem"]`: `route`, `confidence` (None where the memory cannot tell),
    `lambda`, `attribution` (how the sources were found), `stale_documents` (id -> what happened to
    them since the training), `touched_stale` (those of them that this answer has to do with),
    `usage`, `seconds`, `ttft_seconds`. Of a stream it is whole when the stream has ended.

    Args:
        retriever: finds the sources of an answer.
        synthesizer: asks the memory.
        attribution: `none`: no sources; `lazy`: looked for when `source_nodes` is looked at;
            `eager`: with each answer.
        stale: tells what has changed since the training.
        node_postprocessors: applied to the sources.
        callback_manager: LlamaIndex's callbacks.

    Raises:
        ConfigError: another attribution.
    """

    def __init__(
        self,
        retriever: AttributionRetriever,
        synthesizer: MemorySynthesizer,
        *,
        attribution: str,
        stale: StaleSources,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if attribution not in ATTRIBUTIONS:
            raise ConfigError(
                f"attribution {attribution!r} is not known; choose {', '.join(ATTRIBUTIONS)}"
            )
        super().__init__(retriever, synthesizer, node_postprocessors, callback_manager)
        self._attribution = attribution
        self._found = retriever.attribution
        self._stale = stale

    @dispatcher.span
    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = self._response_synthesizer.synthesize(query=query_bundle, nodes=[])
            if isinstance(response, StreamingResponse):
                response.response_gen = self._finishing(
                    query_bundle, response, response.response_gen
                )
            else:
                self._finish(query_bundle, response, str(response))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    @dispatcher.span
    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = await self._response_synthesizer.asynthesize(query=query_bundle, nodes=[])
            if isinstance(response, AsyncStreamingResponse):
                response.response_gen = self._afinishing(
                    query_bundle, response, response.response_gen
                )
            else:
                await self._afinish(query_bundle, response, str(response))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _finish(self, query: QueryBundle, response: RESPONSE_TYPE, answer: str) -> None:
        """Sources, and what has gone stale, for an answer that is whole."""
        asked = AnsweredQuery(query.query_str, answer=answer)
        if self._attribution == "eager":
            response.source_nodes = self.retrieve(asked)
        elif self._attribution == "lazy":
            response.source_nodes = LazyNodes(lambda: self.retrieve(asked))  # type: ignore[assignment]
        self._tell(details_of(response), query.query_str, answer)

    async def _afinish(self, query: QueryBundle, response: RESPONSE_TYPE, answer: str) -> None:
        asked = AnsweredQuery(query.query_str, answer=answer)
        if self._attribution == "eager":
            response.source_nodes = await self.aretrieve(asked)
        elif self._attribution == "lazy":
            response.source_nodes = LazyNodes(lambda: self.retrieve(asked))  # type: ignore[assignment]
        await asyncio.to_thread(self._tell, details_of(response), query.query_str, answer)

    def _tell(self, details: Details, question: str, answer: str) -> None:
        details["attribution"] = "none" if self._attribution == "none" else self._found.label
        details.update(self._stale(question, answer))

    def _finishing(
        self, query: QueryBundle, response: StreamingResponse, tokens: TokenGen
    ) -> TokenGen:
        text = ""
        with closing(tokens):
            for token in tokens:
                text += token
                yield token
        self._finish(query, response, text)

    async def _afinishing(
        self, query: QueryBundle, response: AsyncStreamingResponse, tokens: TokenAsyncGen
    ) -> TokenAsyncGen:
        text = ""
        async with aclosing(tokens):
            async for token in tokens:
                text += token
                yield token
        await self._afinish(query, response, text)
