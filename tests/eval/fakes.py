"""Fakes to compare: arms with known answers and delays, on a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core import Document as IndexDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback

from mlpmem_eval.answerers import Reply
from mlpmem_eval.cost import Setup
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.report import build_report
from mlpmem_eval.rows import Row
from mlpmem_eval.schema import Report


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowLLM(CustomLLM):
    """Says what it is told to, word by word, after known delays."""

    _clock: FakeClock = PrivateAttr()
    _says: Callable[[str], str] = PrivateAttr()
    _prefill: float = PrivateAttr()
    _decode: float = PrivateAttr()

    def __init__(
        self, clock: FakeClock, says: Callable[[str], str], *, prefill: float, decode: float
    ) -> None:
        super().__init__()
        self._clock, self._says, self._prefill, self._decode = clock, says, prefill, decode

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=4096, num_output=64)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: object) -> CompletionResponse:
        return list(self._pieces(prompt))[-1]

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **_: object
    ) -> Generator[CompletionResponse, None, None]:
        return self._pieces(prompt)

    def _pieces(self, prompt: str) -> Generator[CompletionResponse, None, None]:
        self._clock.sleep(self._prefill)
        words, text = self._says(prompt).split(), ""
        for number, word in enumerate(words):
            self._clock.sleep(self._decode if number else 0.0)
            delta = f" {word}" if number else word
            text += delta
            yield CompletionResponse(text=text, delta=delta)
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        yield CompletionResponse(text=text, delta="", raw={"usage": usage})


class SlowEmbedding(BaseEmbedding):
    """Vectors of letter counts, after a known delay."""

    _clock: FakeClock = PrivateAttr()
    _seconds: float = PrivateAttr()

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        super().__init__(model_name="letters")
        self._clock, self._seconds = clock, seconds

    def _get_text_embedding(self, text: str) -> list[float]:
        return [float(text.lower().count(letter)) + 0.01 for letter in "abcdefghijklmnopqrstuvwxyz"]

    def _get_query_embedding(self, query: str) -> list[float]:
        self._clock.sleep(self._seconds)
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def letter_index(clock: FakeClock, seconds: float, texts: Sequence[str]) -> VectorStoreIndex:
    documents = [IndexDocument(id_=f"d{n}", text=text) for n, text in enumerate(texts)]
    return VectorStoreIndex.from_documents(documents, embed_model=SlowEmbedding(clock, seconds))


@dataclass
class FakeArm:
    """Answers from a table; what is not in it is an error."""

    name: str
    answers: dict[str, str]
    confidences: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    wait: Callable[[], object] = lambda: None
    asked: list[str] = field(default_factory=list)

    def answer(self, question: str) -> Reply:
        self.asked.append(question)
        self.wait()
        return Reply(self.answers[question], confidence=self.confidences.get(question))


@dataclass
class LetterEncoder:
    """Texts as unit vectors of letter counts."""

    name: str = "letters"
    size: int = 26

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        counts = [[t.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts]
        vectors = np.array(counts, dtype=np.float32).reshape(-1, 26)
        norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        unit: npt.NDArray[np.float32] = vectors / norms
        return unit


def question(number: int, *, answerable: bool = True) -> EvalQuestion:
    answers = (f"answer {number}",) if answerable else ()
    return EvalQuestion(f"q{number}", f"question {number}?", answers, (f"d{number}",), answerable)


EVIL = '</script><script>alert("1")</script><img src=x onerror=alert(2)> & | `code`'


def sample_report() -> Report:
    """Three arms, eight questions (two of them unanswerable), HTML in the texts, one failure."""
    questions = [question(n, answerable=n < 6) for n in range(8)]
    questions[0] = EvalQuestion("q0", f"what is {EVIL}?", (EVIL,), ("d0",))
    rows = []
    for n, asked in enumerate(questions):
        right = asked.answers[0] if asked.answers else "nothing"
        rows += [
            Row("base", asked.id, "k", text=EVIL if n == 1 else "no idea", total=0.5 + n / 100),
            Row(
                "rag",
                asked.id,
                "k",
                text=right if n % 2 else f"{right} and more",
                documents=(f"d{n if n < 4 else 0}",),
                total=1.0 + n / 50,
                ttft=0.6,
                retrieval=0.1,
                embedding=0.04,
                prefill=0.5,
                decode=0.4 + n / 50,
                share=1.0,
                prompt_tokens=300 + n,
                completion_tokens=9,
            ),
            Row("memory", asked.id, "k", error="ValueError: <b>broken</b>")
            if n == 3
            else Row(
                "memory",
                asked.id,
                "k",
                text=right if n < 5 else "wrong",
                confidence=0.9 - n / 10,
                total=0.3 + n / 100,
                ttft=0.2,
                prefill=0.2,
                decode=0.1 + n / 100,
                share=0.3,
                prompt_tokens=30,
                completion_tokens=5,
                route="memory",
            ),
        ]
    return build_report(
        questions,
        rows,
        arm_settings={"base": {"prompt": "none"}, "rag": {"k": 2}, "memory": {"lambda": 1.0}},
        setups={
            "rag": Setup({"index": 2.0}, grows={"index": 5000}),
            "memory": Setup({"training": 72.0}, fixed={"memory": 100_000}, trained=True),
        },
        settings={"command": "mlpmem-rag compare", "options": {"seed": 0, "concurrency": 1}},
        warnings=[f"beware of {EVIL}"],
        encoder=LetterEncoder(),
    )
