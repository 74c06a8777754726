"""Passages in the prompt: the base model reads, and agrees with the memory on an answer.

What the base model reads out of a passage and what the memory remembers are wrong about different
questions. Each proposes an answer, and the one that both together find more probable is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.backbone import context_window
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.prompts import answer_ids, left_padded, prompt_ids
from mlpmem_rag.query import Vectors

BATCH = 16
STOP = "\n"
EXAMPLES = (
    (
        "The Great Barrier Reef is the world's largest coral reef system, composed of over 2,900 "
        "individual reefs. It lies in the Coral Sea, off the coast of Queensland, Australia.",
        "In which sea does the Great Barrier Reef lie?",
        "the Coral Sea",
    ),
    (
        "Marie Curie conducted pioneering research on radioactivity. She was the first woman to "
        "win a Nobel Prize, in 1903, together with her husband Pierre.",
        "Who shared the 1903 Nobel Prize with Marie Curie?",
        "her husband Pierre",
    ),
    (
        "The Amazon River in South America is the largest river by discharge volume of water in "
        "the world. It rises in Peru.",
        "Where does the Amazon River rise?",
        "Peru",
    ),
    (
        "The violin maker Antonio Stradivari was born in 1644. He made about 1,100 instruments, "
        "of which some 650 survive.",
        "How many of Stradivari's instruments survive?",
        "some 650",
    ),
)
"""Small models answer in few words when they have seen it done, whatever they are told."""


def reading_prompt(question: str, passages: Sequence[str]) -> str:
    """Plain text: the examples, the passages, the question. Without passages, closed-book."""
    blocks = [_block(question, answer, [text]) for text, question, answer in EXAMPLES]
    if not passages:
        blocks = [_block(question, answer, []) for _, question, answer in EXAMPLES]
    return "\n\n".join([*blocks, _block(question, "", passages)])


def _block(question: str, answer: str, passages: Sequence[str]) -> str:
    context = f"Context: {STOP.join(passages)}\n" if passages else ""
    return f"{context}Question: {question}\nAnswer: {answer}".rstrip(" ")


@torch.inference_mode()
def read_batch(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
) -> list[str]:
    """First line of the base model's greedy continuation of each prompt, without a full stop.

    A prompt that is longer than the context window loses its beginning.
    """
    base: Any = model.base  # torch types submodules as tensors or modules
    room = max(1, context_window(model.base) - max_new_tokens)
    ids = [encoded(tokenizer, prompt)[-room:] for prompt in prompts]
    texts: dict[int, str] = {}
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    eos = base.generation_config.eos_token_id
    pad = (eos[0] if isinstance(eos, list) else eos) or 0
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        tokens, mask = left_padded([ids[number] for number in batch], pad)
        output = base.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stop_strings=[STOP],
            tokenizer=tokenizer,
        )
        for line, number in enumerate(batch):
            text = str(tokenizer.decode(output[line, tokens.shape[1] :], skip_special_tokens=True))
            texts[number] = text.strip().split(STOP)[0].strip().rstrip(".")
    return [texts[number] for number in range(len(ids))]


def agreed_answers(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    query_vectors: Vectors | None,
    prompts: Sequence[str],
    remembered: Sequence[str],
    read: Sequence[str],
    *,
    lambda_: float | None = None,
) -> list[str]:
    """Of two answers to each question, the one more probable to memory and reader together.

    Prompts that are longer than the context window lose their beginning.

    Args:
        model: memory and base model.
        tokenizer: theirs.
        questions: what was asked.
        query_vectors: as the memory's encoder sees it. *Shape:* (N, Q).
        prompts: what the base model reads, from `reading_prompt`.
        remembered: the memory's answers.
        read: the base model's.
        lambda_: mixing weight of the memory; None: the one chosen in training.
    """
    window = context_window(model.base)
    bare = [prompt_ids(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    full = [encoded(tokenizer, prompt) for prompt in prompts]
    together = []
    for answers in (remembered, read):
        said = [answer_ids(tokenizer, a) for a in answers]
        asked = _before(bare, said, window)
        memory = answer_log_probs(model, asked, said, query_vectors, lambda_=lambda_)
        continued = [encoded(tokenizer, f" {a}{STOP}", special=False) for a in answers]
        shown = _before(full, continued, window)
        together.append(memory + answer_log_probs(model, shown, continued, None, lambda_=0.0))
    first = together[0] >= together[1]
    return [r if f else o for r, o, f in zip(remembered, read, first, strict=True)]


def _before(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], window: int
) -> list[list[int]]:
    """As much of the ends of prompts as a window holds together with their answers."""
    return [
        list(prompt)[-max(1, window - len(answer)) :]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@torch.inference_mode()
def answer_log_probs(
    model: MLPMemForCausalLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    query_vectors: Vectors | None,
    *,
    lambda_: float | None = None,
) -> npt.NDArray[np.float64]:
    """Log-probability of each answer after its prompt. *Shape:* (N,)."""
    out = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        query = None if query_vectors is None else torch.from_numpy(query_vectors[[number]])
        kept = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=ids.device)
        logits = model(
            input_ids=ids,
            use_cache=False,
            logits_to_keep=kept,
            query_vector=query,
            memory_lambda=lambda_,
        ).logits[0]
        chosen = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        out.append(float(chosen.sum()))
    return np.array(out)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text."""
    result: Any = tokenizer(text, add_special_tokens=special)
    return list(result["input_ids"])
