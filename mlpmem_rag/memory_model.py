"""Ask a memory: text in, text out."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from pathlib import Path
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
from mlpmem_rag.backbone import Backbone, context_window
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.model import MLPMemForCausalLM, load_model
from mlpmem_rag.pieces import TextPieces
from mlpmem_rag.prompts import (
    STOP_STRING,
    Message,
    answer_ids,
    asked_text,
    chats,
    check_asked,
    prompt_ids,
    text_ids,
)
from mlpmem_rag.provenance import Origin, Provenance
from mlpmem_rag.query import QueryEncoder
from mlpmem_rag.reading import agreed_answers, encoded, read_batch, reading_prompt
from mlpmem_rag.turns import Turns

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


class AnswerStream:
    """Pieces of text, from `for` or `async for`; `answer` is whole when the loop has ended.

    The work begins with the loop, and ends when the loop is left.
    """

    def __init__(self, generation: _Generation, turns: Turns) -> None:
        self._generation = generation
        self._turns = turns
        self._text: list[str] = []
        self._begun = False

    def __iter__(self) -> Generator[str, None, None]:
        """Yield pieces as they are generated."""
        if self._first_time():
            with closing(self._turns.pieces(self._generation.run)) as pieces:
                for piece in pieces:
                    self._text.append(piece)
                    yield piece

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """Yield pieces as they are generated, and leave the event loop free meanwhile."""
        if self._first_time():
            async with aclosing(self._turns.apieces(self._generation.run)) as pieces:
                async for piece in pieces:
                    self._text.append(piece)
                    yield piece

    @property
    def answer(self) -> Answer:
        """All that was yielded so far, with its figures."""
        return self._generation.answer("".join(self._text))

    def _first_time(self) -> bool:
        first, self._begun = not self._begun, True
        return first


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
        self.folder: Path | None = None
        self.backbone: Backbone | None = None
        self._turns = Turns()

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
        memory = cls(model, backbone.tokenizer, model.query_encoder, settings.confidence)
        memory.folder, memory.backbone = Path(folder), backbone
        return memory

    @property
    def context_window(self) -> int:
        """Tokens that a prompt and what is generated after it may have together."""
        return context_window(self.model.base)

    def room_for_prompt(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have.

        Raises:
            ConfigError: none.
        """
        room = self.context_window - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens = {max_new_tokens}: the base model's context window has "
                f"{self.context_window} tokens; allowed are fewer"
            )
        return room

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
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        return self.reply(messages, Decoding(max_new_tokens=max_new_tokens, lambda_=lambda_))

    def reply(
        self, messages: Sequence[Message], decoding: Decoding, *, asked: str | None = None
    ) -> AnswerStream:
        """Continue a conversation.

        Args:
            messages: the conversation, in the base model's chat template where it has one.
            decoding: how.
            asked: what the memory is asked, as a text; None: the user's last message.

        Raises:
            ConfigError: the last message is empty, or no room is left for a prompt.
        """
        check_asked(messages)
        if not chats(self.tokenizer):
            decoding = replace(decoding, stop=(*decoding.stop, STOP_STRING))
        return self._start(
            lambda: prompt_ids(self.tokenizer, messages),
            asked_text(messages) if asked is None else asked,
            decoding,
            strip=True,
            question=True,
        )

    def continue_text(
        self,
        text: str,
        decoding: Decoding,
        *,
        asked: str | None = None,
        strip: bool = False,
    ) -> AnswerStream:
        """Continue a text as it stands, without a template.

        Args:
            text: what the model reads.
            decoding: how.
            asked: what the memory is asked, as a text; None: the whole text.
            strip: leave out white space at both ends of what is generated.

        Raises:
            ConfigError: the text is empty, or no room is left for it.
        """
        check_asked([{"role": "user", "content": text}])
        return self._start(
            lambda: text_ids(self.tokenizer, text),
            text if asked is None else asked,
            decoding,
            strip=strip,
            question=False,
        )

    def _start(
        self,
        prompt: Callable[[], list[int]],
        asked: str,
        decoding: Decoding,
        *,
        strip: bool,
        question: bool,
    ) -> AnswerStream:
        room = self.room_for_prompt(decoding.max_new_tokens)
        generation = _Generation(
            self, prompt, asked, decoding, room=room, strip=strip, question=question
        )
        return AnswerStream(generation, self._turns)

    def origins(
        self, question: str, answer: str, provenance: Provenance
    ) -> list[tuple[str, Origin | None]]:
        """The tokens of an answer with the training rows they come from.

        Raises:
            ConfigError: the question is empty, or this memory was not loaded from a folder.
        """
        if self.backbone is None:
            raise ConfigError("only a memory that was loaded from a folder can trace its answers")
        prompt = prompt_ids(self.tokenizer, [{"role": "user", "content": question}])
        tokens = answer_ids(self.tokenizer, answer)[:-1]  # without the mark of its end
        kept = tokens[: self.context_window - 1]
        ids = [*prompt[-(self.context_window - len(kept)) :], *kept]
        batch = torch.tensor([ids], device=self.model.device)
        hidden = self.backbone.hidden(batch, torch.ones_like(batch))[0].float()  # (T, D)
        before = hidden[len(ids) - len(kept) - 1 : -1].cpu().numpy()
        vector = self.query_vector(question)
        found = provenance.origins(
            before,
            kept,
            None if vector is None else vector[0].numpy(),
            scale=self.model.memory.config.hidden_scale,
        )
        return [
            (str(self.tokenizer.decode([token])), origin)
            for token, origin in zip(kept, found, strict=True)
        ]

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

    def query_vector(self, asked: str) -> Tensor | None:
        """What is being asked, as the memory sees it; None: it sees nothing. *Shape:* (1, Q)."""
        return None if self.encoder is None else torch.from_numpy(self.encoder.encode([asked]))


