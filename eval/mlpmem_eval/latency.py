"""Where the time of an answer goes, from LlamaIndex's instrumentation events.

The same for every arm: retrieval is what lies between the retrieval events, prefill goes from the
start of a call of the LLM to its first piece of text, decode from there to its end. What is left
of the wall time (prompts put together, say) is `other`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers.base import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.instrumentation.events.retrieval import (
    RetrievalEndEvent,
    RetrievalStartEvent,
)
from pydantic import PrivateAttr

from mlpmem_rag.threads import release_threads

Clock = Callable[[], float]
T = TypeVar("T")

LLM_STARTS = (LLMChatStartEvent, LLMCompletionStartEvent)
LLM_PIECES = (LLMChatInProgressEvent, LLMCompletionInProgressEvent)
LLM_ENDS = (LLMChatEndEvent, LLMCompletionEndEvent)


@dataclass(frozen=True)
class Timing:
    """One answer in seconds and tokens.

    Attributes:
        total: from the question to the end of the answer.
        ttft: from the question to the first piece of the text that is given.
        retrieval: finding passages.
        embedding: of that, turning the question into a vector; the same for any corpus.
        prefill: reading prompts, to the first piece of text each.
        decode: generating after that.
        prompt_tokens: over all calls of the LLM; None where it does not tell.
        completion_tokens: likewise.
        llm_calls: number of calls of the LLM.
    """

    total: float
    ttft: float
    retrieval: float
    embedding: float
    prefill: float
    decode: float
    prompt_tokens: int | None
    completion_tokens: int | None
    llm_calls: int

    @property
    def other(self) -> float:
        """What the events do not account for."""
        return self.total - self.retrieval - self.prefill - self.decode


@dataclass
class _Spans:
    """Events of one answer, folded as they come; a call inside a call counts once."""

    clock: Clock
    retrieval: float = 0.0
    embedding: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    calls: int = 0
    seen: float | None = None
    first_piece: float | None = None
    usage: dict[str, int] = field(default_factory=dict)
    _retrievals: int = 0
    _llms: int = 0
    _since: float = 0.0
    _embedding: float = 0.0
    _started: float = 0.0
    _piece: float | None = None

    def take(self, event: BaseEvent, now: float) -> None:
        if isinstance(event, RetrievalStartEvent):
            self._since = now if self._retrievals == 0 else self._since
            self._retrievals += 1
        elif isinstance(event, RetrievalEndEvent):
            self._retrievals -= 1
            self.retrieval += now - self._since if self._retrievals == 0 else 0.0
        elif isinstance(event, EmbeddingStartEvent):
            self._embedding = now
        elif isinstance(event, EmbeddingEndEvent):
            self.embedding += now - self._embedding if self._retrievals else 0.0
        elif isinstance(event, LLM_STARTS):
            if self._llms == 0:
                self._started, self._piece = now, None
                self.calls += 1
            self._llms += 1
        elif isinstance(event, LLM_PIECES):
            self._piece = now if self._piece is None else self._piece
        elif isinstance(event, LLM_ENDS):
            self._llms -= 1
            if self._llms == 0:
                self._end(event, now)

    def _end(self, event: BaseEvent, now: float) -> None:
        piece = now if self._piece is None else self._piece
        self.prefill += piece - self._started
        self.decode += now - piece
        self.first_piece = piece
        for name, tokens in _usage(event).items():
            self.usage[name] = self.usage.get(name, 0) + tokens


def _usage(event: BaseEvent) -> dict[str, int]:
    """Token counts, where the LLM puts them as OpenAI does."""
    raw: Any = getattr(getattr(event, "response", None), "raw", None)
    usage = raw.get("usage") if isinstance(raw, dict) else getattr(raw, "usage", None)
    found = {}
    for name in ("prompt_tokens", "completion_tokens"):
        value = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
        if isinstance(value, int):
            found[name] = value
    return found


_current: ContextVar[_Spans | None] = ContextVar("mlpmem_eval_spans", default=None)


def text_seen() -> None:
    """Say that text of the answer has reached whoever asked.

    An engine that holds its first answer back, to give another if need be, has shown nothing when
    its LLM begins to write.
    """
    spans = _current.get()
    if spans is not None and spans.seen is None:
        spans.seen = spans.clock()


class LatencyRecorder(BaseEventHandler):
    """Hears LlamaIndex's events while a `with recording()` block runs."""

    _clock: Clock = PrivateAttr()
    _alone: _Spans | None = PrivateAttr(default=None)

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock

    @classmethod
    def class_name(cls) -> str:
        """Its name in LlamaIndex."""
        return "LatencyRecorder"

    def now(self) -> float:
        """Seconds on its clock."""
        return self._clock()

    def handle(self, event: BaseEvent, **_: Any) -> None:  # noqa: ANN401
        """Add an event to the answer that it belongs to."""
        if isinstance(event, LLM_STARTS):
            release_threads()  # of what embedded the question: each arm has all cores for its LLM
        # An engine that works in threads of its own loses the context; that is told apart only
        # as long as one answer is timed at a time.
        spans = _current.get() or self._alone
        if spans is not None:
            spans.take(event, self._clock())

    def timed(self, work: Callable[[], T], *, alone: bool = True) -> tuple[T, Timing]:
        """Do the work that gives one answer, to its last token.

        Args:
            work: asks and consumes the whole answer.
            alone: whether no other answer is timed at the same time.
        """
        spans = _Spans(self._clock)
        token = _current.set(spans)
        self._alone = spans if alone else None
        started = self._clock()
        try:
            result = work()
        finally:
            ended = self._clock()
            _current.reset(token)
            self._alone = None
        total = ended - started
        first = spans.first_piece if spans.seen is None else spans.seen
        return result, Timing(
            total=total,
            ttft=total if first is None else first - started,
            retrieval=spans.retrieval,
            embedding=spans.embedding,
            prefill=spans.prefill,
            decode=spans.decode,
            prompt_tokens=spans.usage.get("prompt_tokens"),
            completion_tokens=spans.usage.get("completion_tokens"),
            llm_calls=spans.calls,
        )


@contextmanager
def recording(clock: Clock = time.perf_counter) -> Iterator[LatencyRecorder]:
    """A recorder that hears every event until the block ends."""
    root = get_dispatcher()
    recorder = LatencyRecorder(clock)
    root.add_event_handler(recorder)
    try:
        yield recorder
    finally:
        root.event_handlers = [other for other in root.event_handlers if other is not recorder]
