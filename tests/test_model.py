"""The mixed model: equal to a naive mixture, and generation that is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory

LAMBDA, TEMPERATURE = 0.4, 1.3
CORPUS_TOKENS = torch.arange(5, 300, 3)
PAD = 2
PROMPT = torch.tensor([[0, 40, 81, 122, 163, 204], [0, 7, 14, 21, 28, 35]])
SHORT = [torch.tensor([[0, 90, 91]]), torch.tensor([[0, 50, 60, 70, 80, 90, 100, 110]])]
GREEDY = {"eos_token_id": None, "pad_token_id": PAD, "do_sample": False, "max_new_tokens": 8}
VARIED = {"no_repeat_ngram_size": 1}
"""Random models like to repeat one token; this makes every place count."""


class Mixed:
    """A base model with a random memory, and the same base loaded by transformers alone."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.backbone = load_backbone(str(folder), device="cpu", dtype=dtype)
        self.reference = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.backbone.model.dtype
        ).eval()
        self.model = with_memory(self.backbone)

    def generate(
        self, ids: Tensor, settings: dict[str, Any] | None = None, **inputs: object
    ) -> Tensor:
        return generate(self.model, ids, settings, **inputs)


def with_memory(backbone: Backbone) -> MLPMemForCausalLM:
    width = backbone.hidden_size
    config = MemoryConfig(width, 24, 2, "silu", gated=True, vocab_size=len(CORPUS_TOKENS))
    memory = Memory(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2, generator=generator)
    memory.corpus_tokens = CORPUS_TOKENS
    settings = MemorySettings(backbone.reference, backbone.layer, config, LAMBDA, TEMPERATURE)
    return attach_memory(backbone, memory, settings)