class _Generation:
    """One text that is generated, and what is known of it so far."""

    def __init__(
        self,
        memory: MemoryModel,
        prompt: Callable[[], list[int]],
        asked: str,
        decoding: Decoding,
        *,
        room: int,
        strip: bool,
        question: bool,
    ) -> None:
        self._memory = memory
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
        tokenizer = self._memory.tokenizer
        prompt = self._prompt()
        token_ids = prompt[-self._room :]  # a question stands at the end: the oldest part goes
        self._prompt_tokens = len(token_ids)
        self._cut_tokens = len(prompt) - len(token_ids)
        config = self._config()
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

        self._generate(token_ids, config, take)
        give(text.end())

    @torch.inference_mode()
    def _generate(
        self, token_ids: list[int], config: GenerationConfig, take: Callable[[int], bool]
    ) -> None:
        model: Any = self._memory.model  # generate() is annotated for other classes
        lambda_ = self._decoding.lambda_
        prompt = torch.tensor([token_ids], device=model.device)
        query = None if lambda_ == 0 else self._memory.query_vector(self._asked)
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
            lambda_=self._memory.model.memory_lambda if lambda_ is None else lambda_,
        )

    def _confidence(self, new_tokens: int) -> float | None:
        """Fitted on greedy answers to questions; of other texts it knows nothing."""
        confidence, decoding = self._memory.confidence, self._decoding
        if confidence is None or not self._question or decoding.lambda_ == 0:
            return None
        if decoding.temperature > 0 or decoding.logits_processors:
            return None
        return confidence.of(self._recorder.trace(0, new_tokens))

    def _config(self) -> GenerationConfig:
        """The model's and the tokenizer's end marks, and stop strings that are one token."""
        memory, decoding = self._memory, self._decoding
        config = generation_config(memory.model, memory.tokenizer, decoding.max_new_tokens)
        config.stop_strings = None  # found in the text, see TextPieces
        # These are not in the text: decoding leaves special tokens out.
        special = dict(
            zip(memory.tokenizer.all_special_tokens, memory.tokenizer.all_special_ids, strict=True)
        )
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
