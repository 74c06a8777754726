"""Prompts, compared with what transformers itself renders."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.prompts import answer_ids, asked_text, chats, prompt_ids

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": " Where is it? "}]


def test_a_chat_template_is_used_as_it_is(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    text = str(tokenizer.decode(prompt_ids(tokenizer, ASKED)))
    assert text.endswith("<user> Where is it? \n<assistant>")
    assert chats(tokenizer)


def test_without_a_template_a_conversation_becomes_lines(bare_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bare_folder)
    messages = [
        {"role": "system", "content": "Be short."},
        *ASKED,
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "And now?"},
    ]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)) == (
        "Context: Be short.\nQuestion: Where is it?\nAnswer: Here.\nQuestion: And now?\nAnswer:"
    )
    assert not chats(tokenizer)


def test_an_answer_ends_as_generation_stops(tiny_folder: Path, bare_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    *answer, end = answer_ids(tokenizer, "Paris")
    assert (tokenizer.decode(answer), end) == ("Paris", tokenizer.eos_token_id)
    plain = AutoTokenizer.from_pretrained(bare_folder)
    assert plain.decode(answer_ids(plain, "Paris")) == " Paris\n"


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": " \n"}]])
def test_an_empty_question_is_refused(tiny_folder: Path, messages: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match="question is empty"):
        prompt_ids(AutoTokenizer.from_pretrained(tiny_folder), messages)


def test_a_template_without_a_system_role_gets_its_text_with_the_question(
    tiny_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    refusing = "{{ raise_exception('no system role') if messages[0].role == 'system' }}"
    tokenizer.chat_template = refusing + TEMPLATE
    system = {"role": "system", "content": "Be short."}
    merged = [{"role": "user", "content": "Be short.\n\n Where is it? "}]
    assert prompt_ids(tokenizer, [system, *ASKED]) == prompt_ids(tokenizer, merged)


def test_what_a_template_refuses_is_named(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"roles must alternate.*its roles were user, user"):
        prompt_ids(tokenizer, ASKED * 2)


def test_the_users_last_message_is_what_is_asked() -> None:
    said = {"role": "assistant", "content": "Here."}
    assert asked_text([*ASKED, said]) == " Where is it? "
    assert asked_text([said]) == "Here."