def generate(
    model: Any,  # noqa: ANN401  its own types hide what generate takes
    ids: Tensor,
    settings: dict[str, Any] | None = None,
    **inputs: object,
) -> Tensor:
    """New tokens only."""
    inputs = {"inputs": ids, "attention_mask": torch.ones_like(ids), **inputs}
    config = GenerationConfig(**{**GREEDY, **(settings or {})})
    tokens: Tensor = model.generate(generation_config=config, **inputs)
    return tokens[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def mixed(family_folder: Path) -> Mixed:
    """Of each family."""
    return Mixed(family_folder)


@pytest.fixture(scope="module")
def llama(tiny_folder: Path) -> Mixed:
    """Of one family, where the base makes no difference."""
    return Mixed(tiny_folder)


# What forward returns, for every family.


def test_lambda_zero_is_the_base_model_to_the_bit(mixed: Mixed) -> None:
    with torch.no_grad():
        expected = mixed.reference(input_ids=PROMPT).logits
        found = mixed.model(input_ids=PROMPT, memory_lambda=0.0).logits
    assert torch.equal(found, expected)
    tokens = mixed.generate(PROMPT, VARIED, memory_lambda=0.0)
    assert torch.equal(tokens, generate(mixed.reference, PROMPT, VARIED))
    other = mixed.generate(PROMPT, VARIED, memory_lambda=0.9)
    assert not torch.equal(tokens, other), "the memory has a say"


@pytest.mark.parametrize("lambda_", [None, 0.05, 1.0])
def test_mixture_equals_the_naive_one(mixed: Mixed, lambda_: float | None) -> None:
    weight = LAMBDA if lambda_ is None else lambda_
    with torch.no_grad():
        p_base = mixed.reference(input_ids=PROMPT).logits.double().softmax(-1)
        hidden = mixed.backbone.hidden(PROMPT, torch.ones_like(PROMPT))
        memory_logits = mixed.model.memory(hidden).double()
        found = mixed.model(input_ids=PROMPT, memory_lambda=lambda_).logits.double().exp()
    p_memory = torch.zeros_like(p_base)
    p_memory[..., CORPUS_TOKENS] = (memory_logits / TEMPERATURE).softmax(-1)
    torch.testing.assert_close(
        found, weight * p_memory + (1 - weight) * p_base, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)


def test_logits_to_keep_are_slices_of_all_logits(mixed: Mixed) -> None:
    places = torch.tensor([0, 3, 5])
    with torch.no_grad():
        whole = mixed.model(input_ids=PROMPT).logits
        last = mixed.model(input_ids=PROMPT, logits_to_keep=2).logits
        some = mixed.model(input_ids=PROMPT, logits_to_keep=places).logits
    torch.testing.assert_close(last, whole[:, -2:])
    torch.testing.assert_close(some, whole[:, places])


# Generation, for every family.


def test_cached_generation_equals_uncached(mixed: Mixed) -> None:
    settings = {**VARIED, "max_new_tokens": 12}
    cached = mixed.generate(PROMPT, settings)
    assert torch.equal(cached, mixed.generate(PROMPT, {**settings, "use_cache": False}))
    assert cached.shape == (2, 12)


def test_each_new_token_is_the_likeliest_of_forward(mixed: Mixed) -> None:
    ids = PROMPT
    with torch.no_grad():
        for _ in range(8):
            logits = mixed.model(input_ids=ids).logits[:, -1]
            unseen = logits.scatter(1, ids, -torch.inf)
            ids = torch.cat([ids, unseen.argmax(-1, keepdim=True)], 1)
    assert torch.equal(mixed.generate(PROMPT, VARIED), ids[:, 6:])


def test_a_left_padded_batch_equals_single_runs(mixed: Mixed) -> None:
    longest = max(ids.shape[1] for ids in SHORT)
    padded = torch.full((len(SHORT), longest), PAD)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(SHORT):
        padded[row, -ids.shape[1] :] = ids
        mask[row, -ids.shape[1] :] = 1
    alone = torch.cat([mixed.generate(ids, VARIED) for ids in SHORT])
    assert torch.equal(mixed.generate(padded, VARIED, attention_mask=mask), alone)


# Where the base makes no difference.


@pytest.mark.parametrize("count", [1, 2, 17])
def test_as_many_new_tokens_as_asked_for(llama: Mixed, count: int) -> None:
    assert llama.generate(PROMPT, {"max_new_tokens": count}).shape == (2, count)


def test_end_of_text_stops_each_row(llama: Mixed) -> None:
    free = llama.generate(PROMPT, {"max_new_tokens": 20})
    ends = [int(free[0, 4]), int(free[1, 9])]
    lengths = [min(row.index(end) for end in ends if end in row) + 1 for row in free.tolist()]
    assert lengths[0] != lengths[1]
    stopped = llama.generate(PROMPT, {"max_new_tokens": 20, "eos_token_id": ends})
    assert stopped.shape == (2, max(lengths))
    for found, expected, length in zip(stopped, free, lengths, strict=True):
        assert torch.equal(found[:length], expected[:length])
        assert torch.all(found[length:] == PAD)


@pytest.mark.parametrize("lambda_", [0.0, LAMBDA])
def test_loss_is_the_mean_over_the_labels_given(llama: Mixed, lambda_: float) -> None:
    labels = PROMPT.clone()
    labels[0, 2], labels[1, :4] = -100, -100
    labels[0, 5] = int(CORPUS_TOKENS[7])
    with torch.no_grad():
        output = llama.model(input_ids=PROMPT, labels=labels, memory_lambda=lambda_)
    log_probs = output.logits.double().log_softmax(-1)
    chosen = [
        log_probs[row, place - 1, labels[row, place]].item()
        for row in range(2)
        for place in range(1, 6)
        if labels[row, place] != -100
    ]
    assert len(chosen) == 6
    assert output.loss.item() == pytest.approx(-sum(chosen) / 6)


def test_the_weight_of_a_call_comes_before_the_models(llama: Mixed) -> None:
    model = with_memory(llama.backbone)
    with torch.no_grad():
        expected = model(input_ids=PROMPT, memory_lambda=0.9).logits
        default = model(input_ids=PROMPT).logits
        model.memory_lambda = 0.9
        torch.testing.assert_close(model(input_ids=PROMPT).logits, expected)
        torch.testing.assert_close(model(input_ids=PROMPT, memory_lambda=LAMBDA).logits, default)
    assert not torch.allclose(default, expected)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_weights_outside_are_refused(llama: Mixed, wrong: float) -> None:
    with pytest.raises(ConfigError, match="lambda"):
        llama.model(input_ids=PROMPT, memory_lambda=wrong)
    with pytest.raises(ConfigError, match="lambda"):
        llama.generate(PROMPT, memory_lambda=wrong)
    with pytest.raises(ConfigError, match="lambda"):
        llama.model.memory_lambda = wrong
    assert llama.model.memory_lambda == LAMBDA


def test_embeddings_may_stand_for_ids(llama: Mixed) -> None:
    with torch.no_grad():
        embeddings = llama.model.get_input_embeddings()(PROMPT)
        found = llama.model(inputs_embeds=embeddings).logits
        torch.testing.assert_close(found, llama.model(input_ids=PROMPT).logits)


def test_bfloat16_is_normalised_too(tiny_folder: Path) -> None:
    mixed = Mixed(tiny_folder, dtype="bfloat16")
    assert {p.dtype for p in mixed.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        total = mixed.model(input_ids=PROMPT).logits.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_bfloat16_is_the_base_model_at_lambda_zero(tiny_folder: Path) -> None:
    mixed = Mixed(tiny_folder, dtype="bfloat16")
    with torch.no_grad():
        expected = mixed.reference(input_ids=PROMPT).logits
        assert torch.equal(mixed.model(input_ids=PROMPT, memory_lambda=0.0).logits, expected)


def test_every_weight_is_registered_once(llama: Mixed) -> None:
    base = [f"base.{name}" for name in llama.reference.state_dict()]
    memory = [f"memory.{name}" for name in llama.model.memory.state_dict()]
    assert sorted(llama.model.state_dict()) == sorted(base + memory)
    expected = llama.reference.num_parameters() + sum(
        p.numel() for p in llama.model.memory.parameters()
    )
    assert llama.model.num_parameters() == expected


# Other ways to generate.


def test_sampling_follows_the_seed_and_the_mixture(llama: Mixed) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        many = PROMPT[:1].expand(4000, -1)
        return llama.generate(many, {"do_sample": True, "top_k": 0, "max_new_tokens": 1})[:, 0]

    with torch.random.fork_rng(devices=[]):
        tokens = draw(0)
        assert torch.equal(tokens, draw(0))
        assert not torch.equal(tokens, draw(1))
    with torch.no_grad():
        expected = llama.model(input_ids=PROMPT[:1]).logits[0, -1].exp().topk(5)
    shares = (tokens[:, None] == expected.indices).float().mean(0)
    torch.testing.assert_close(shares, expected.values, atol=0.03, rtol=0)


def test_beams_are_scored_by_the_mixture(llama: Mixed) -> None:
    settings = {**GREEDY, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}

    def search() -> tuple[Tensor, Tensor]:
        model: Any = llama.model
        config, mask = GenerationConfig(**settings), torch.ones_like(PROMPT)
        found = model.generate(inputs=PROMPT, attention_mask=mask, generation_config=config)
        return found.sequences, found.sequences_scores

    ids, scores = search()
    with torch.no_grad():
        log_probs = llama.model(input_ids=ids).logits[:, 5:-1]
    expected = log_probs.gather(-1, ids[:, 6:, None]).squeeze(-1).mean(1)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(ids, search()[0])


def test_stop_strings_end_generation(llama: Mixed) -> None:
    tokenizer = llama.backbone.tokenizer
    free = llama.generate(PROMPT[:1], {"max_new_tokens": 20})[0]
    stop = tokenizer.decode(free[6])
    length = next(n for n in range(1, 20) if stop in tokenizer.decode(free[:n]))
    settings = {"max_new_tokens": 20, "stop_strings": [stop]}
    found = llama.generate(PROMPT[:1], settings, tokenizer=tokenizer)[0]
    assert torch.equal(found, free[:length])


def test_a_streamer_sees_every_token(llama: Mixed) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    streamer = Recorder()
    tokens = llama.generate(PROMPT[:1], streamer=streamer)[0]
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.values[1:]), tokens)
    assert torch.equal(streamer.values[0], PROMPT[0])
