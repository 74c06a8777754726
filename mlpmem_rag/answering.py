"""Greedy answers to many questions at once, with what was sure and unsure on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.backbone import context_window
from mlpmem_rag.confidence import Trace
from mlpmem_rag.memory import Candidates, Memory, columns_of
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.openings import Openings
from mlpmem_rag.prompts import STOP_STRING, chats, conversation
from mlpmem_rag.query import Vectors

BATCH = 64
LEAST = -16.0
"""Log-probability that a token counts with at least, also one that no memory knows."""


class Recorder(LogitsProcessor):
    """Notes how sure the memory is of each token that is chosen greedily, and changes nothing.

    As a processor it comes last, and hears beforehand what the memory says. Where requests are
    given, it notes what they may mean as well. *Shape:* (B, R).
    """

    def __init__(self, model: MLPMemForCausalLM, query: Tensor | None) -> None:
        self._corpus_tokens = model.memory.corpus_tokens
        self._request = None if query is None else Request.of(model, query)
        self._heard: Tensor | None = None
        self._steps: list[Tensor] = []  # log-probabilities and entropies, (2, B) each
        self._tokens: list[Tensor] = []  # (B,) each

    def hear(self, log_probs: Tensor) -> None:
        """What the memory says before a token is chosen. *Shape:* (B, T, V)."""
        self._heard = log_probs[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*Shapes:* (B, T), (B, W) -> (B, W)."""
        if self._heard is not None:  # at lambda 0 the memory says nothing
            self.note(self._heard, scores.argmax(-1))
        return scores

    def note(self, log_probs: Tensor, tokens: Tensor) -> None:
        """The next tokens; nobody waits for what is noted. *Shapes:* (B, V), (B,)."""
        self._steps.append(sureness(log_probs, tokens, self._corpus_tokens))
        self._tokens.append(tokens)

    @property
    def num_steps(self) -> int:
        """Steps noted so far."""
        return len(self._steps)

    def trace(self, line: int, length: int) -> Trace:
        """Of one sequence of the batch, up to its last token."""
        if not self._steps[:length]:
            return Trace((), ())
        steps = torch.stack([step[:, line] for step in self._steps[:length]], dim=1)
        tokens = torch.stack([chosen[line] for chosen in self._tokens[:length]])
        near, support = self._request.means(line, tokens) if self._request else (0.0, 0.0)
        log_probs, entropies = steps.tolist()
        return Trace(tuple(log_probs), tuple(entropies), near, support)


@dataclass(frozen=True)
class Request:
    """What a memory takes requests for.

    Attributes:
        memory: which.
        candidates: learned questions that they may mean.
        familiarity: see `Memory.familiarity`.
    """

    memory: Memory
    candidates: Candidates
    familiarity: list[float]

    @classmethod
    def of(cls, model: MLPMemForCausalLM, query: Tensor) -> Request | None:
        """None: the memory was taught no questions. *Shape:* (B, R)."""
        told = query.to(model.device)
        candidates = model.candidates(told)
        if candidates is None:
            return None
        near = model.memory.familiarity(told, candidates.best)
        return cls(model.memory, candidates, near)

    def means(self, line: int, answer: Tensor) -> tuple[float, float]:
        """How familiar one of them is, and how much supports an answer's tokens. *Shape:* (A,)."""
        support = self.memory.support(self.candidates.of(line), answer[None])[0]
        return self.familiarity[line], support


def sureness(log_probs: Tensor, tokens: Tensor, corpus_tokens: Tensor) -> Tensor:
    """The memory's log-probabilities of tokens, and the entropies of what they were chosen from.

    *Shapes:* log_probs (B, V), tokens (B,), corpus_tokens (V,) -> (2, B).
    """
    columns, known = columns_of(tokens, corpus_tokens)
    chosen = log_probs.gather(-1, columns[:, None]).squeeze(-1)
    entropies = torch.special.entr(log_probs.exp()).sum(-1)
    return torch.stack([chosen.where(known, LEAST).clamp_min(LEAST), entropies])


def generation_config(
    model: MLPMemForCausalLM, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy, to the end of the answer as base model or tokenizer mark it.

    What is left open, transformers takes from the base model's own settings.
    """
    marks = model.generation_config.eos_token_id
    ends = list(marks) if isinstance(marks, list) else [marks]
    # Answers were taught with the tokenizer's mark, which need not be the model's.
    eos = sorted({mark for mark in (*ends, tokenizer.eos_token_id) if mark is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,  # prompts may begin with one
        eos_token_id=eos or None,
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=eos[0] if eos else 0,
        stop_strings=None if chats(tokenizer) else [STOP_STRING],
    )


@torch.inference_mode()
def answer_batch(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    query_vectors: Vectors | None,
    *,
    max_new_tokens: int = 24,
    lambda_: float | None = None,
) -> list[tuple[str, Trace]]:
    """The answers that `MemoryModel.answer` gives one by one. *Shape:* vectors (N, R)."""
    window = context_window(model.base)
    asked = [conversation(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    prompts = [prompt.within(max(1, window - max_new_tokens)) for prompt in asked]
    openings = Openings(model.base)
    mixes = model.mixes(model.memory_lambda if lambda_ is None else lambda_)
    config = generation_config(model, tokenizer, max_new_tokens)
    generator: Any = model  # generate() is annotated for other classes
    answers: dict[int, tuple[str, Trace]] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].token_ids))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        begun = openings.begin([prompts[n] for n in batch], config.pad_token_id, shared=mixes)
        vectors = None
        if query_vectors is not None:  # there once, where every step recalls them
            vectors = torch.from_numpy(query_vectors[batch]).to(model.device)
        recorder = Recorder(model, vectors)
        with model.overheard(recorder.hear):
            output = generator.generate(
                inputs=begun.token_ids,
                attention_mask=begun.mask,
                past_key_values=begun.cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder]),
                memory_lambda=lambda_,
                query_vector=vectors,
                tokenizer=tokenizer,
            )[:, begun.token_ids.shape[1] :].tolist()
        for line, number in enumerate(batch):
            length = _length(tokenizer, output[line], config)
            text = str(tokenizer.decode(output[line][:length], skip_special_tokens=True))
            answers[number] = (text.strip(), recorder.trace(line, length))
    return [answers[number] for number in range(len(prompts))]


def _length(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], config: GenerationConfig
) -> int:
    """Tokens up to and including the one that ends the answer; what follows is padding."""
    for number, token in enumerate(tokens, 1):
        if token in (config.eos_token_id or ()):
            return number
        if config.stop_strings and STOP_STRING in str(tokenizer.decode([token])):
            return number
    return len(tokens)
