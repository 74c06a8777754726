"""Texts as they are generated: token by token, with what is known of each so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
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
from mlpmem_rag.early_exit import Halves, Reading, changes_nothing, generate_early
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.openings import Openings
from mlpmem_rag.pieces import TextPieces
from mlpmem_rag.prompts import Prompt
from mlpmem_rag.query import QueryEncoder
from mlpmem_rag.recollection import SHARE
from mlpmem_rag.turns import Listener, Task
from mlpmem_rag.words import requests


@dataclass(frozen=True)
class Parts:
    """What a text is generated with.

    Attributes:
        model: a memory on its base model.
        tokenizer: of the base model.
        encoder: makes the query vector; None: the memory sees none.
        confidence: how sure an answer is; None: this memory cannot tell.
        openings: beginnings of prompts that the base model has read before.
        halves: the base model up to the layer that the memory reads, and from there on.
    """

    model: MLPMemForCausalLM
    tokenizer: PreTrainedTokenizerBase
    encoder: QueryEncoder | None
    confidence: Confidence | None
    openings: Openings
    halves: Halves

    def query_vectors(self, asked: Sequence[str]) -> Tensor | None:
        """What is being asked, as the memory sees it; None: it sees nothing. *Shape:* (B, R)."""
        if self.encoder is None:
            return None
        words = self.model.memory.words is not None
        return torch.from_numpy(requests(self.encoder, asked, words=words))


@dataclass(frozen=True)
class Answer:
    """What was said and what it took.

    Attributes:
        text: the answer.
        seconds: wall time from question to the end; before it, to the last token.
        ttft_seconds: wall time from question to first token.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated, the end-of-text token included.
        confidence: probability that the answer is right, as far as it has come; None: this memory
            cannot tell.
        cut_tokens: tokens of the prompt's beginning that had no room in the context window.
        ended: whether the text came to its end, rather than to `max_new_tokens`.
        lambda_: mixing weight that was in use.
        read: passages that the base model read for it.
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
    read: tuple[str, ...] = ()


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
        self.asked = asked
        self.decoding = decoding
        self._parts = parts
        self._prompt = prompt
        self._room = room
        self._strip = strip
        self.question = question
        self._recorder: Recorder | None = None
        self._line = 0
        self._started = time.perf_counter()
        self._prompt_tokens = 0
        self._cut_tokens = 0
        self._times: list[float] = []
        self._finished: float | None = None
        self._ended = False
        self._lambda: float | None = None

    @property
    def task(self) -> Task[Generation]:
        """This generation in its turn, with others of the same settings where these allow it."""
        decoding = self.decoding
        kind = (decoding, self.question) if decoding.shareable else None
        return Task(generate_together, self, kind, decoding.batch_size)

    @property
    def parts(self) -> Parts:
        """What it is generated with; from the beginning of its turn on always the same."""
        return self._parts()

    def begin(self) -> Prompt:
        """The turn has come. Returns the part of the prompt that there is room for."""
        parts, self._lambda = self._parts(), self.lambda_
        self._parts = lambda: parts  # the same to the end, whatever becomes of the memory
        prompt = self._prompt()
        # A question stands at the end: where there is no room, the oldest part goes.
        kept = prompt.within(self._room)
        self._prompt_tokens = len(kept.token_ids)
        self._cut_tokens = len(prompt.token_ids) - self._prompt_tokens
        return kept

    @property
    def lambda_(self) -> float:
        """Mixing weight; from the beginning of its turn on always the same."""
        if self._lambda is not None:
            return self._lambda
        own = self.decoding.lambda_
        return self.parts.model.memory_lambda if own is None else own

    def record(self, recorder: Recorder, line: int) -> None:
        """From now on this is a line of a batch, whose distributions are recorded there."""
        self._recorder, self._line = recorder, line

    def text(self) -> TextPieces:
        """Its text, of which there is nothing yet."""
        tokenizer = self.parts.tokenizer
        return TextPieces(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            self.decoding.stop,
            strip=self._strip,
        )

    def count(self, *, ended: bool) -> bool:
        """One more token, which ended the text or did not. Returns whether there is room."""
        self._times.append(time.perf_counter() - self._started)
        self._ended = ended
        return len(self._times) < self.decoding.max_new_tokens

    def answer(self, text: str) -> Answer:
        """What was said so far, with its figures."""
        times = list(self._times)  # it may be growing
        return Answer(
            text=text,
            seconds=self._finished or (times[-1] if times else 0.0),
            ttft_seconds=times[0] if times else 0.0,
            prompt_tokens=self._prompt_tokens,
            new_tokens=len(times),
            confidence=self._confidence(len(times)),
            cut_tokens=self._cut_tokens,
            ended=self._ended,
            lambda_=self.lambda_,
        )

    def finish(self) -> None:
        """Nothing more is generated."""
        self._finished = time.perf_counter() - self._started

    @property
    def has_confidence(self) -> bool:
        """Fitted on greedy answers to questions, a confidence knows nothing of other texts."""
        asks = self.question and self.lambda_ > 0
        return self.parts.confidence is not None and asks and self.decoding.greedy

    def _confidence(self, new_tokens: int) -> float | None:
        confidence = self.parts.confidence
        recorder = self._recorder
        if confidence is None or recorder is None or not self.has_confidence:
            return None
        if not 0 < new_tokens <= recorder.num_steps:
            return None
        return confidence.of(recorder.trace(self._line, new_tokens))


