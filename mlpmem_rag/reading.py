"""Passages in the prompt: the base model reads, beside the memory or what the memory recalls.

What the base model reads out of a passage and what the memory remembers are wrong about different
questions. Each proposes an answer, and the one that both together find more probable is given.

Or the memory shows where to look: the sentence behind the learned question that a request is
recalled as is the passage, and that question with its answer the last example. The base model then
says whether the same is asked, or what else the sentence tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.answering import Request, sureness
from mlpmem_rag.backbone import context_window
from mlpmem_rag.confidence import Trace
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.openings import Openings
from mlpmem_rag.prompts import Prompt, answer_ids, conversation, unlike
from mlpmem_rag.questions import Question
from mlpmem_rag.recollection import SHARE, of_answer

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


def reading_prompt(
    question: str, passages: Sequence[str], recalled: Sequence[Question] = ()
) -> str:
    """Plain text: the examples, the passages, the question. Without passages, closed-book.

    Learned questions that the question may mean stand before it as further examples, the nearest
    one last: each with its sentence and the answer that was taught.
    """
    blocks = [_block(question, answer, [text]) for text, question, answer in EXAMPLES]
    if not passages:
        blocks = [_block(question, answer, []) for _, question, answer in EXAMPLES]
    blocks += [_block(near.text, near.answer, [near.source]) for near in reversed(recalled)]
    return "\n\n".join([*blocks, _block(question, "", passages)])


def _block(question: str, answer: str, passages: Sequence[str]) -> str:
    context = f"Context: {STOP.join(passages)}\n" if passages else ""
    return f"{context}Question: {question}\nAnswer: {answer}".rstrip(" ")


def reading(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    passages: Sequence[str],
    recalled: Sequence[Question] = (),
) -> Prompt:
    """`reading_prompt` as the base model reads it; its opening are the examples."""
    token_ids = encoded(tokenizer, reading_prompt(question, passages, recalled))
    others = (
        encoded(tokenizer, reading_prompt(text, [text] if passages else [])) for text in ("a", "7")
    )
    return Prompt(token_ids, unlike(token_ids, *others))


@torch.inference_mode()
def read_batch(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    openings: Openings | None = None,
    *,
    max_new_tokens: int = 24,
) -> list[str]:
    """First line of the base model's greedy continuation of each prompt, without a full stop.

    Args:
        model: its base model reads.
        tokenizer: of the base model.
        prompts: what it reads; with `max_new_tokens` they fit into its context window.
        openings: what it has read before; None: it reads all of each prompt at once, which has
            other last bits.
        max_new_tokens: most tokens of an answer.
    """
    base: Any = model.base  # torch types submodules as tensors or modules
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].token_ids))
    eos = base.generation_config.eos_token_id
    pad = (eos[0] if isinstance(eos, list) else eos) or 0
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        begun = (openings or Openings(model.base)).begin(
            [prompts[number] for number in batch], pad, shared=openings is not None
        )
        output = base.generate(
            begun.token_ids,
            attention_mask=begun.mask,
            past_key_values=begun.cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            num_return_sequences=1,
            pad_token_id=pad,
            stop_strings=[STOP],
            tokenizer=tokenizer,
        )
        for line, number in enumerate(batch):
            tokens = output[line, begun.token_ids.shape[1] :]
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            texts[number] = _first_line(text)
    return [texts[number] for number in range(len(prompts))]


def _first_line(text: str) -> str:
    return text.strip().split(STOP)[0].strip().rstrip(".")


@torch.inference_mode()
def read_recalled(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    taught: str,
    openings: Openings,
    *,
    max_new_tokens: int = 24,
) -> str:
    """What `read_batch` gives, where the answer that was taught is likely.

    That answer is read ahead with the prompt: where the base model would say it token by token, one
    pass is enough.

    Args:
        model: its base model reads.
        tokenizer: of the base model.
        prompt: see `read_batch`.
        taught: the answer to the learned question that stands last in the prompt.
        openings: see `read_batch`.
        max_new_tokens: most tokens of an answer.
    """
    draft = encoded(tokenizer, f" {taught}{STOP}", special=False)
    if len(draft) <= max_new_tokens:
        logits = _answer_logits(model, prompt, draft, None, openings, lambda_=0.0)
        if logits.argmax(-1).tolist() == draft:
            return _first_line(taught)
    (text,) = read_batch(model, tokenizer, [prompt], openings, max_new_tokens=max_new_tokens)
    return text


@dataclass(frozen=True)
class Agreed:
    """An answer, and what memory and base model think of it without the passages.

    Attributes:
        text: the answer.
        trace: of its tokens by the memory, after the question alone.
        is_remembered: whether it is the memory's own.
    """

    text: str
    trace: Trace
    is_remembered: bool


def agreed_answer(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    query_vector: Tensor | None,
    prompt: Prompt,
    remembered: str,
    read: str,
    openings: Openings | None = None,
    *,
    lambda_: float | None = None,
) -> Agreed:
    """Of two answers to a question, the one more probable to memory and reader together.

    Prompts that are longer than the context window lose their beginning.

    Args:
        model: memory and base model.
        tokenizer: theirs.
        question: what was asked.
        query_vector: as `encode_queries` gives it. *Shape:* (1, R).
        prompt: what the base model reads, from `reading`.
        remembered: the memory's answer.
        read: the base model's.
        openings: see `read_batch`.
        lambda_: mixing weight of the memory; None: the one chosen in training.
    """
    window = context_window(model.base)
    traces = answer_traces(
        model, tokenizer, question, query_vector, (remembered, read), openings, lambda_=lambda_
    )
    found = []
    for text, (alone, trace) in zip((remembered, read), traces, strict=True):
        continued = encoded(tokenizer, f" {text}{STOP}", special=False)
        shown = prompt.within(max(1, window - len(continued)))
        reader = answer_log_probs(model, shown, continued, None, openings, lambda_=0.0)
        joint = float(alone.sum() + reader.sum())
        found.append((joint, Agreed(text, trace, is_remembered=text == remembered)))
    (first, mine), (second, other) = found
    return mine if first >= second else other


@torch.inference_mode()
def answer_log_probs(
    model: MLPMemForCausalLM,
    prompt: Prompt,
    answer: Sequence[int],
    query_vector: Tensor | None,
    openings: Openings | None = None,
    *,
    lambda_: float | None = None,
) -> Tensor:
    """How probable each token of an answer is after a prompt, as `generate` has it.

    The answer that was taught to the recalled question has its share. `openings`: see `read_batch`.
    *Shape:* -> (A,).
    """
    logits = _answer_logits(model, prompt, answer, query_vector, openings, lambda_=lambda_)
    told = torch.tensor(answer, device=logits.device)
    chosen: Tensor = logits.float().log_softmax(-1).gather(1, told[:, None]).squeeze(1)
    weight = model.memory_lambda if lambda_ is None else lambda_
    if query_vector is None or weight == 0:
        return chosen
    taught = model.taught_answers(query_vector)[0].tolist()
    return of_answer(chosen, answer, taught, SHARE * weight)


def _answer_logits(
    model: MLPMemForCausalLM,
    prompt: Prompt,
    answer: Sequence[int],
    query_vector: Tensor | None,
    openings: Openings | None,
    *,
    lambda_: float | None,
) -> Tensor:
    """The logits before each token of an answer after a prompt, in one pass. *Shape:* -> (A, W)."""
    whole = Prompt([*prompt.token_ids, *answer], prompt.opening)
    begun = (openings or Openings(model.base)).begin([whole], 0, shared=openings is not None)
    ids, first = begun.token_ids, len(prompt.token_ids)
    kept = torch.arange(first - 1, ids.shape[1] - 1, device=ids.device)
    output = model(
        input_ids=begun.unread,
        past_key_values=begun.cache,
        use_cache=begun.cache is not None,
        logits_to_keep=kept - begun.read,
        query_vector=query_vector,
        memory_lambda=lambda_,
    )
    logits: Tensor = output.logits[0]
    return logits


def answer_traces(
    model: MLPMemForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    query_vector: Tensor | None,
    texts: Sequence[str],
    openings: Openings | None = None,
    *,
    lambda_: float | None = None,
) -> list[tuple[Tensor, Trace]]:
    """`answer_trace` of each of several answers to a question, which stands alone in the prompt.

    Args:
        model: memory and base model.
        tokenizer: theirs.
        question: what was asked; of one that is too long for the context window, its end.
        query_vector: as `encode_queries` gives it. *Shape:* (1, R).
        texts: the answers.
        openings: see `read_batch`.
        lambda_: mixing weight of the memory; None: the one chosen in training.
    """
    window = context_window(model.base)
    bare = conversation(tokenizer, [{"role": "user", "content": question}])
    if query_vector is None and model.query_size:  # behind an opening it would find none
        query_vector = model.queries_in(torch.tensor([bare.token_ids], device=model.device))
    found = []
    for said in (answer_ids(tokenizer, text) for text in texts):
        asked = bare.within(max(1, window - len(said)))
        found.append(answer_trace(model, asked, said, query_vector, openings, lambda_=lambda_))
    return found


@torch.inference_mode()
def answer_trace(
    model: MLPMemForCausalLM,
    prompt: Prompt,
    answer: Sequence[int],
    query_vector: Tensor | None,
    openings: Openings | None = None,
    *,
    lambda_: float | None = None,
) -> tuple[Tensor, Trace]:
    """`answer_log_probs`, and how sure the memory alone is of these tokens, if it is asked."""
    heard: list[Tensor] = []
    with model.overheard(heard.append):
        log_probs = answer_log_probs(model, prompt, answer, query_vector, openings, lambda_=lambda_)
    if not heard:
        return log_probs, Trace((), ())
    tokens = torch.tensor(answer, device=model.device)
    own, entropies = sureness(torch.cat(heard, dim=1)[0], tokens, model.memory.corpus_tokens)
    request = None if query_vector is None else Request.of(model, query_vector)
    near, support = request.means(0, tokens) if request else (0.0, 0.0)
    return log_probs, Trace(tuple(own.tolist()), tuple(entropies.tolist()), near, support)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text."""
    result: Any = tokenizer(text, add_special_tokens=special)
    return list(result["input_ids"])
