"""Ask a memory: text in, text out."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.backbone import context_window
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.mixing import check_lambda
from mlpmem_rag.model import MLPMemForCausalLM, load_model
from mlpmem_rag.prompts import STOP_STRING, Message, chats, prompt_ids


@dataclass(frozen=True)
class Answer:
    """What was said and what it took.

    Attributes:
        text: the answer.
        seconds: wall time from question to last token.
        ttft_seconds: wall time from question to first token.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, the end-of-text token included.
    """

    text: str
    seconds: float
    ttft_seconds: float
    prompt_tokens: int
    new_tokens: int


class AnswerStream:
    """Iterates over pieces of text; `answer` is there when the iteration has ended."""

    def __init__(self, pieces: Generator[str, None, None], clock: _Clock) -> None:
        self._pieces = pieces
        self._clock = clock
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
        return self._clock.answer("".join(self._text).strip())


class MemoryModel:
    """A memory on its base model, ready to answer. Safe to use from several threads."""

    def __init__(self, model: MLPMemForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

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
        model, backbone = load_model(folder, base_model=base_model, device=device, dtype=dtype)
        return cls(model, backbone.tokenizer)

    def answer(
        self,
        question: str | Sequence[Message],
        *,
        max_new_tokens: int = 128,
        lambda_: float | None = None,
    ) -> Answer:
        """Answer a question (or continue a conversation), greedily.

        Args:
            question: the text asked, or a conversation ending with the user's message.
            max_new_tokens: most tokens to generate.
            lambda_: mixing weight of this call; None: the one chosen in training.

        Raises:
            ConfigError: empty question, or a number outside what is allowed.
        """
        stream = self.stream(question, max_new_tokens=max_new_tokens, lambda_=lambda_)
        for _ in stream:
            pass
        return stream.answer

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
        token_ids = self._fit(self._prompt(question), max_new_tokens)
        clock = _Clock(prompt_tokens=token_ids.shape[1])
        return AnswerStream(self._generate(token_ids, max_new_tokens, lambda_, clock), clock)

    @torch.inference_mode()
    def log_probs(self, token_ids: Sequence[int], *, lambda_: float | None = None) -> Tensor:
        """Log-probabilities of the next token after each one, float32. *Shape:* (T,) -> (T, W)."""
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        output = self.model(input_ids=ids, memory_lambda=lambda_, use_cache=False)
        log_probs: Tensor = output.logits[0].float().log_softmax(-1)
        return log_probs

    def _prompt(self, question: str | Sequence[Message]) -> list[int]:
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        return prompt_ids(self.tokenizer, messages)

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
        self, token_ids: Tensor, max_new_tokens: int, lambda_: float | None, clock: _Clock
    ) -> Generator[str, None, None]:
        streamer = _TimedStreamer(self.tokenizer, clock)
        cancelled = threading.Event()
        failure: list[BaseException] = []
        base_config = self.model.generation_config
        eos = base_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            bos_token_id=base_config.bos_token_id,
            pad_token_id=eos[0] if isinstance(eos, list) else eos,
            stop_strings=None if chats(self.tokenizer) else [STOP_STRING],
        )

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
                        memory_lambda=lambda_,
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

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._started = time.perf_counter()
        self._tokens: list[float] = []

    def token(self) -> None:
        self._tokens.append(time.perf_counter() - self._started)

    def answer(self, text: str) -> Answer:
        return Answer(
            text=text,
            seconds=self._tokens[-1] if self._tokens else 0.0,
            ttft_seconds=self._tokens[0] if self._tokens else 0.0,
            prompt_tokens=self._prompt_tokens,
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
