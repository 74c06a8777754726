"""The query engine of a memory: it answers first, and looks for sources afterwards."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing

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

from llama_index.indices.managed.mlpmem.attribution import AnsweredQuery, AttributionRetriever
from llama_index.indices.managed.mlpmem.lazy import LazyNodes
from llama_index.indices.managed.mlpmem.synthesizer import (
    Details,
    MemorySynthesizer,
    answer_of,
    details_of,
)
from mlpmem_rag.errors import ConfigError

dispatcher = get_dispatcher(__name__)

ATTRIBUTIONS = ("none", "lazy", "eager")


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
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if attribution not in ATTRIBUTIONS:
            raise ConfigError(
                f"attribution {attribution!r} is not known; choose {', '.join(ATTRIBUTIONS)}"
            )
        super().__init__(retriever, synthesizer, node_postprocessors, callback_manager)
        self._attribution = attribution
        self._sources = retriever
        self._asking = synthesizer

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
                self._finish(query_bundle, response, answer_of(response))
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
                await self._afinish(query_bundle, response, answer_of(response))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _finish(self, query: QueryBundle, response: RESPONSE_TYPE, answer: str) -> None:
        """Sources, and what has gone stale, for an answer that is whole."""
        asked = self._answered(query, answer)
        if self._attribution == "eager":
            response.source_nodes[:] = self.retrieve(asked)  # a chat holds this very list
        else:
            self._promise(response, asked)
        self._tell(details_of(response), asked)

    async def _afinish(self, query: QueryBundle, response: RESPONSE_TYPE, answer: str) -> None:
        asked = self._answered(query, answer)
        if self._attribution == "eager":
            response.source_nodes[:] = await self.aretrieve(asked)
        else:
            self._promise(response, asked)
        await asyncio.to_thread(self._tell, details_of(response), asked)

    def _answered(self, query: QueryBundle, answer: str) -> AnsweredQuery:
        messages = self._asking.read(query.query_str)
        return AnsweredQuery(query.query_str, answer=answer, messages=messages)

    def _promise(self, response: RESPONSE_TYPE, asked: AnsweredQuery) -> None:
        if self._attribution == "lazy":
            response.source_nodes = LazyNodes(lambda: self.retrieve(asked))  # type: ignore[assignment]

    def _tell(self, details: Details, asked: AnsweredQuery) -> None:
        found = self._sources.attribution
        details["attribution"] = "none" if self._attribution == "none" else found.label(asked)
        details.update(found.staleness(asked, self._sources.similarity_top_k))

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
