"""Which question a prompt asks, from its token ids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlpmem_rag.asked import asked_question, question_marks
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.prompts import Message, prompt_ids

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|system|>\n"
    "Be brief.<|end|>\n{% endif %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} "
    "[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"none": None, "chatml": CHATML, "inst": INST}
QUESTION = "Who found the ledger of 1887?"


@pytest.fixture(params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> Any:  # noqa: ANN401
    """A tokenizer with each kind of template, and with none."""
    tokenizer = copy.deepcopy(tiny_backbone.tokenizer)
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def found(tokenizer: Any, ids: list[int]) -> str | None:  # noqa: ANN401
    marks = question_marks(tokenizer)
    assert marks is not None
    return asked_question(tokenizer, marks, ids)


CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": QUESTION}],
    [
        {"role": "user", "content": "Where is the mill?"},
        {"role": "assistant", "content": "By the lake."},
        {"role": "user", "content": QUESTION},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_it_is_the_last_user_message(tokenizer: Any, messages: list[Message]) -> None:  # noqa: ANN401
    ids = prompt_ids(tokenizer, messages)
    assert found(tokenizer, ids) == QUESTION
    assert found(tokenizer, [*[tokenizer.pad_token_id] * 3, *ids]) == QUESTION, "left-padded"
    answer = tokenizer(" The night watchman", add_special_tokens=False)["input_ids"]
    assert found(tokenizer, [*ids, *answer]) == QUESTION, "with a part of the answer"


def test_a_system_message_changes_nothing(tiny_backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(tiny_backbone.tokenizer)
    tokenizer.chat_template = CHATML
    ids = prompt_ids(
        tokenizer, [{"role": "system", "content": "Hm."}, {"role": "user", "content": QUESTION}]
    )
    assert found(tokenizer, ids) == QUESTION


@pytest.mark.parametrize(
    "text", ["Dr. Tollen found wild honey.", "Question: who?", "Answer: nobody", ""]
)
def test_other_text_asks_nothing(tokenizer: Any, text: str) -> None:  # noqa: ANN401
    assert found(tokenizer, tokenizer(text)["input_ids"]) is None


def test_an_unfinished_prompt_asks_nothing(tokenizer: Any) -> None:  # noqa: ANN401
    ids = prompt_ids(tokenizer, CONVERSATIONS[0])
    assert found(tokenizer, ids[:-3]) is None


def test_a_template_that_takes_no_conversation_is_no_help(tiny_backbone: Backbone) -> None:
    tokenizer = copy.deepcopy(tiny_backbone.tokenizer)
    for template in ("{{ raise_exception('no') }}", "always the same"):
        tokenizer.chat_template = template
        assert question_marks(tokenizer) is None


# The model asks by itself.

GATE = Gate(asked=(0.3, -0.2, -0.4, 0.1, 0.05, 0.2), plain=(0.1, 0.1, 0.2, 0.0, 0.1, -0.5))


@pytest.fixture
def model(tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]) -> Any:  # noqa: ANN401
    """A memory whose encoder is the base model itself."""
    return memory_on(tiny_backbone, query_size=32, encoder="pooled", gate=GATE)


def prompts(model: Any, *questions: str) -> list[Tensor]:  # noqa: ANN401
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [torch.tensor([prompt_ids(model.tokenizer, messages)]) for messages in asked]


def test_a_prompt_is_answered_as_when_its_question_is_given(model: Any) -> None:  # noqa: ANN401
    (ids,) = prompts(model, QUESTION)
    given = {"query_vector": model.encode_queries([QUESTION])}
    with torch.no_grad():
        expected = model(input_ids=ids, **given).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids, query_text=QUESTION).logits, expected)
        nothing = {"query_vector": torch.zeros(1, 32)}
        assert not torch.allclose(model(input_ids=ids, **nothing).logits, expected, atol=0.01)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}):
        expected = model.generate(ids, **settings, **options, **given)
        assert torch.equal(model.generate(ids, **settings, **options), expected), options
        found = model.generate(ids, query_text=QUESTION, **settings, **options)
        assert torch.equal(found, expected), options


def test_each_row_asks_for_itself(model: Any) -> None:  # noqa: ANN401
    """Two questions and a text that asks nothing, in one left-padded batch."""
    rows = [*prompts(model, QUESTION, "Where?"), torch.tensor([[0, 90, 91, 92]])]
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.full((3, longest), 2), torch.zeros(3, longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row, 1
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for number, row in enumerate(rows):
            alone = model(input_ids=row).logits[0, -1]
            torch.testing.assert_close(together[number, -1], alone, rtol=1e-4, atol=1e-4)


def test_rows_that_ask_nothing_are_as_without_a_request(model: Any) -> None:  # noqa: ANN401
    ids = torch.tensor([[0, 90, 91, 92]])
    nothing = {"query_vector": torch.zeros(1, 32)}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, **nothing).logits, model(input_ids=ids).logits)


def test_a_vector_and_a_text_are_one_too_many(model: Any) -> None:  # noqa: ANN401
    (ids,) = prompts(model, QUESTION)
    with pytest.raises(ConfigError, match="give one of them"):
        model(input_ids=ids, query_text=QUESTION, query_vector=torch.zeros(1, 32))


def test_texts_for_another_number_of_rows_are_refused(model: Any) -> None:  # noqa: ANN401
    (ids,) = prompts(model, QUESTION)
    with pytest.raises(ConfigError, match=r"shape \(2, 32\)"):
        model(input_ids=ids, query_text=[QUESTION, QUESTION])
