"""Openings: what prompts begin with is read once, and every answer stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mlpmem_rag.answering import answer_batch
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.decoding import Decoding
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.openings import KEPT, SHORTEST, Openings, continued
from mlpmem_rag.prompts import conversation, prompt_ids
from mlpmem_rag.reading import agreed_answer, reading

HOUSE = "You answer for the archive."
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<system> " + HOUSE + "\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST, SECOND = "Who found wild honey?", "What was sold for 42 crowns?"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def memory(tiny_memory: Path, tokenizer: PreTrainedTokenizerBase) -> MemoryModel:
    loaded = MemoryModel.load(tiny_memory, device="cpu", dtype="float32")
    return MemoryModel(loaded.model, tokenizer, loaded.encoder, loaded.confidence)


@pytest.fixture
def read(memory: MemoryModel) -> Iterator[list[int]]:
    """How many tokens each forward pass of the base model reads."""
    widths: list[int] = []

    def note(_: object, args: tuple[torch.Tensor, ...]) -> None:
        widths.append(args[0].shape[1])

    handle = memory.model.base.get_input_embeddings().register_forward_pre_hook(note)
    yield widths
    handle.remove()


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_opening_ends_where_the_question_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = conversation(tokenizer, asked(FIRST))
    assert prompt.token_ids == prompt_ids(tokenizer, asked(FIRST))
    opening = str(tokenizer.decode(prompt.token_ids[: prompt.opening], skip_special_tokens=True))
    assert opening.rstrip() == f"<system> {HOUSE}\n<user>"


def test_a_system_message_belongs_to_the_opening(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "system", "content": "Be brief."}, *asked(FIRST), *asked(SECOND)]
    prompt = conversation(tokenizer, talk)
    opening = str(tokenizer.decode(prompt.token_ids[: prompt.opening], skip_special_tokens=True))
    assert opening.rstrip() == "<system> Be brief.\n<user>"


def test_a_conversation_that_begins_otherwise_has_no_opening(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    talk = [{"role": "assistant", "content": "Good day."}, *asked(FIRST)]
    assert conversation(tokenizer, talk).opening == 0


def test_the_second_question_is_read_from_where_it_begins(
    memory: MemoryModel, read: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = (conversation(tokenizer, asked(text)) for text in (FIRST, SECOND))
    memory.answer(FIRST, max_new_tokens=1)
    assert read == [first.opening, len(first.token_ids) - first.opening]
    read.clear()
    answer = memory.answer(SECOND, max_new_tokens=1)
    assert read == [len(second.token_ids) - second.opening]
    assert answer.prompt_tokens == len(second.token_ids)


@pytest.mark.parametrize("question", [FIRST, SECOND])
def test_the_answer_is_that_of_the_whole_prompt(memory: MemoryModel, question: str) -> None:
    ids = torch.tensor([prompt_ids(memory.tokenizer, asked(question))])
    whole = memory.model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    memory.answer("Was it here before?", max_new_tokens=3)
    new = whole[0, ids.shape[1] :]
    text = str(memory.tokenizer.decode(new, skip_special_tokens=True)).strip()
    for _ in range(2):  # with the opening as it was left by an answer
        assert memory.answer(question, max_new_tokens=12).text == text


def test_memory_and_reader_agree_as_on_whole_prompts(
    tiny_backbone: Backbone,
    memory_on: Callable[..., MLPMemForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = memory_on(tiny_backbone, query_size=32, encoder="pooled")
    model.tokenizer = tokenizer
    monkeypatch.setattr(model.base.config, "max_position_embeddings", 4096)
    prompt = reading(tokenizer, FIRST, ["Ines Maro found wild honey."])
    vector, elsewhere = model.encode_queries([FIRST, "What rained?"]).split(1)
    openings = Openings(model.base)
    texts = ("wild honey", "Ines Maro")
    whole = agreed_answer(model, tokenizer, FIRST, vector, prompt, *texts)
    # With the opening as it was left by an answer; and where the model finds what is asked itself.
    for told in (vector, vector, None):
        found = agreed_answer(model, tokenizer, FIRST, told, prompt, *texts, openings)
        assert found.text == whole.text
        assert found.trace.entropies == pytest.approx(whole.trace.entropies, abs=1e-3)
    other = agreed_answer(model, tokenizer, FIRST, elsewhere, prompt, *texts, openings)
    assert other.trace.entropies != pytest.approx(whole.trace.entropies, abs=1e-3)


def test_an_answer_does_not_depend_on_what_was_asked_before(memory: MemoryModel) -> None:
    fresh = memory.answer(SECOND, max_new_tokens=8)
    memory.answer(FIRST, max_new_tokens=8)
    again = memory.answer(SECOND, max_new_tokens=8)
    assert (again.text, again.confidence) == (fresh.text, fresh.confidence)


def test_the_base_model_alone_reads_all_at_once(
    memory: MemoryModel, read: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    memory.answer(FIRST, max_new_tokens=1, lambda_=0.0)
    assert read == [len(prompt_ids(tokenizer, asked(FIRST)))]


def test_a_prompt_that_lost_its_beginning_is_read_as_it_is(
    memory: MemoryModel, read: list[int]
) -> None:
    decoding = Decoding(max_new_tokens=memory.context_window - SHORTEST)
    for _ in memory.reply(asked(FIRST), decoding):
        break
    assert read[0] == SHORTEST


def test_every_family_goes_on_from_an_opening(family_folder: Path) -> None:
    backbone = load_backbone(str(family_folder), device="cpu", dtype="float32")
    ids = torch.arange(3, 33)[None]
    openings = Openings(backbone.model)
    with torch.inference_mode():
        whole = backbone.model(input_ids=ids).logits
        for _ in range(2):
            rest = backbone.model(
                input_ids=ids[:, 20:], past_key_values=openings.cache(range(3, 23))
            ).logits
            torch.testing.assert_close(rest, whole[:, 20:], atol=1e-5, rtol=1e-5)


def test_the_openings_used_last_are_kept(memory: MemoryModel, read: list[int]) -> None:
    openings = Openings(memory.model.base)
    texts = [range(first, first + SHORTEST) for first in range(KEPT + 1)]
    for text in (*texts[:KEPT], texts[0], texts[KEPT]):
        openings.cache(text)
    assert len(read) == KEPT + 1
    openings.cache(texts[0])
    assert len(read) == KEPT + 1  # still there
    openings.cache(texts[1])
    assert len(read) == KEPT + 2  # gone: it was the one not used for longest


def test_a_short_beginning_is_not_worth_it(memory: MemoryModel, read: list[int]) -> None:
    assert Openings(memory.model.base).cache(range(SHORTEST - 1)) is None
    assert not read


class WritesInPlace(DynamicLayer):
    """A layer that overwrites what it holds, as those of other architectures do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        self.keys.mul_(2)
        return key_states, value_states


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer, WritesInPlace])
def test_what_goes_on_from_a_cache_leaves_it_as_it_is(kind: type[DynamicLayer]) -> None:
    kept: Any = DynamicCache()
    sliding = kind is DynamicSlidingWindowLayer
    kept.layers = [DynamicSlidingWindowLayer(6) if sliding else DynamicLayer()]
    start = torch.arange(40.0).reshape(1, 2, 5, 4)
    kept.update(start, -start, 0)
    if kind is WritesInPlace:
        kept.layers[0].__class__ = WritesInPlace
    one: Any = continued(kept)
    other: Any = continued(kept)
    for cache in (one, other):
        for _ in range(3):
            cache.update(torch.full((1, 2, 2, 4), 7.0), torch.zeros(1, 2, 2, 4), 0)
        cache.batch_repeat_interleave(2)
    keys, values = kept.layers[0].keys, kept.layers[0].values
    torch.testing.assert_close(keys, start, rtol=0, atol=0)
    torch.testing.assert_close(values, -start, rtol=0, atol=0)
    assert kept.get_seq_length() == 5
    torch.testing.assert_close(one.layers[0].keys, other.layers[0].keys, rtol=0, atol=0)
    assert one.get_seq_length() == (5 if kind is WritesInPlace else 11)


