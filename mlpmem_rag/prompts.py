"""How a question is put to the base model, in training and in use alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.errors import ConfigError

Message = dict[str, str]
"""`{"role": "user" | "assistant" | "system", "content": text}`."""

STOP_STRING = "\n"
"""Ends an answer of a model that has no chat template."""

NAMES = {"user": "Question", "assistant": "Answer"}


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        token_ids: all of it.
        opening: how many at its beginning are the same whatever is asked.
    """

    token_ids: list[int]
    opening: int = 0

    def within(self, room: int) -> Prompt:
        """As much of its end as there is room for; cut, it begins like no other."""
        return self if len(self.token_ids) <= room else Prompt(self.token_ids[-room:])


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Prompt:
    """`prompt_ids`, and how far they depend on the system message alone.

    Raises:
        ConfigError: as `prompt_ids`.
    """
    token_ids = prompt_ids(tokenizer, messages)
    system = [m for m in messages[:1] if m["role"] == "system"]
    if messages[: len(system) + 1][-1]["role"] != "user":
        return Prompt(token_ids)
    others = (prompt_ids(tokenizer, [*system, _asking(text)]) for text in ("a", "7"))
    return Prompt(token_ids, unlike(token_ids, *others))


def _asking(text: str) -> Message:
    return {"role": "user", "content": text}


def unlike(token_ids: Sequence[int], one: Sequence[int], other: Sequence[int]) -> int:
    """Where a prompt begins to differ from its like, which are made of one text and of another.

    0 where it begins like neither.
    """
    opening = _common(one, other)
    return opening if _common(one, token_ids) >= opening else 0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def chats(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the base model brings its own form of a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids up to where the answer begins.

    In the model's chat template; without one as `Question: …` and `Answer:` lines.

    Raises:
        ConfigError: there is no message, the last one is empty, or the template refuses them.
    """
    check_asked(messages)
    if chats(tokenizer):
        try:
            return _templated(tokenizer, messages)
        except TemplateError as error:
            if messages[0]["role"] == "system" and len(messages) > 1:
                return prompt_ids(tokenizer, _without_system(messages))
            raise ConfigError(
                f"the base model's chat template does not take these messages ({error}); its "
                f"roles were {', '.join(m['role'] for m in messages)}"
            ) from error
    lines = [f"{NAMES.get(m['role'], 'Context')}: {m['content'].strip()}" for m in messages]
    plain: Any = tokenizer("\n".join([*lines, "Answer:"]))
    return list(plain["input_ids"])


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """For templates that know no such role: its text goes before the next message's."""
    system, first, *others = messages
    content = f"{system['content']}\n\n{first['content']}"
    return [{"role": first["role"], "content": content}, *others]


def check_asked(messages: Sequence[Message]) -> None:
    """Refuse a conversation that asks nothing.

    Raises:
        ConfigError: there is no message, or the last one is empty.
    """
    if not messages or not messages[-1]["content"].strip():
        raise ConfigError("the question is empty; ask something")


def asked_text(messages: Sequence[Message]) -> str:
    """What is being asked: the user's last message (the last of all where there is none)."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    return users[-1] if users else messages[-1]["content"]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands, with the mark of its beginning once."""
    begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    encoded: Any = tokenizer(text, add_special_tokens=not begun)
    return list(encoded["input_ids"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer as the model is to give it, its end included."""
    if chats(tokenizer) and tokenizer.eos_token_id is not None:
        encoded: Any = tokenizer(answer, add_special_tokens=False)
        return [*encoded["input_ids"], int(tokenizer.eos_token_id)]
    plain: Any = tokenizer(f" {answer}{STOP_STRING}", add_special_tokens=False)
    return list(plain["input_ids"])


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of sequences that are to be continued. *Shapes:* (B, T), (B, T)."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros_like(ids)
    for line, sequence in enumerate(sequences):
        ids[line, longest - len(sequence) :] = torch.tensor(sequence)
        mask[line, longest - len(sequence) :] = 1
    return ids, mask
