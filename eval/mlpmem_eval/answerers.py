"""What can be compared: anything that answers a question.

An arm of one's own is a LlamaIndex query engine in a wrapper:

    engine = index.as_query_engine(llm=llm, streaming=True)
    arms = [QueryEngineAnswerer("mine", engine, {"k": 3})]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.llms import LLM

from mlpmem_eval.latency import text_seen


@dataclass(frozen=True)
class Reply:
    """What an arm says to one question.

    Attributes:
        text: the answer.
        confidence: probability that it is right, 0 to 1; None: the arm does not tell.
        documents: ids of the documents retrieved, nearest first; None: nothing is retrieved.
        route: which way the answer took, where an arm has several.
    """

    text: str
    confidence: float | None = None
    documents: tuple[str, ...] | None = None
    route: str | None = None


class Answerer(Protocol):
    """One arm of a comparison.

    Attributes:
        name: of the arm, unique in a comparison.
        settings: everything that decides its answers, as JSON values; an answer is only kept
            from an interrupted run where they are the same.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def settings(self) -> dict[str, Any]: ...  # noqa: D102

    def answer(self, question: str) -> Reply:
        """Answer to the last token; a stream is consumed here."""
        ...


@dataclass(frozen=True)
class QueryEngineAnswerer:
    """Any LlamaIndex query engine; make it with `streaming=True` to see the first token.

    Attributes:
        name: of the arm.
        engine: answers.
        settings: what decides its answers.
        first_line: whether only the first line of the text is the answer, without a full stop:
            for prompts that go on with further examples.
    """

    name: str
    engine: BaseQueryEngine
    settings: dict[str, Any] = field(default_factory=dict)
    first_line: bool = False

    def answer(self, question: str) -> Reply:
        """Query, and read the stream if there is one."""
        response: Any = self.engine.query(question)
        streamed = isinstance(response, StreamingResponse)
        text = "".join(_watched(response.response_gen)) if streamed else str(response)
        told = (response.metadata or {}).get("mlpmem", {})
        remembered = told.get("route") == "memory"
        kept = told.get("route") != "rag"  # else the memory was unsure, and RAG answers
        return Reply(
            text=_first_line(text) if self.first_line else text.strip(),
            confidence=told.get("confidence") if kept else None,
            documents=None if remembered else source_documents(response.source_nodes),
            route=told.get("route"),
        )


@dataclass(frozen=True)
class ChatAnswerer:
    """An LLM that is asked the bare question, as a user's message.

    Attributes:
        name: of the arm.
        llm: answers; a memory's `MLPMemLLM`, say.
        settings: what decides its answers.
    """

    name: str
    llm: LLM
    settings: dict[str, Any] = field(default_factory=dict)

    def answer(self, question: str) -> Reply:
        """Chat, and read the stream."""
        return _last(self.llm.stream_chat([ChatMessage(role=MessageRole.USER, content=question)]))


@dataclass(frozen=True)
class PromptAnswerer:
    """An LLM that continues a text in which the question stands; the first line is the answer.

    Attributes:
        name: of the arm.
        llm: continues text as it stands.
        prompt: makes the text of a question.
        settings: what decides its answers.
    """

    name: str
    llm: LLM
    prompt: Callable[[str], str]
    settings: dict[str, Any] = field(default_factory=dict)

    def answer(self, question: str) -> Reply:
        """Complete, and read the stream."""
        reply = _last(self.llm.stream_complete(self.prompt(question), formatted=True))
        return replace(reply, text=_first_line(reply.text))


def _last(stream: Iterable[Any]) -> Reply:
    """What a stream of responses ends with."""
    response: Any = None
    for response in stream:
        if response.delta:
            text_seen()
    if response is None:
        return Reply("")
    raw = response.raw if isinstance(response.raw, dict) else {}
    text = response.text if hasattr(response, "text") else response.message.content
    return Reply(str(text or "").strip(), confidence=raw.get("mlpmem", {}).get("confidence"))


def _watched(pieces: Iterable[str] | None) -> Iterator[str]:
    for piece in pieces or ():
        if piece:
            text_seen()
        yield piece


def source_documents(nodes: Sequence[Any]) -> tuple[str, ...]:
    """Ids of the documents that nodes are part of, each once."""
    ids: Iterable[str] = (str(node.node.ref_doc_id or node.node.node_id) for node in nodes)
    return tuple(dict.fromkeys(ids))


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip().rstrip(".")
