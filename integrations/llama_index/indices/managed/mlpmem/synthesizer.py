"""From a question to a response: the memory answers, nothing is put into its prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import (
    SynthesizeEndEvent,
    SynthesizeStartEvent,
)
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.response_synthesizers import Generation
from llama_index.core.schema import NodeWithScore, QueryType
from llama_index_instrumentation import get_dispatcher

from llama_index.indices.managed.mlpmem.refused import check_question
from llama_index.indices.managed.mlpmem.replies import Reply, noted_replies
from llama_index.llms.mlpmem import MLPMemLLM
from llama_index.llms.mlpmem.messages import to_messages, with_system
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.prompts import Message

dispatcher = get_dispatcher(__name__)

KEY = "mlpmem"
"""Where a response's metadata tells how the answer came about."""

Details = dict[str, Any]


class MemorySynthesizer(Generation):
    """`Generation` that keeps what the memory says of its answer."""

    def __init__(
        self,
        llm: MLPMemLLM,
        *,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        simple_template: BasePromptTemplate | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if streaming and output_cls is not None:
            raise ConfigError("output_cls needs the whole answer: it does not go with streaming")
        super().__init__(llm=llm, simple_template=simple_template, streaming=streaming)
        if callback_manager is not None:
            self._callback_manager = callback_manager
        self._memory_llm = llm
        self._output_cls = output_cls

    @dispatcher.span
    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,  # noqa: ANN401  passed to the prompt template
    ) -> RESPONSE_TYPE:
        """Answer; the nodes are the response's sources and nothing else."""
        text = query if isinstance(query, str) else query.query_str
        dispatcher.event(SynthesizeStartEvent(query=query))
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: text}
        ) as event:
            response = self._respond(text, response_kwargs)
            response.source_nodes = [*nodes, *(additional_source_nodes or [])]
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    @dispatcher.span
    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,  # noqa: ANN401  passed to the prompt template
    ) -> RESPONSE_TYPE:
        """Like `synthesize`; the event loop stays free."""
        text = query if isinstance(query, str) else query.query_str
        dispatcher.event(SynthesizeStartEvent(query=query))
        with self._callback_manager.event(
            CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: text}
        ) as event:
            response = await self._arespond(text, response_kwargs)
            response.source_nodes = [*nodes, *(additional_source_nodes or [])]
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    def read(self, text: str) -> list[Message]:
        """What the model reads when it is asked a text; empty where a form is asked for too."""
        if self._output_cls is not None:
            return []
        return to_messages(with_system(self._messages(text, {}), self._memory_llm.system_prompt))

    def _respond(self, text: str, kwargs: dict[str, Any]) -> RESPONSE_TYPE:
        check_question(text)
        details = self._details()
        if self._output_cls is not None:
            with noted_replies() as replies:
                value = self._llm.structured_predict(
                    self._output_cls, self._template, {"asked": text}, query_str=text
                )
            _note(details, *replies)
            return PydanticResponse(value, metadata={KEY: details})
        messages = self._messages(text, kwargs)
        if self._streaming:
            tokens = _tokens(self._llm.stream_chat(messages), details)
            return StreamingResponse(tokens, metadata={KEY: details})
        reply = self._llm.chat(messages)
        _note(details, reply)
        return Response(reply.message.content or "", metadata={KEY: details})

    async def _arespond(self, text: str, kwargs: dict[str, Any]) -> RESPONSE_TYPE:
        check_question(text)
        details = self._details()
        if self._output_cls is not None:
            with noted_replies() as replies:
                value = await self._llm.astructured_predict(
                    self._output_cls, self._template, {"asked": text}, query_str=text
                )
            _note(details, *replies)
            return PydanticResponse(value, metadata={KEY: details})
        messages = self._messages(text, kwargs)
        if self._streaming:
            tokens = _atokens(await self._llm.astream_chat(messages), details)
            return AsyncStreamingResponse(tokens, metadata={KEY: details})
        reply = await self._llm.achat(messages)
        _note(details, reply)
        return Response(reply.message.content or "", metadata={KEY: details})

    @property
    def _template(self) -> PromptTemplate:
        # A copy: programs set their output parser on what they are given, here a shared default.
        assert isinstance(self._input_prompt, PromptTemplate)
        return self._input_prompt.model_copy()

    def _messages(self, text: str, kwargs: dict[str, Any]) -> list[ChatMessage]:
        return self._input_prompt.format_messages(llm=self._llm, query_str=text, **kwargs)

    def _details(self) -> Details:
        return {"route": "memory", "confidence": None, "lambda": self._memory_llm.mixing_weight}


def _tokens(
    replies: Generator[ChatResponse, None, None], details: Details
) -> Generator[str, None, None]:
    with closing(replies):
        for reply in replies:
            if reply.raw is not None:
                _note(details, reply)
            yield reply.delta or ""


async def _atokens(
    replies: AsyncGenerator[ChatResponse, None], details: Details
) -> AsyncGenerator[str, None]:
    async with aclosing(replies):
        async for reply in replies:
            if reply.raw is not None:
                _note(details, reply)
            yield reply.delta or ""


def _note(details: Details, *replies: Reply) -> None:
    """What is known of an answer when it is whole."""
    for reply in replies:
        raw = reply.raw or {}
        details.update(raw.get(KEY, {}))
        details["usage"] = raw.get("usage", {})


def details_of(response: RESPONSE_TYPE) -> Details:
    """How an answer came about; empty for a response of another engine."""
    found: Details = (response.metadata or {}).get(KEY, {})
    return found


def answer_of(response: RESPONSE_TYPE) -> str:
    """The text of an answer, of an object its values; a stream is read to its end.

    LlamaIndex says "None" for an answer without text.
    """
    if isinstance(response, PydanticResponse):
        value = response.response
        return "" if value is None else " ".join(_values(value.model_dump()))
    assert not isinstance(response, AsyncStreamingResponse)  # it is waited for before
    whole = response if isinstance(response, Response) else response.get_response()
    return whole.response or ""


def _values(value: Any) -> Iterator[str]:  # noqa: ANN401
    """What an object holds, without the names of its fields."""
    if isinstance(value, dict | list | tuple | set):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _values(part)
    elif value is not None:
        yield str(value)
