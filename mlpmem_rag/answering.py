"""Greedy answers to many questions at once, with what was sure and unsure on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.backbone import context_window
from mlpmem_rag.confidence import Trace
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.prompts import STOP_STRING, chats, fitting, left_padded, prompt_ids
from mlpmem_rag.query import Vectors

BATCH = 64


class Recorder(LogitsProcessor):
    """Notes the distribution of every step, and changes nothing.

    Given how familiar the requests are, it notes that as well. *Shape:* B numbers.
    """

    def __init__(self, familiarity: Sequence[float] | None = None) -> None:
        self._familiarity = familiarity
        self._steps: list[Tensor] = []  # log-probabilities and entropies, (2, B) each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*Shapes:* (B, T), (B, W) -> (B, W)."""
        self.note(scores)
        return scores

    def note(self, scores: Tensor) -> None:
        """The next step's logits; nobody waits for what is noted. *Shape:* (B, W)."""
        log_probs = scores.float().log_softmax(-1)
        entropies = torch.special.entr(log_probs.exp()).sum(-1)
        self._steps.append(torch.stack([log_probs.max(-1).values, entropies]))

    @property
    def num_steps(self) -> int:
        """Steps noted so far."""
        return len(self._steps)

    def trace(self, line: int, length: int) -> Trace:
        """Of one sequence of the batch, up to its last token."""
        steps = [step[:, line] for step in self._steps[:length]]
        log_probs, entropies = torch.stack(steps, dim=1).tolist() if steps else ((), ())
        familiarity = self._familiarity[line] if self._familiarity else 0.0
        return Trace(tuple(log_probs), tuple(entropies), familiarity)


def generation_config(
    model: MLPMemForCausalLM, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy, to the end of the answer as base model or tokenizer mark it."""
    marks = model.generation_config.eos_token_id
    ends = list(marks) if isinstance(marks, list) else [marks]
    # Answers were taught with the tokenizer's mark, which need not be the model's.
    eos = sorted({mark for mark in (*ends, tokenizer.eos_token_id) if mark is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
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
    """The answers that `MemoryModel.answer` gives one by one. *Shape:* vectors (N, Q)."""
    window = context_window(model.base)
    asked = [prompt_ids(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    prompts = [fitting(ids, window, max_new_tokens) for ids in asked]
    config = generation_config(model, tokenizer, max_new_tokens)
    generator: Any = model  # generate() is annotated for other classes
    answers: dict[int, tuple[str, Trace]] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        ids, mask = left_padded([prompts[number] for number in batch], config.pad_token_id)
        vectors = None if query_vectors is None else torch.from_numpy(query_vectors[batch])
        recorder = Recorder(None if vectors is None else model.familiarity(vectors))
        output = generator.generate(
            inputs=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder]),
            memory_lambda=lambda_,
            query_vector=vectors,
            tokenizer=tokenizer,
        )[:, ids.shape[1] :].tolist()
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
