"""Ask a memory: text in, text out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.answering import Recorder, generation_config
from mlpmem_rag.backbone import context_window
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.mixing import check_lambda
from mlpmem_rag.model import MLPMemForCausalLM, load_model
from mlpmem_rag.prompts import Message, prompt_ids
from mlpmem_rag.query import QueryEncoder, load_encoder
from mlpmem_rag.reading import agreed_answers, encoded, read_batch, reading_prompt

NOT_KNOWN = "not in my documents"


@dataclass(frozen=True)
class Answer:
    """What was said and what it took.

    Attributes:
        text: the answer.
        seconds: wall time from question to last token.
        ttft_seconds: wall time from question to first token.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, the end-of-text token included.
        confidence: probability that the answer is right; None: this memory cannot tell.
    """

    text: str
    seconds: float
    ttft_seconds: float
    prompt_tokens: int
    new_tokens: int
    confidence: float | None = None


class AnswerStream:
    """Iterates over pieces of text; `answer` is there when the iteration has ended."""

    def __init__(
        self,
        pieces: Generator[str, None, None],
        clock: _Clock,
        confidence: Callable[[int], float | None],
    ) -> None:
        self._pieces = pieces
        self._clock = clock
        self._confidence = confidence
        self._text: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """Yield pieces as they are generated."""
        try:
            for piece in self._pieces:
                self._text.append(piece)
                yield piece
        finally:
            self._pieces.close()  # a consumer that leaves the loop ends the generation

    @property
    def answer(self) -> Answer:
        """All that was yielded so far, with its figures."""
        answer = self._clock.answer("".join(self._text).strip())
        return replace(answer, confidence=self._confidence(answer.new_tokens))


class MemoryModel:
    """A memory on its base model, ready to answer. Safe to use from several threads."""

    def __init__(
        self,
        model: MLPMemForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        encoder: QueryEncoder | None = None,
        confidence: Confidence | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.confidence = confidence

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> MemoryModel:
        """Load a memory folder and the base model it names; see `mlpmem_rag.model.load_model`.

        Raises:
            ArtifactError: the folder is missing, damaged, or belongs to another base model.
            BaseModelError: the base model cannot be loaded.
        """
        model, backbone, settings = load_model(
            folder, base_model=base_model, device=device, dtype=dtype
        )
        encoder = load_encoder(settings.encoder, backbone)
        if (found := encoder.size if encoder else 0) != (expected := settings.memory.query_size):
            raise ArtifactError(
                f"query encoder {settings.encoder!r} gives vectors of width {found}, the memory "
                f"in {folder} was trained with width {expected}; load the encoder it was trained "
                "with, or train again"
            )
        return cls(model, backbone.tokenizer, encoder, settings.confidence)

    def answer(
        self,
        question: str | Sequence[Message],
        *,
        max_new_tokens: int = 128,
        lambda_: float | None = None,
        threshold: float = 0.0,
        passages: Sequence[str] = (),
    ) -> Answer:
        """Answer a question (or continue a conversation), greedily.

        Args:
            question: the text asked, or a conversation ending with the user's message.
            max_new_tokens: most tokens to generate.
            lambda_: mixing weight of this call; None: the one chosen in training.
            threshold: confidence below which the text is `NOT_KNOWN` instead.
            passages: retrieved texts, for memory and RAG together: the base model reads them, and
                of its answer and the memory's the jointly more probable one is given.

        Raises:
            ConfigError: empty question, or a number outside what is allowed.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ConfigError(f"threshold = {threshold}: allowed are 0 (answer always) to 1")
        stream = self.stream(question, max_new_tokens=max_new_tokens, lambda_=lambda_)
        for _ in stream:
            pass
        answer = stream.answer
        if passages:
            text = question if isinstance(question, str) else question[-1]["content"]
            answer = self._with_passages(answer, text, passages, max_new_tokens)
        if answer.confidence is not None and answer.confidence < threshold:
            return replace(answer, text=NOT_KNOWN)
        return answer

    def stream(
        self,
        question: str | Sequence[Message],
        *,
        max_new_tokens: int = 128,
        lambda_: float | None = None,
    ) -> AnswerStream:
        """Like `answer`, piece by piece. Leaving the loop early stops the generation."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens}: allowed is 1 or more")
        if lambda_ is not None:
            check_lambda(lambda_)
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        clock = _Clock()
        prompt = prompt_ids(self.tokenizer, messages)
        token_ids = self._fit(prompt, max_new_tokens)
        clock.prompt_tokens = token_ids.shape[1]
        query = self._query_vector(messages)
        recorder = Recorder(None if query is None else self.model.memory.familiarity(query))
        pieces = self._generate(token_ids, query, max_new_tokens, lambda_, clock, recorder)

        def confidence(new_tokens: int) -> float | None:
            if self.confidence is None:
                return None
            return self.confidence.of(recorder.trace(0, new_tokens))

        return AnswerStream(pieces, clock, confidence)

    @torch.inference_mode()
    def log_probs(self, token_ids: Sequence[int], *, lambda_: float | None = None) -> Tensor:
        """Log-probabilities of the next token after each one, float32. *Shape:* (T,) -> (T, W)."""
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        output = self.model(input_ids=ids, memory_lambda=lambda_, use_cache=False)
        log_probs: Tensor = output.logits[0].float().log_softmax(-1)
        return log_probs

    def _with_passages(
        self, remembered: Answer, question: str, passages: Sequence[str], max_new_tokens: int
    ) -> Answer:
        started = time.perf_counter()
        prompts = [reading_prompt(question, passages)]
        read = read_batch(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens)
        vector = None if self.encoder is None else self.encoder.encode([question])
        (text,) = agreed_answers(
            self.model, self.tokenizer, [question], vector, prompts, [remembered.text], read
        )
        seconds = time.perf_counter() - started
        return replace(
            remembered,
            text=text,
            seconds=remembered.seconds + seconds,
            ttft_seconds=remembered.seconds + seconds,  # nothing is certain before the end
            prompt_tokens=remembered.prompt_tokens + len(encoded(self.tokenizer, prompts[0])),
        )

    def _query_vector(self, messages: Sequence[Message]) -> Tensor | None:
        """What is being asked: the user's last message. *Shape:* (1, Q)."""
        if self.encoder is None:
            return None
        return torch.from_numpy(self.encoder.encode([messages[-1]["content"]]))

    def _fit(self, prompt: list[int], max_new_tokens: int) -> Tensor:
        room = context_window(self.model.base) - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens = {max_new_tokens}: the base model's context window has "
                f"{context_window(self.model.base)} tokens; allowed are fewer"
            )
        # The question stands at the end, so what is cut is the oldest part.
        return torch.tensor([prompt[-room:]], device=self.model.device)

    def _generate(
        self,
        token_ids: Tensor,
        query_vector: Tensor | None,
        max_new_tokens: int,
        lambda_: float | None,
        clock: _Clock,
        recorder: Recorder,
    ) -> Generator[str, None, None]:
        streamer = _TimedStreamer(self.tokenizer, clock)
        cancelled = threading.Event()
        failure: list[BaseException] = []
        config = generation_config(self.model, self.tokenizer, max_new_tokens)

        def work() -> None:
            try:
                with torch.inference_mode():
                    model: Any = self.model  # generate() is annotated for other classes
                    model.generate(
                        inputs=token_ids,
                        attention_mask=torch.ones_like(token_ids),
                        generation_config=config,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Cancelled(cancelled)]),
                        logits_processor=LogitsProcessorList([recorder]),
                        memory_lambda=lambda_,
                        query_vector=query_vector,
                        tokenizer=self.tokenizer,
                    )
            except BaseException as error:
                failure.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, name="mlpmem-generate", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            cancelled.set()
            thread.join()
        if failure:
            raise failure[0]


class _Clock:
    """Times one generation."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self._started = time.perf_counter()
        self._tokens: list[float] = []

    def token(self) -> None:
        self._tokens.append(time.perf_counter() - self._started)

    def answer(self, text: str) -> Answer:
        return Answer(
            text=text,
            seconds=self._tokens[-1] if self._tokens else 0.0,
            ttft_seconds=self._tokens[0] if self._tokens else 0.0,
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(self._tokens),
        )


class _TimedStreamer(TextIteratorStreamer):
    """Text pieces, with the time of every token (a piece of text may wait for several)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: _Clock) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._clock = clock

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._clock.token()
        super().put(value)


class _Cancelled(StoppingCriteria):
    """Stops when nobody reads the stream any more."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ANN401
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)
