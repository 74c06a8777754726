"""Memory and RAG together: prompts, reading, and the answer both agree on."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.answering import LEAST
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import context_window, load_backbone
from mlpmem_rag.confidence import Confidence, Trace
from mlpmem_rag.errors import ClosedError, ConfigError
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory
from mlpmem_rag.openings import Openings
from mlpmem_rag.prompts import Prompt, answer_ids, prompt_ids
from mlpmem_rag.provenance import Recalled
from mlpmem_rag.questions import Question
from mlpmem_rag.reading import (
    EXAMPLES,
    agreed_answer,
    answer_log_probs,
    answer_trace,
    encoded,
    read_batch,
    read_recalled,
    reading,
    reading_prompt,
)


def test_the_prompt_ends_where_the_answer_begins() -> None:
    prompt = reading_prompt("Who hung it?", ["A lamp hung.", "Ann hung it."])
    assert prompt.endswith(
        "\n\nContext: A lamp hung.\nAnn hung it.\nQuestion: Who hung it?\nAnswer:"
    )
    assert all(f"Context: {text}\n" in prompt for text, _, _ in EXAMPLES)


def test_learned_questions_stand_before_the_question_the_nearest_last() -> None:
    far = Question("What hung?", "a lamp", "A lamp hung.", "d")
    near = Question("Who hung a lamp?", "Ann", "Ann hung it.", "d")
    prompt = reading_prompt("Who hung it?", ["Ann hung it.", "A lamp hung."], [near, far])
    assert prompt.endswith(
        f"\nAnswer: {EXAMPLES[-1][2]}"
        "\n\nContext: A lamp hung.\nQuestion: What hung?\nAnswer: a lamp"
        "\n\nContext: Ann hung it.\nQuestion: Who hung a lamp?\nAnswer: Ann"
        "\n\nContext: Ann hung it.\nA lamp hung.\nQuestion: Who hung it?\nAnswer:"
    )


def test_without_passages_there_is_no_context() -> None:
    prompt = reading_prompt("Who hung it?", [])
    assert "Context" not in prompt
    assert prompt.count("Question:") == len(EXAMPLES) + 1


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> tuple[MLPMemForCausalLM, PreTrainedTokenizerBase]:
    """A tiny base model with an untrained memory."""
    backbone = load_backbone(str(tiny_folder), device="cpu", dtype="float32")
    config = MemoryConfig(backbone.hidden_size, 24, 1, "silu", gated=True, vocab_size=40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        memory = Memory(config)
    memory.corpus_tokens.copy_(torch.arange(40))
    settings = MemorySettings(backbone.reference, backbone.layer, config, 0.4, 1.0)
    return attach_memory(backbone, memory, settings), backbone.tokenizer


def test_log_probabilities_are_those_of_the_mixture(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = pair
    prompts = [encoded(tokenizer, text) for text in ("a lamp hung over", "the ledger")]
    answers = [[5, 250], [7, 8, 299]]  # the memory knows the first forty tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        found, trace = answer_trace(model, Prompt(prompt), answer, None)
        with torch.inference_mode():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            alone = model(torch.tensor([prompt + answer]), memory_lambda=1.0).logits[0]
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected = [log_probs[p, t].item() for p, t in zip(places, answer, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        own = [alone[p, t].item() for p, t in zip(places, answer, strict=True)]
        assert trace.log_probs == pytest.approx([*own[:-1], LEAST], rel=1e-4)
        assert min(own[:-1]) > LEAST > own[-1]
        entropies = [torch.special.entr(alone[p].exp()).sum().item() for p in places]
        assert trace.entropies == pytest.approx(entropies, rel=1e-4)
        unmixed, none = answer_trace(model, Prompt(prompt), answer, None, lambda_=0.0)
        assert none == Trace((), ())
        torch.testing.assert_close(
            unmixed, answer_log_probs(model, Prompt(prompt), answer, None, lambda_=0)
        )


def test_prompts_are_read_together_as_alone(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = pair
    asked: tuple[tuple[str, list[str]], ...] = (("Who?", []), ("Where was it?", ["A quay."]))
    prompts = [reading(tokenizer, q, c).within(context_window(model.base) - 6) for q, c in asked]
    together = read_batch(model, tokenizer, prompts, max_new_tokens=6)
    alone = [read_batch(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone


def test_the_jointly_more_probable_answer_is_given(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = pair
    question, remembered, read = "Who hung the lamp?", "the ledger of a clerk", "ann"
    prompt = reading(tokenizer, question, ["Ann hung it."])
    bare = Prompt(prompt_ids(tokenizer, [{"role": "user", "content": question}]))
    joint = []
    for text in (remembered, read):
        line = encoded(tokenizer, f" {text}\n", special=False)
        own = answer_log_probs(model, bare, answer_ids(tokenizer, text), None)
        reader = answer_log_probs(model, prompt, line, None, lambda_=0.0)
        joint.append(float(own.sum() + reader.sum()))
    expected = remembered if joint[0] >= joint[1] else read
    found = agreed_answer(model, tokenizer, question, None, prompt, remembered, read)
    assert found.text == expected
    assert found.is_remembered == (expected == remembered)
    swapped = agreed_answer(model, tokenizer, question, None, prompt, read, remembered)
    assert (swapped.text, swapped.is_remembered) == (expected, expected == read)
    assert joint[0] != pytest.approx(joint[1])


def test_the_confidence_is_that_of_the_text_given(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    confidence = Confidence((0.3, -0.2, 0.05, 0.1, 0.2, -0.1, 0.0, 0.3, 0.4))
    memory = MemoryModel(*pair, confidence=confidence)
    question, passages = "Who hung it?", ["Ann hung it."]
    alone = memory.answer(question, max_new_tokens=4)
    given = set()
    for read in ("ann", "the the the the the the the the ledger of quay"):
        monkeypatch.setattr(
            "mlpmem_rag.memory_model.read_batch", lambda *_, read=read, **__: [read]
        )
        both = memory.answer(question, max_new_tokens=4, passages=passages)
        if both.text == alone.text:
            assert both.confidence == alone.confidence
        else:
            bare = Prompt(prompt_ids(memory.tokenizer, [{"role": "user", "content": question}]))
            _, trace = answer_trace(memory.model, bare, answer_ids(memory.tokenizer, read), None)
            assert both.confidence == pytest.approx(confidence.of(trace))
        given.add(both.text == alone.text)
    assert given == {True, False}


def test_what_is_recalled_is_read_where_the_memory_is_not_sure(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    unsure = Confidence((0.3, -0.2, 0.05, 0.1, 0.2, -0.1, 0.0, 0.3, -4.0))
    memory = MemoryModel(*roomy, confidence=unsure)
    question = "Who hung it?"
    near = [Question("Who hung a lamp?", "Ann", "Ann hung it.", "d")]
    near += [Question("What did Ann hang?", "it", "Ann hung it.", "d")]
    recalled = [Recalled(one, 0.5) for one in near]
    prompt = reading(memory.tokenizer, question, ["Ann hung it."], near)
    assert prompt.opening == reading(memory.tokenizer, question, ["Ann hung it."]).opening
    (text,) = read_batch(memory.model, memory.tokenizer, [prompt], max_new_tokens=5)
    alone = memory.answer(question, max_new_tokens=5)
    found = memory.answer(question, max_new_tokens=5, recalled=recalled)
    bare = Prompt(prompt_ids(memory.tokenizer, [{"role": "user", "content": question}]))
    said = answer_ids(memory.tokenizer, text)
    _, trace = answer_trace(memory.model, bare, said, None)
    assert (found.text, found.read) == (text, ("Ann hung it.",))
    assert text != alone.text
    assert alone.confidence is not None
    assert found.confidence == pytest.approx(unsure.of(trace), rel=1e-3)
    assert found.prompt_tokens == alone.prompt_tokens + len(prompt.token_ids)
    assert found.new_tokens == alone.new_tokens + len(said)
    refused = memory.answer(question, max_new_tokens=5, recalled=recalled, threshold=0.9)
    assert refused.text == "not in my documents"
    unmixed = memory.answer(question, max_new_tokens=5, recalled=recalled, lambda_=0.0)
    assert (unmixed.text, unmixed.confidence) == (text, None)
    with pytest.raises(ConfigError, match="both passages and recalled are given"):
        memory.answer(question, passages=["Ann hung it."], recalled=recalled)

    memory.confidence = replace(unsure, weights=(*unsure.weights[:-1], 9.0))
    sure = memory.answer(question, max_new_tokens=5, recalled=recalled)
    assert (sure.text, sure.read) == (alone.text, ())
    assert sure.prompt_tokens == alone.prompt_tokens


@pytest.mark.parametrize("likely", [True, False])
def test_a_taught_answer_that_is_the_readers_too_takes_one_pass(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], likely: bool
) -> None:
    model, tokenizer = roomy
    near = [Question("Who hung a lamp?", "the ledger", "Ann hung it.", "d")]
    prompt = reading(tokenizer, "Who hung it?", ["Ann hung it."], near)
    taught = encoded(tokenizer, " the ledger\n", special=False)
    spoken = taught if likely else [*taught[:1], *encoded(tokenizer, " quay\n", special=False)]
    follows = dict(itertools.pairwise([prompt.token_ids[-1], *spoken]))
    assert len(follows) == len(spoken)
    read: list[torch.Tensor] = []

    def say(_: object, __: object, logits: torch.Tensor) -> None:
        ids, rows = read[-1], logits.shape[1]
        for row, token in zip(
            logits[0], ids[-1:] if rows == 1 else ids[-1 - rows : -1], strict=True
        ):
            if int(token) in follows:
                row[follows[int(token)]] += 1000

    def note(_: object, args: tuple[torch.Tensor, ...], __: object) -> None:
        read.append(args[0][0])

    base: Any = model.base
    openings = Openings(base)
    openings.begin([prompt], 0, shared=True)
    hooks = [
        base.get_input_embeddings().register_forward_hook(note),
        base.get_output_embeddings().register_forward_hook(say),
    ]
    try:
        (expected,) = read_batch(model, tokenizer, [prompt], openings)
        taken = len(read)
        assert read_recalled(model, tokenizer, prompt, "the ledger", openings) == expected
    finally:
        for hook in hooks:
            hook.remove()
    assert (expected == "the ledger") == likely
    assert (taken, len(read) - taken) == (len(spoken), 1 if likely else 1 + len(spoken))


def test_reading_has_its_turn_and_ends_with_the_memory(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, threads = MemoryModel(*pair), []

    def read(*_: object, **__: object) -> list[str]:
        threads.append(threading.current_thread().name)
        return ["ann"]

    monkeypatch.setattr("mlpmem_rag.memory_model.read_batch", read)
    memory.answer("Who hung it?", max_new_tokens=4, passages=["Ann hung it."])
    assert [name.rsplit("_", 1)[0] for name in threads] == ["mlpmem-generate"]
    memory.close()
    with pytest.raises(ClosedError):
        memory.answer("Who hung it?", max_new_tokens=4, passages=["Ann hung it."])


def test_an_answer_with_passages_counts_both_prompts(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    memory = MemoryModel(*pair)
    alone = memory.answer("Who hung it?", max_new_tokens=4)
    both = memory.answer("Who hung it?", max_new_tokens=4, passages=["Ann hung it."])
    whole = reading(memory.tokenizer, "Who hung it?", ["Ann hung it."])
    kept = whole.within(memory.room_for_prompt(4))
    assert 0 < len(kept.token_ids) < len(whole.token_ids), "the window is small"
    assert both.prompt_tokens == alone.prompt_tokens + len(kept.token_ids)
    assert both.cut_tokens == alone.cut_tokens + len(whole.token_ids) - len(kept.token_ids)
    (read,) = read_batch(memory.model, memory.tokenizer, [kept], max_new_tokens=4)
    assert both.text in {alone.text, read}
    assert (alone.read, both.read) == ((), ("Ann hung it.",))


def test_passages_beyond_the_window_lose_their_beginning(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, lengths = MemoryModel(*pair), []
    monkeypatch.setattr(memory.model.base.config, "max_position_embeddings", 128)

    def note(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        positions = kwargs.get("position_ids")
        if positions is not None:
            lengths.append(int(positions.max()) + 1)

    with memory.model.base.base_model.register_forward_pre_hook(note, with_kwargs=True):
        answer = memory.answer("Who? " * 200, max_new_tokens=4, passages=["Ann hung it. " * 400])
    assert answer.text
    assert max(lengths) <= 128


@pytest.fixture
def roomy(
    pair: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> tuple[MLPMemForCausalLM, PreTrainedTokenizerBase]:
    """The same, with room for the examples and what comes after them."""
    monkeypatch.setattr(pair[0].base.config, "max_position_embeddings", 4096)
    return pair


def test_the_examples_are_the_opening(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = roomy
    for passages in (["Ann hung it."], ["A quay.", "The ledger."], []):
        prompt = reading(tokenizer, "Who hung it?", passages)
        assert prompt.token_ids == encoded(tokenizer, reading_prompt("Who hung it?", passages))
        said = tokenizer.decode(prompt.token_ids[: prompt.opening])
        left = tokenizer.decode(prompt.token_ids[prompt.opening :])
        assert EXAMPLES[-1][2] in said
        assert "Who hung it?" in left
        assert len(left) < 120


def test_with_the_examples_read_before_the_answers_are_the_same(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = roomy
    asked = (("Who hung it?", ["Ann hung it."]), ("Where?", ["A quay lies there, they say."]))
    prompts = [reading(tokenizer, question, passages) for question, passages in asked]
    openings = Openings(model.base)
    whole = read_batch(model, tokenizer, prompts, max_new_tokens=6)
    assert read_batch(model, tokenizer, prompts, openings, max_new_tokens=6) == whole
    line = encoded(tokenizer, " a ledger\n", special=False)
    for prompt in prompts:
        torch.testing.assert_close(
            answer_log_probs(model, prompt, line, None, openings, lambda_=0.0),
            answer_log_probs(model, prompt, line, None, lambda_=0.0),
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_examples_are_read_once(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase],
) -> None:
    memory, read = MemoryModel(*roomy), []

    def note(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        read.append(kwargs["input_ids"].shape[1])

    def tokens_read(*, lambda_: float | None = None) -> tuple[int, str]:
        read.clear()
        passages = ["Ann hung it."]
        answer = memory.answer("Who hung it?", max_new_tokens=4, passages=passages, lambda_=lambda_)
        return sum(read), answer.text

    with memory.model.base.base_model.register_forward_pre_hook(note, with_kwargs=True):
        first, text = tokens_read()
        second, again = tokens_read()
        whole, _ = tokens_read(lambda_=0.0)
    opening = reading(memory.tokenizer, "Who hung it?", ["Ann hung it."]).opening
    assert again == text
    assert first - second >= opening
    assert second < opening
    # Read to answer, and for either of two answers; the base model alone reads all at once.
    assert whole > 3 * opening


def test_settings_of_the_base_models_own_do_not_change_what_it_reads(
    roomy: tuple[MLPMemForCausalLM, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = ["Ann hung it."]
    model, tokenizer = roomy
    prompt = reading(tokenizer, "Who hung it?", passages)
    expected = read_batch(model, tokenizer, [prompt], max_new_tokens=6)
    for name, value in (("use_cache", False), ("num_beams", 2), ("cache_implementation", "static")):
        with monkeypatch.context() as patch:
            patch.setattr(model.base.generation_config, name, value)
            openings = Openings(model.base)
            assert read_batch(model, tokenizer, [prompt], openings, max_new_tokens=6) == expected
