"""Ask a memory: text in, text out."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.asked import question_marks
from mlpmem_rag.backbone import Backbone, context_window
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.early_exit import Halves
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.generation import Answer, Generation, Parts
from mlpmem_rag.integrity import Verify
from mlpmem_rag.model import MLPMemForCausalLM, load_model
from mlpmem_rag.openings import Openings
from mlpmem_rag.prompts import (
    STOP_STRING,
    Message,
    Prompt,
    answer_ids,
    asked_text,
    chats,
    check_asked,
    conversation,
    prompt_ids,
    text_ids,
)
from mlpmem_rag.provenance import Origin, Provenance, Recalled
from mlpmem_rag.query import QueryEncoder
from mlpmem_rag.questions import Question
from mlpmem_rag.reading import (
    agreed_answer,
    answer_traces,
    read_batch,
    read_recalled,
    reading,
)
from mlpmem_rag.turns import Turns, alone

NOT_KNOWN = "not in my documents"
SURE = 0.5
"""Confidence from which a memory's answer stands beside what could be read."""


class AnswerStream:
    """Pieces of text, from `for` or `async for`; `answer` is whole when the loop has ended.

    The work begins with the loop, and ends when the loop is left.
    """

    def __init__(self, generation: Generation, turns: Turns) -> None:
        self._generation = generation
        self._turns = turns
        self._text: list[str] = []
        self._begun = False

    def __iter__(self) -> Generator[str, None, None]:
        """Yield pieces as they are generated."""
        if self._first_time():
            with closing(self._turns.pieces(self._generation.task)) as pieces:
                for piece in pieces:
                    self._text.append(piece)
                    yield piece

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """Yield pieces as they are generated, and leave the event loop free meanwhile."""
        if self._first_time():
            async with aclosing(self._turns.apieces(self._generation.task)) as pieces:
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
        self._openings = Openings(model.base)
        self._halves = Halves(model.base, model.config.layer)
        self._turns = Turns()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        verify: str = Verify.full,
    ) -> MemoryModel:
        """Load a memory folder and the base model it names; see `mlpmem_rag.model.load_model`.

        Raises:
            ArtifactError: the folder is missing, damaged, or belongs to another base model.
            BaseModelError: the base model cannot be loaded.
        """
        model, backbone, settings = load_model(
            folder, base_model=base_model, device=device, dtype=dtype, verify=verify
        )
        memory = cls(model, backbone.tokenizer, model.query_encoder, settings.confidence)
        memory.folder, memory.backbone = Path(folder), backbone
        _ = memory._halves.divisible  # tried now, not by the first request
        return memory

    def close(self) -> None:
        """Stop what is being answered, refuse what is asked from now on, and end the thread.

        Not needed where requests are to be finished: a process ends when they are.
        """
        self._turns.close()

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
        recalled: Sequence[Recalled] = (),
    ) -> Answer:
        """Answer a question (or continue a conversation), greedily.

        Args:
            question: the text asked, or a conversation ending with the user's message.
            max_new_tokens: most tokens to generate.
            lambda_: mixing weight of this call; None: the one chosen in training.
            threshold: confidence below which the text is `NOT_KNOWN` instead.
            passages: retrieved texts, for memory and RAG together: the base model reads them, and
                of its answer and the memory's the jointly more probable one is given.
            recalled: what the method `recalled` found: where the memory does not hold its own
                answer for more likely right than wrong, the base model reads these sentences, after
                the learned questions and their answers, and answers in its place. The confidence
                is what the memory thinks of that answer.

        Raises:
            ConfigError: empty question, a number outside what is allowed, both passages and what
                is recalled, or a threshold where there is no confidence.
        """
        if not 0.0 <= threshold <= 1.0:
            raise ConfigError(f"threshold = {threshold}: allowed are 0 (answer always) to 1")
        if passages and recalled:
            raise ConfigError("both passages and recalled are given; allowed is one of them")
        stream = self.stream(question, max_new_tokens=max_new_tokens, lambda_=lambda_)
        for _ in stream:
            pass
        answer = stream.answer
        text = question if isinstance(question, str) else question[-1]["content"]
        if passages:
            answer = self._with_passages(answer, text, passages, max_new_tokens, lambda_)
        if recalled and (answer.confidence is None or answer.confidence < SURE):
            answer = self._with_recalled(answer, text, recalled, max_new_tokens, lambda_)
        if threshold and answer.confidence is None:
            raise ConfigError(
                f"threshold = {threshold}: without the memory (lambda 0), or by a memory that was "
                "not taught questions, no answer has a confidence; leave it at 0"
            )
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
        decoding = Decoding(max_new_tokens=max_new_tokens, lambda_=lambda_)
        return self.reply(_messages(question), decoding)

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
            lambda: conversation(self.tokenizer, messages),
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
            asked: the question that the text asks, which the memory answers as in `reply`; None:
                the last user message, where the text is a prompt of this base model's form that
                ends where the answer begins; else nothing is asked, and the memory is told the
                text.
            strip: leave out white space at both ends of what is generated.

        Raises:
            ConfigError: the text is empty, or no room is left for it.
        """
        check_asked([{"role": "user", "content": text}])
        if asked is None and (marks := question_marks(self.tokenizer)):
            asked = marks.question(text) if marks.ends(text) else None
        return self._start(
            lambda: Prompt(text_ids(self.tokenizer, text)),
            text if asked is None else asked,
            decoding,
            strip=strip,
            question=asked is not None,
        )

    def _start(
        self,
        prompt: Callable[[], Prompt],
        asked: str,
        decoding: Decoding,
        *,
        strip: bool,
        question: bool,
    ) -> AnswerStream:
        room = self.room_for_prompt(decoding.max_new_tokens)
        generation = Generation(
            self._parts, prompt, asked, decoding, room=room, strip=strip, question=question
        )
        return AnswerStream(generation, self._turns)

    def recalled(
        self, question: str | Sequence[Message], provenance: Provenance, *, top_k: int = 1
    ) -> list[Recalled]:
        """The sentences that taught what a question is recalled as, nearest first.

        `answer` has them read. A memory that was taught no questions recalls nothing.

        Args:
            question: the text asked, or a conversation ending with the user's message.
            provenance: what the training of this memory kept.
            top_k: sentences, at most.

        Raises:
            ConfigError: the question is empty, or less than one sentence is asked for.
        """
        if top_k < 1:
            raise ConfigError(f"top_k = {top_k}: allowed are 1 or more")
        messages = _messages(question)
        check_asked(messages)
        vector = self.query_vector(asked_text(messages))
        if vector is None:
            return []
        candidates = self.model.candidates(vector.to(self.model.device))
        return [] if candidates is None else provenance.recalled(candidates, top_k)

    def origins(
        self, question: str | Sequence[Message], answer: str, provenance: Provenance
    ) -> list[tuple[str, Origin | None]]:
        """The tokens of an answer with the training rows they come from.

        Args:
            question: the text asked, or the conversation before the answer.
            answer: what was said.
            provenance: the rows.

        Raises:
            ConfigError: the question is empty, or this memory was not loaded from a folder.
        """
        if self.backbone is None:
            raise ConfigError("only a memory that was loaded from a folder can trace its answers")
        messages = _messages(question)
        prompt = prompt_ids(self.tokenizer, messages)
        tokens = answer_ids(self.tokenizer, answer)[:-1]  # without the mark of its end
        kept = tokens[: self.context_window - 1]
        ids = [*prompt[-(self.context_window - len(kept)) :], *kept]
        batch = torch.tensor([ids], device=self.model.device)
        hidden = self.backbone.hidden(batch, torch.ones_like(batch))[0].float()  # (T, D)
        before = hidden[len(ids) - len(kept) - 1 : -1].cpu().numpy()
        vector = self.query_vector(asked_text(messages))
        found = provenance.origins(
            before,
            kept,
            None if vector is None else vector[0].numpy(),
            self.model.memory,
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

    def _with_recalled(
        self,
        remembered: Answer,
        question: str,
        recalled: Sequence[Recalled],
        max_new_tokens: int,
        lambda_: float | None,
    ) -> Answer:
        questions = [one.question for one in recalled]
        sentences = list(dict.fromkeys(one.source for one in questions))

        def read(whole: Prompt, kept: Prompt, openings: Openings | None) -> Answer:
            model, tokenizer = self.model, self.tokenizer
            if openings is None:
                (text,) = read_batch(model, tokenizer, [kept], max_new_tokens=max_new_tokens)
            else:
                taught = questions[0].answer
                text = read_recalled(
                    model, tokenizer, kept, taught, openings, max_new_tokens=max_new_tokens
                )
            confidence = remembered.confidence
            if text != remembered.text and confidence is not None and self.confidence is not None:
                vector = self._parts().query_vectors([question])
                ((_, trace),) = answer_traces(
                    model, tokenizer, question, vector, [text], openings, lambda_=lambda_
                )
                confidence = self.confidence.of(trace)
            said = len(answer_ids(tokenizer, text))
            return replace(
                remembered,
                text=text,
                confidence=confidence,
                new_tokens=remembered.new_tokens + said,
                ended=said <= max_new_tokens,
            )

        return self._having_read(
            remembered, question, sentences, read, max_new_tokens, recalled=questions
        )

    def _with_passages(
        self,
        remembered: Answer,
        question: str,
        passages: Sequence[str],
        max_new_tokens: int,
        lambda_: float | None,
    ) -> Answer:
        def read_and_agree(whole: Prompt, kept: Prompt, openings: Openings | None) -> Answer:
            model, tokenizer = self.model, self.tokenizer
            (read,) = read_batch(model, tokenizer, [kept], openings, max_new_tokens=max_new_tokens)
            vector = self._parts().query_vectors([question])
            agreed = agreed_answer(
                model,
                tokenizer,
                question,
                vector,
                whole,
                remembered.text,
                read,
                openings,
                lambda_=lambda_,
            )
            confidence = remembered.confidence
            if not agreed.is_remembered and confidence is not None and self.confidence is not None:
                confidence = self.confidence.of(agreed.trace)  # what the memory thinks of it
            return replace(remembered, text=agreed.text, confidence=confidence)

        return self._having_read(remembered, question, passages, read_and_agree, max_new_tokens)

    def _having_read(
        self,
        remembered: Answer,
        question: str,
        passages: Sequence[str],
        answer: Callable[[Prompt, Prompt, Openings | None], Answer],
        max_new_tokens: int,
        recalled: Sequence[Question] = (),
    ) -> Answer:
        """What is answered with passages in the prompt, after the memory alone has answered.

        In a turn of its own, like everything that runs on the model.

        Args:
            remembered: the memory's own answer.
            question: what was asked.
            passages: what is read.
            answer: from the whole prompt, what of it has room, and beginnings read before.
            max_new_tokens: most tokens to generate.
            recalled: see `reading_prompt`.
        """
        started = time.perf_counter()
        found: list[Answer] = []

        def read(give: Callable[[str], None], stop: threading.Event) -> None:
            whole = reading(self.tokenizer, question, passages, recalled)
            kept = whole.within(self.room_for_prompt(max_new_tokens))
            # The base model alone reads all at once: in pieces its last bits would be others.
            openings = self._openings if remembered.lambda_ > 0 else None
            given = answer(whole, kept, openings)
            seconds = remembered.seconds + time.perf_counter() - started
            found.append(
                replace(
                    given,
                    seconds=seconds,
                    ttft_seconds=seconds,  # nothing is certain before the end
                    prompt_tokens=remembered.prompt_tokens + len(kept.token_ids),
                    cut_tokens=remembered.cut_tokens + len(whole.token_ids) - len(kept.token_ids),
                    read=tuple(passages),
                )
            )

        for _ in self._turns.pieces(alone(read)):
            pass
        return found[0]

    def query_vector(self, asked: str) -> Tensor | None:
        """What is being asked, as the memory sees it; None: it sees nothing. *Shape:* (1, R)."""
        return self._parts().query_vectors([asked])

    def become(self, other: MemoryModel) -> None:
        """Answer as another memory does, and so does everything that holds this object.

        A text that is being generated is ended by the memory that began it; those that wait for
        their turn are generated by the other one.
        """

        def take(give: Callable[[str], None], stop: threading.Event) -> None:
            self.model, self.tokenizer = other.model, other.tokenizer
            self.encoder, self.confidence = other.encoder, other.confidence
            self.folder, self.backbone = other.folder, other.backbone
            self._openings = Openings(other.model.base)
            self._halves = other._halves

        for _ in self._turns.pieces(alone(take)):
            pass

    def _parts(self) -> Parts:
        return Parts(
            self.model,
            self.tokenizer,
            self.encoder,
            self.confidence,
            self._openings,
            self._halves,
        )


def _messages(question: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": question}] if isinstance(question, str) else question
