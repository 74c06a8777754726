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
from mlpmem_rag.augmented import PIECE
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate, gate_features
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


def with_memory(
    backbone: Backbone, *, query_size: int = 0, gate: Gate | None = None
) -> MLPMemForCausalLM:
    config = MemoryConfig(
        backbone.hidden_size,
        24,
        2,
        "silu",
        gated=True,
        vocab_size=len(CORPUS_TOKENS),
        query_size=query_size,
        hidden_scale=2.0 if query_size else 1.0,
    )
    memory = Memory(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2, generator=generator)
    memory.corpus_tokens = CORPUS_TOKENS
    settings = MemorySettings(
        backbone.reference, backbone.layer, config, LAMBDA, TEMPERATURE, gate=gate
    )
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


def test_a_long_text_is_mixed_in_pieces(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, and never a second copy of all logits; with gradients, in one."""
    model: Any = with_memory(tiny_backbone, query_size=QUERY, gate=GATE)
    ids = torch.randint(5, 300, (3, 50), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "query_vector": vectors(3)}
    sizes, mixed = [], model.mixed

    def note(logits: Tensor, *rest: Any, asked: bool) -> Tensor:  # noqa: ANN401
        sizes.append(logits.shape[1])
        out: Tensor = mixed(logits, *rest, asked=asked)
        return out

    monkeypatch.setattr(model, "mixed", note)
    whole = model(**given)
    assert whole.logits.requires_grad
    assert sizes == [50]
    with torch.no_grad():
        pieces = model(**given).logits
    assert sum(sizes[1:]) == 50
    assert max(sizes[1:]) * 3 <= PIECE
    torch.testing.assert_close(pieces, whole.logits)


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


# A memory that reads a query vector, and a gate.

QUERY = 12
GATE = Gate(asked=(0.3, -0.2, -0.4, 0.1, 0.05, 0.2), plain=(0.1, 0.1, 0.2, 0.0, 0.1, -0.5))


class Asked(Mixed):
    """A base model with a random memory that is query-aware and has a gate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = with_memory(self.backbone, query_size=QUERY, gate=GATE)


@pytest.fixture(scope="module")
def asked(family_folder: Path) -> Asked:
    """Of each family."""
    return Asked(family_folder)


@pytest.fixture(scope="module")
def asked_llama(tiny_folder: Path) -> Asked:
    """Of one family, where the base makes no difference."""
    return Asked(tiny_folder)


def vectors(count: int) -> Tensor:
    drawn = torch.randn(count, QUERY, generator=torch.Generator().manual_seed(8))
    return nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize("told", ["a question", "the text before", "nothing"])
@pytest.mark.parametrize("lambda_", [None, 1.0])
def test_query_and_gate_equal_the_naive_mixture(
    asked: Asked, lambda_: float | None, told: str
) -> None:
    """Where nothing is asked, the gate is that of plain text; told nothing, memories read zeros."""
    weight = LAMBDA if lambda_ is None else lambda_
    known = told == "a question"
    queries = torch.zeros(2, QUERY) if told == "nothing" else vectors(2)
    given = None if told == "nothing" else queries
    with torch.no_grad():
        base = asked.reference(input_ids=PROMPT).logits.log_softmax(-1)
        hidden = asked.backbone.hidden(PROMPT, torch.ones_like(PROMPT))
        found = asked.model(
            input_ids=PROMPT, memory_lambda=lambda_, query_vector=given, recall=known
        ).logits.exp()
        for row in range(2):
            for place in range(PROMPT.shape[1]):
                logits = asked.model.memory(hidden[row, place], queries[row]) / TEMPERATURE
                features = gate_features(logits.log_softmax(-1), base[row, place], CORPUS_TOKENS)
                here = weight * GATE.opening(features, asked=known)
                expected = (1 - here) * base[row, place].exp()
                expected[CORPUS_TOKENS] += here * logits.softmax(-1)
                torch.testing.assert_close(found[row, place], expected, rtol=1e-3, atol=1e-6)


def test_lambda_zero_with_a_query_is_the_base_model_to_the_bit(asked: Asked) -> None:
    with torch.no_grad():
        expected = asked.reference(input_ids=PROMPT).logits
        found = asked.model(input_ids=PROMPT, memory_lambda=0.0, query_vector=vectors(2)).logits
    assert torch.equal(found, expected)


def test_each_row_has_its_own_query(asked_llama: Asked) -> None:
    same = PROMPT[:1].expand(3, -1)
    queries = vectors(3)
    with torch.no_grad():
        found = asked_llama.model(input_ids=same, query_vector=queries).logits
        for row in range(3):
            alone = asked_llama.model(input_ids=same[:1], query_vector=queries[row : row + 1])
            torch.testing.assert_close(found[row], alone.logits[0])
    assert not torch.allclose(found[0], found[1], atol=0.01)


def test_cached_generation_with_a_query_equals_uncached(asked: Asked) -> None:
    settings = {**VARIED, "max_new_tokens": 12}
    queries = vectors(2)
    cached = asked.generate(PROMPT, settings, memory_lambda=1.0, query_vector=queries)
    uncached = {**settings, "use_cache": False}
    again = asked.generate(PROMPT, uncached, memory_lambda=1.0, query_vector=queries)
    assert torch.equal(cached, again)
    other = asked.generate(PROMPT, settings, memory_lambda=1.0, query_vector=queries.flip(0))
    assert not torch.equal(cached, other), "the query has a say"
    ids = PROMPT
    with torch.no_grad():
        for _ in range(12):
            logits = asked.model(input_ids=ids, memory_lambda=1.0, query_vector=queries).logits
            unseen = logits[:, -1].scatter(1, ids, -torch.inf)
            ids = torch.cat([ids, unseen.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids[:, 6:]), "the same query on every step"


def test_a_left_padded_batch_with_queries_equals_single_runs(asked: Asked) -> None:
    longest = max(ids.shape[1] for ids in SHORT)
    padded = torch.full((len(SHORT), longest), PAD)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(SHORT):
        padded[row, -ids.shape[1] :] = ids
        mask[row, -ids.shape[1] :] = 1
    queries = vectors(len(SHORT))
    found = asked.generate(padded, VARIED, attention_mask=mask, query_vector=queries)
    for row, (ids, query) in enumerate(zip(SHORT, queries, strict=True)):
        alone = asked.generate(ids, VARIED, query_vector=query[None])[0]
        assert torch.equal(found[row, : len(alone)], alone)
        assert torch.all(found[row, len(alone) :] == PAD), "its end of text came first"


def test_beams_and_samples_keep_the_query_of_their_prompt(asked_llama: Asked) -> None:
    queries, settings = vectors(2), {**VARIED, "num_beams": 3}
    together = asked_llama.generate(PROMPT, settings, query_vector=queries)
    for row in range(2):
        alone = asked_llama.generate(
            PROMPT[row : row + 1], settings, query_vector=queries[row : row + 1]
        )
        assert torch.equal(together[row], alone[0])
    other = asked_llama.generate(PROMPT, settings, query_vector=queries.flip(0))
    assert not torch.equal(together, other)
    config = GenerationConfig(
        **{**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    )
    model: Any = asked_llama.model
    found = model.generate(
        inputs=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        generation_config=config,
        query_vector=queries,
    )
    with torch.no_grad():
        logits = model(input_ids=found.sequences, query_vector=queries).logits[:, 5:-1]
    scores = logits.gather(-1, found.sequences[:, 6:, None]).squeeze(-1).mean(1)
    torch.testing.assert_close(found.sequences_scores, scores)


def test_logits_to_keep_with_a_query_are_slices_of_all_logits(asked_llama: Asked) -> None:
    queries, places = vectors(2), torch.tensor([0, 3, 5])
    with torch.no_grad():
        whole = asked_llama.model(input_ids=PROMPT, query_vector=queries).logits
        some = asked_llama.model(
            input_ids=PROMPT, query_vector=queries, logits_to_keep=places
        ).logits
    torch.testing.assert_close(some, whole[:, places])


@pytest.mark.parametrize("shape", [(1, QUERY), (3, QUERY), (2, QUERY - 1), (QUERY,), (2, 1, QUERY)])
def test_query_vectors_of_another_shape_are_refused(
    asked_llama: Asked, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=rf"shape \({shape[0]},.*takes \(2, {QUERY}\)"):
        asked_llama.model(input_ids=PROMPT, query_vector=torch.ones(shape))
    with pytest.raises(ConfigError, match="one vector for each sequence"):
        asked_llama.generate(PROMPT, query_vector=torch.ones(shape))


def test_a_memory_that_reads_no_query_does_not_mind_one(llama: Mixed) -> None:
    with torch.no_grad():
        found = llama.model(input_ids=PROMPT, query_vector=vectors(2)).logits
        assert torch.equal(found, llama.model(input_ids=PROMPT).logits)