class Writer:
    """Gives out a text token by token, to whoever listens."""

    def __init__(self, generation: Generation, listener: Listener, eos: Set[int]) -> None:
        self._generation = generation
        self._listener = listener
        self._eos = eos
        self._text = generation.text()

    def take(self, token: int) -> bool:
        """The next token. Returns whether it was the last one."""
        piece = self._text.add(token)
        ended = self._text.stopped or token in self._eos
        room = self._generation.count(ended=ended)
        self._listener.give(piece)
        if over := ended or not room or self._listener.stop.is_set():
            self._listener.give(self._text.end())
        return over

    def end(self) -> None:
        """Nothing more comes."""
        self._generation.finish()
        self._listener.end()


@torch.inference_mode()
def generate_together(generations: Sequence[Generation], listeners: Sequence[Listener]) -> None:
    """Generate texts with the same settings as one batch; each is given out as it comes."""
    begun: list[tuple[Generation, Listener, Prompt]] = []
    for generation, listener in zip(generations, listeners, strict=True):
        try:
            begun.append((generation, listener, generation.begin()))
        except Exception as error:  # the others need not suffer
            listener.end(error)
    if not begun:
        return
    first = begun[0][0]
    parts, decoding, lambda_ = first.parts, first.decoding, first.lambda_
    model: Any = parts.model  # generate() is annotated for other classes
    mixes = lambda_ > 0
    query = parts.query_vectors([g.asked for g, _, _ in begun]) if mixes else None
    if query is not None:
        query = query.to(model.device)
    recorder = _recorder([generation for generation, _, _ in begun], query)
    config = _config(parts, decoding)
    eos = set(config.eos_token_id or ())
    writers = [Writer(generation, listener, eos) for generation, listener, _ in begun]
    # The base model alone reads all at once: in pieces its last bits would be others.
    prompts = parts.openings.begin(
        [prompt for _, _, prompt in begun], config.pad_token_id, shared=mixes
    )
    view = None
    if query is not None and query.shape[1] in (model.query_size, model.request_size):
        view = model.told(query, recall=first.question)
    weight = _constant_weight(model, decoding, lambda_, view, asked=first.question)
    if weight is not None and weight > 0.5 and _divides(parts):
        reading = Reading(parts.halves, prompts.cache, prompts.mask)
        answers: list[list[int]] = []
        if query is not None and view is not None and first.question:
            taught = model.taught_answers(query)[:, : decoding.max_new_tokens].tolist()
            answers = [list(takewhile(lambda token: token >= 0, line)) for line in taught]
        note = recorder.note if recorder else None
        share = SHARE * lambda_
        generate_early(model, reading, prompts.unread, view, weight, writers, note, answers, share)
        return
    choosers = decoding.choosers()
    with model.overheard(recorder.hear) if recorder else nullcontext():
        model.generate(
            inputs=prompts.token_ids,
            attention_mask=prompts.mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_EachToken(writers)]),
            logits_processor=LogitsProcessorList([*choosers, recorder] if recorder else choosers),
            memory_lambda=lambda_,
            query_vector=query,
            recall=first.question,
            past_key_values=prompts.cache,
            tokenizer=first.parts.tokenizer,  # for stop strings of the base model's own
        )


def _recorder(generations: Sequence[Generation], query: Tensor | None) -> Recorder | None:
    """Of the lines of a batch, where one of them tells a confidence. *Shape:* (B, Q)."""
    if not any(generation.has_confidence for generation in generations):
        return None
    model = generations[0].parts.model
    recorder = Recorder(model, query)
    for line, generation in enumerate(generations):
        generation.record(recorder, line)
    return recorder


def _constant_weight(
    model: MLPMemForCausalLM,
    decoding: Decoding,
    lambda_: float,
    view: Tensor | None,
    *,
    asked: bool,
) -> float | None:
    """The memory's weight where it is the same for every token that is taken; else None.

    `view` is what the memory reads of each request, or of the text before. *Shape:* (B, Q).
    """
    if not decoding.greedy or model._compiled_call_impl is not None:
        return None
    if model.query_size and (view is None or not bool(view.any(-1).all())):
        return None  # `generate` looks for the question in the ids, or refuses the vectors
    return model.constant_weight(lambda_, asked=asked and view is not None)


def _divides(parts: Parts) -> bool:
    """Whether the base model can stop early for some tokens."""
    return changes_nothing(parts.model.generation_config) and parts.halves.usable


def _config(parts: Parts, decoding: Decoding) -> GenerationConfig:
    """The model's and the tokenizer's end marks, and stop strings that are one token."""
    tokenizer = parts.tokenizer
    config = generation_config(parts.model, tokenizer, decoding.max_new_tokens)
    config.stop_strings = None  # found in the text, see TextPieces
    # These are not in the text: decoding leaves special tokens out.
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    marks = {special[stop] for stop in decoding.stop if stop in special}
    if marks:
        config.eos_token_id = sorted({*(config.eos_token_id or ()), *marks})
    return config


class _EachToken(StoppingCriteria):
    """Has every token written as soon as it is chosen, until its line is over."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers
        self._over = [False] * len(writers)
        self._told: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ANN401
        tokens = input_ids[:, -1].tolist()
        for line, (writer, token) in enumerate(zip(self._writers, tokens, strict=True)):
            if not self._over[line] and writer.take(token):
                self._over[line] = True
                self._told = None
                writer.end()
        if self._told is None:  # anew only where it changes
            self._told = torch.tensor(self._over, device=input_ids.device)
        return self._told
