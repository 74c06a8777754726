"""Which question a prompt asks: the user's last message, in the form that `prompts.py` gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.prompts import NAMES, chats

_FIRST, _REPLY, _SECOND = "mlpmem-first", "mlpmem-reply", "mlpmem-second"


@dataclass(frozen=True)
class Marks:
    """What stands in a prompt before the user's message and between it and the answer."""

    before: str
    after: str

    def ends(self, text: str) -> bool:
        """Whether a text ends where the answer to the last message begins."""
        return text.rstrip().endswith(self.after.rstrip())

    def question(self, text: str) -> str | None:
        """The last message that is followed by the beginning of an answer; None: there is none."""
        end = text.rfind(self.after)
        start = text.rfind(self.before, 0, end) if end >= 0 else -1
        if start < 0:
            return None
        return text[start + len(self.before) : end].strip() or None


def question_marks(tokenizer: PreTrainedTokenizerBase) -> Marks | None:
    """How prompts of this tokenizer show a question.

    Taken from a conversation in its chat template; None where the template takes none. Without a
    template, `Question: …` and `Answer:` lines.
    """
    if not chats(tokenizer):
        return Marks(f"{NAMES['user']}: ", f"\n{NAMES['assistant']}:")
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", _FIRST), ("assistant", _REPLY), ("user", _SECOND))
    ]
    try:
        shown = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError):
        return None
    if not all(shown.count(text) == 1 for text in (_FIRST, _REPLY, _SECOND)):
        return None
    before, rest = shown.split(_FIRST)
    between, after = rest.split(_REPLY)[1].split(_SECOND)
    before = _common_end(before, between)
    return Marks(before, after) if before and after else None


def asked_question(
    tokenizer: PreTrainedTokenizerBase, marks: Marks, token_ids: Sequence[int]
) -> str | None:
    """The question of a prompt, answered in part or not; None: this is no prompt. *Shape:* (T,)."""
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return marks.question(str(text))


def _common_end(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-length - 1] == second[-length - 1]:
        length += 1
    return first[len(first) - length :]
