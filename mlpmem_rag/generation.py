"""One text as it is generated: token by token, with what is known of it so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.answering import Recorder, generation_config
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.openings import Openings
from mlpmem_rag.pieces import TextPieces
from mlpmem_rag.prompts import Prompt
from mlpmem_rag.query import QueryEncoder


@dataclass(frozen=True)
class Parts:
    """What a text is generated with.

    Attributes:
        model: a memory on its base model.
        tokenizer: of the base model.
        encoder: makes the query vector; None: the memory sees none.
        confidence: how sure an answer is; None: this memory cannot tell.
        openings: beginnings of prompts that the base model has read before.
    """

    model: MLPMemForCausalLM
    tokenizer: PreTrainedTokenizerBase
    encoder: QueryEncoder | None
    confidence: Confidence | None
    openings: Openings

    def query_vector(self, asked: str) -> Tensor | None:
        """What is being asked, as the memory sees it; None: it sees nothing. *Shape:* (1, Q)."""
        return None if self.encoder is None else torch.from_numpy(self.encoder.encode([asked]))


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
        cut_tokens: tokens of the prompt's beginning that had no room in the context window.
        ended: whether the text came to its end, rather than to `max_new_tokens`.
        lambda_: mixing weight that was in use.
    """

    text: str
    seconds: float
    ttft_seconds: float
    prompt_tokens: int
    new_tokens: int
    confidence: float | None = None
    cut_tokens: int = 0
    ended: bool = False
    lambda_: float = 0.0


class Generation:
    """One text that is generated, and what is known of it so far.

    Args:
        parts: gives what it is generated with, when its turn has come.
        prompt: gives what the model reads.
        asked: what the memory is asked, as a text.
        decoding: how tokens are chosen.
        room: most tokens of the prompt.
        strip: leave out white space at both ends.
        question: whether it answers a question, which is what a confidence is of.
    """

    def __init__(
        self,
        parts: Callable[[], Parts],
        prompt: Callable[[], Prompt],
        asked: str,
        decoding: Decoding,
        *,
        room: int,
        strip: bool,
        question: bool,
    ) -> None:
        self._parts = parts
        self._prompt = prompt
        self._asked = asked
        self._decoding = decoding
        self._room = room
        self._strip = strip
        self._question = question
        self._recorder = Recorder()
        self._started = time.perf_counter()
        self._prompt_tokens = 0
        self._cut_tokens = 0
        self._times: list[float] = []
        self._ended = False

    def run(self, give: Callable[[str], None], stop: threading.Event) -> None:
        """Generate; called once, in the model's own thread."""
        parts = self._parts()
        self._parts = lambda: parts  # the same to the end, whatever becomes of the memory
        tokenizer = parts.tokenizer
        prompt = self._prompt()
        # A question stands at the end: where there is no room, the oldest part goes.
        token_ids = prompt.token_ids[-self._room :]
        self._prompt_tokens = len(token_ids)
        self._cut_tokens = len(prompt.token_ids) - len(token_ids)
        opening = [] if self._cut_tokens else token_ids[: prompt.opening]
        config = self._config(parts)
        eos = set(config.eos_token_id or ())
        text = TextPieces(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            self._decoding.stop,
            strip=self._strip,
        )

        def take(token: int) -> bool:
            self._times.append(time.perf_counter() - self._started)
            give(text.add(token))
            self._ended = text.stopped or token in eos
            return text.stopped or stop.is_set()

        self._generate(parts, token_ids, opening, config, take)
        give(text.end())

    @torch.inference_mode()
    def _generate(
        self,
        parts: Parts,
        token_ids: list[int],
        opening: list[int],
        config: GenerationConfig,
        take: Callable[[int], bool],
    ) -> None:
        model: Any = parts.model  # generate() is annotated for other classes
        lambda_ = self._decoding.lambda_
        mixes = (model.memory_lambda if lambda_ is None else lambda_) > 0
        prompt = torch.tensor([token_ids], device=model.device)
        query = parts.query_vector(self._asked) if mixes else None
        if query is not None:
            self._recorder = Recorder(model.memory.familiarity(query))
        model.generate(
            inputs=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_EachToken(take)]),
            logits_processor=LogitsProcessorList([self._recorder, *self._decoding.choosers()]),
            memory_lambda=lambda_,
            query_vector=query,
            # The base model alone reads all at once: in pieces its last bits would be others.
            past_key_values=parts.openings.cache(opening) if mixes else None,
        )

    def answer(self, text: str) -> Answer:
        """What was said so far, with its figures."""
        times, lambda_ = self._times, self._decoding.lambda_
        return Answer(
            text=text,
            seconds=times[-1] if times else 0.0,
            ttft_seconds=times[0] if times else 0.0,
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(times),
            confidence=self._confidence(len(times)),
            cut_tokens=self._cut_tokens,
            ended=self._ended,
            lambda_=self._parts().model.memory_lambda if lambda_ is None else lambda_,
        )

    def _confidence(self, new_tokens: int) -> float | None:
        """Fitted on greedy answers to questions; of other texts it knows nothing."""
        confidence, decoding = self._parts().confidence, self._decoding
        if confidence is None or not self._question or decoding.lambda_ == 0:
            return None
        if decoding.temperature > 0 or decoding.logits_processors:
            return None
        return confidence.of(self._recorder.trace(0, new_tokens))

    def _config(self, parts: Parts) -> GenerationConfig:
        """The model's and the tokenizer's end marks, and stop strings that are one token."""
        tokenizer, decoding = parts.tokenizer, self._decoding
        config = generation_config(parts.model, tokenizer, decoding.max_new_tokens)
        config.stop_strings = None  # found in the text, see TextPieces
        # These are not in the text: decoding leaves special tokens out.
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        marks = {special[stop] for stop in decoding.stop if stop in special}
        if marks:
            config.eos_token_id = sorted({*(config.eos_token_id or ()), *marks})
        return config


class _EachToken(StoppingCriteria):
    """Sees every token as soon as it is chosen, and says whether it was the last one."""

    def __init__(self, take: Callable[[int], bool]) -> None:
        self._take = take

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ANN401
        over = self._take(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), over, device=input_ids.device)