def test_an_opening_read_in_another_number_format_is_read_anew(memory: MemoryModel) -> None:
    memory.answer(FIRST, max_new_tokens=2)
    memory.model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert memory.answer(SECOND, max_new_tokens=2).new_tokens == 2


SETTINGS: list[dict[str, Any]] = [
    {"use_cache": False},
    {"num_beams": 2},
    {"num_return_sequences": 2, "do_sample": True},
    {"cache_implementation": "static"},
    {"stop_strings": ["never there"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_settings_of_the_base_models_own_change_no_greedy_answer(
    memory: MemoryModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left open, transformers fills in from them."""
    weights = [0.9, 0.4]  # with early exit, and without
    expected = [memory.answer(FIRST, max_new_tokens=8, lambda_=w).text for w in weights]
    base = memory.model.base
    for name, value in settings.items():
        monkeypatch.setattr(base.generation_config, name, value)
    fresh = MemoryModel(memory.model, memory.tokenizer, memory.encoder, memory.confidence)
    found = [fresh.answer(FIRST, max_new_tokens=8, lambda_=w).text for w in weights]
    assert found == expected
    for weight, text in zip(weights, expected, strict=True):
        (one, _), _ = answer_batch(
            fresh.model,
            fresh.tokenizer,
            [FIRST, SECOND],
            None,
            max_new_tokens=8,
            lambda_=weight,
        )
        assert one == text


def test_layers_that_count_places_share_no_opening_with_padding(
    tiny_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = load_backbone(str(tiny_folder), device="cpu", dtype="float32").model
    prompts = [conversation(tokenizer, asked(text)) for text in (FIRST, SECOND)]
    assert len({len(prompt.token_ids) for prompt in prompts}) == 2
    assert Openings(base).begin(prompts, 0).read
    for name, value in (("attention_chunk_size", 16), ("model_type", "mpt"), ("sliding_window", 9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base.config, name, value, raising=False)
            assert not Openings(base).begin(prompts, 0).read
            assert Openings(base).begin(prompts[:1] * 2, 0).read, "there is no padding"
