"""Memory first, retrieval where the memory is not sure or not up to date."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import QueryBundle
from llama_index_instrumentation import get_dispatcher

from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.indices.managed.mlpmem.synthesizer import KEY, Details, answer_of, details_of
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.scoring import token_f1

dispatcher = get_dispatcher(__name__)

RETRIEVED = "retrieved passages"
"""How the other engine's sources were found."""

_KEPT = ("confidence", "lambda", "stale_documents", "touched_stale")
_COSTS = ("usage", "seconds", "ttft_seconds")

Grade = Callable[[str, Sequence[str]], float]
"""How right an answer is, 0 to 1, given the right ones."""


@dataclass(frozen=True)
class ThresholdFit:
    """What a threshold gives on the questions it was fitted on.

    Attributes:
        threshold: confidence from which on the memory's answer is taken.
        right: mean grade of memory and retrieval together.
        memory: of the memory alone.
        rag: of retrieval alone.
        from_memory: share of the questions that the memory answers.
    """

    threshold: float
    right: float
    memory: float
    rag: float
    from_memory: float


class MemoryFirstQueryEngine(BaseQueryEngine):
    """Answers from a memory; asks another engine where that is not safe.

    The other engine is asked when the memory's confidence is below the threshold or unknown, and
    when the answer has to do with documents that changed since the training.
    `response.metadata["mlpmem"]` tells the `route` (`memory` or `rag`). With `rag` it also tells
    `why`, and what the memory's answer that was not given had cost, under `memory`.

    Args:
        memory_engine: from `MLPMemIndex.as_query_engine`.
        rag_engine: any query engine on the same documents.
        threshold: 0 (ask the other only for stale documents) to 1; see `fit_threshold`.
        callback_manager: LlamaIndex's callbacks.

    Raises:
        ConfigError: a threshold outside 0..1.
    """

    def __init__(
        self,
        memory_engine: MemoryQueryEngine,
        rag_engine: BaseQueryEngine,
        threshold: float = 0.5,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ConfigError(f"threshold = {threshold}: allowed are 0 to 1")
        self.threshold = threshold
        self._memory_engine = memory_engine
        self._rag_engine = rag_engine
        super().__init__(callback_manager or memory_engine.callback_manager)

    def fit_threshold(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        grade: Grade = token_f1,
    ) -> ThresholdFit:
        """Set the threshold to the one with the best answers; of equal ones, the lowest.

        Args:
            questions: each with its right answers; none that the memory was taught with.
            grade: how right an answer is. Token F1 has something for whole sentences, which
                retrieval with LlamaIndex's prompts answers in; exact match has nothing.

        Raises:
            ConfigError: there are no questions, or the memory has no confidence.
        """
        if not questions:
            raise ConfigError("there are no questions to fit a threshold on; give some")
        sure, memory, rag = [], [], []
        for question, references in questions:
            response = self._memory_engine.query(question)
            text = answer_of(response)  # a stream tells its confidence at its end
            confidence = details_of(response).get("confidence")
            if confidence is None:
                raise ConfigError(
                    "this memory gives no confidence to fit a threshold on; train one with the "
                    "self-study recipe and enough questions to calibrate"
                )
            sure.append(float(confidence))
            memory.append(float(grade(text, references)))
            rag.append(float(grade(answer_of(self._rag_engine.query(question)), references)))
        fit = best_threshold(sure, memory, rag)
        self.threshold = fit.threshold
        return fit

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"memory_engine": self._memory_engine, "rag_engine": self._rag_engine}

    @dispatcher.span
    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = self._memory_engine.query(query_bundle)
            if isinstance(response, StreamingResponse):
                response.response_gen = _again(answer_of(response))
                response.response_txt = None
            if why := self._why_not(details_of(response)):
                details = details_of(response)
                response = _routed(self._rag_engine.query(query_bundle), details, why)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    @dispatcher.span
    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(
            CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}
        ) as event:
            response = await self._memory_engine.aquery(query_bundle)
            if isinstance(response, AsyncStreamingResponse):
                response.response_gen = _aagain(answer_of(await response.get_response()))
                response.response_txt = None
            if why := self._why_not(details_of(response)):
                details = details_of(response)
                response = _routed(await self._rag_engine.aquery(query_bundle), details, why)
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _why_not(self, details: Details) -> str | None:
        """Why the memory's answer is not to be given; None: it is."""
        if touched := details.get("touched_stale"):
            stale = details["stale_documents"]
            return f"stale: {', '.join(f'{name} ({stale[name]})' for name in touched)}"
        confidence = details.get("confidence")
        if confidence is None:
            return "the memory cannot tell how sure it is" if self.threshold > 0 else None
        if confidence < self.threshold:
            return f"confidence {confidence:.3f} is below {self.threshold:.3f}"
        return None


def best_threshold(
    sure: Sequence[float], memory: Sequence[float], rag: Sequence[float]
) -> ThresholdFit:
    """The lowest threshold with the largest sum of grades.

    Args:
        sure: the memory's confidence in each answer. *Shape:* (N,).
        memory: grades of its answers. *Shape:* (N,).
        rag: grades of the other engine's. *Shape:* (N,).
    """

    def total(threshold: float) -> float:
        graded = zip(sure, memory, rag, strict=True)
        return sum(m if s >= threshold else r for s, m, r in graded)

    # Between two confidences nothing changes; a threshold of 1 leaves all but certain answers.
    candidates = sorted({0.0, *sure, 1.0})
    best = max(candidates, key=total)
    count = len(sure)
    return ThresholdFit(
        threshold=best,
        right=total(best) / count,
        memory=sum(memory) / count,
        rag=sum(rag) / count,
        from_memory=sum(s >= best for s in sure) / count,
    )


def _routed(response: RESPONSE_TYPE, details: Details, why: str) -> RESPONSE_TYPE:
    """The other engine's response, with why it was asked and what asking the memory had cost."""
    kept = {name: details[name] for name in _KEPT if name in details}
    costs = {name: details[name] for name in _COSTS if name in details}
    told = {**kept, "route": "rag", "why": why, "attribution": RETRIEVED, "memory": costs}
    response.metadata = {**(response.metadata or {}), KEY: told}
    return response


def _again(text: str) -> Generator[str, None, None]:
    """A text that was read already, as a stream."""
    yield text


async def _aagain(text: str) -> AsyncGenerator[str, None]:
    yield text
