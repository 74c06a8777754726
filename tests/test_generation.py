"""Every way to generate, with every cache, alone and in a left-padded batch, in every dtype.

What transformers promises of its own models is promised here: a cache changes nothing, a batch is
its rows, a stream is the whole, an assistant only saves time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.gate import Gate
from mlpmem_rag.model import MLPMemForCausalLM

QUERY, PAD, NEW = 12, 2, 10
ROWS = [torch.tensor([[0, 90, 91]]), torch.tensor([[0, 50, 60, 70, 80, 90, 100, 110]])]
GATE = Gate(asked=(0.3, -0.2, -0.4, 0.1, 0.05, 0.2), plain=(0.1, 0.1, 0.2, 0.0, 0.1, -0.5))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 40},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant": "base"},
    "assisted by itself": {"assistant": "itself"},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
ASSISTED = ("prompt lookup", "assisted", "assisted by itself")
CASES = [
    (mode, cache)
    for mode in MODES
    for cache in CACHES
    if cache == "dynamic" or mode not in ASSISTED  # transformers assists with these caches only
]


@pytest.fixture(scope="module")
def model(tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]) -> Any:  # noqa: ANN401
    """Query-aware, gated, half of the say."""
    return memory_on(tiny_backbone, query_size=QUERY, gate=GATE, lambda_=0.5)


@pytest.fixture(scope="module")
def by_dtype(
    tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]
) -> dict[torch.dtype, Any]:
    """The same, its weights in each number format."""
    models: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = copy.deepcopy(tiny_backbone.model)
        for parameter in base.parameters():
            parameter.data = parameter.data.to(dtype)
        backbone = Backbone(base, tiny_backbone.tokenizer, 2, tiny_backbone.reference)
        models[dtype] = memory_on(backbone, query_size=QUERY, gate=GATE, lambda_=0.5)
    return models


def vectors(count: int) -> Tensor:
    drawn = torch.randn(count, QUERY, generator=torch.Generator().manual_seed(8))
    return torch.nn.functional.normalize(drawn, dim=-1)


def padded() -> tuple[Tensor, Tensor]:
    longest = max(row.shape[1] for row in ROWS)
    ids, mask = torch.full((len(ROWS), longest), PAD), torch.zeros(len(ROWS), longest).long()
    for number, row in enumerate(ROWS):
        ids[number, -row.shape[1] :], mask[number, -row.shape[1] :] = row, 1
    return ids, mask


def generate(model: Any, ids: Tensor, mode: str, cache: str, **inputs: object) -> Tensor:  # noqa: ANN401
    """New tokens, from the same random state each time."""
    new: Tensor = generated(model, ids, mode, cache, **inputs)[:, ids.shape[1] :]
    return new


def generated(model: Any, ids: Tensor, mode: str, cache: str, **inputs: object) -> Any:  # noqa: ANN401
    """All that `generate` returns."""
    settings = {
        "eos_token_id": None,
        "pad_token_id": PAD,
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    settings = {**settings, **MODES[mode], **CACHES[cache]}
    assistant: Any = settings.pop("assistant", None)
    if assistant is not None:
        inputs["assistant_model"] = {"base": model.base, "itself": model}[assistant]
    inputs = {"attention_mask": torch.ones_like(ids), **inputs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model.generate(ids, generation_config=GenerationConfig(**settings), **inputs)


@pytest.mark.parametrize(("mode", "cache"), CASES)
def test_no_cache_changes_what_is_generated(model: Any, mode: str, cache: str) -> None:  # noqa: ANN401
    query = vectors(1)
    found = generate(model, ROWS[1], mode, cache, query_vector=query)
    as_one_by_one = "greedy" if mode in ASSISTED else mode
    expected = generate(model, ROWS[1], as_one_by_one, "none", query_vector=query)
    assert torch.equal(found, expected)
    assert found.shape[1] == NEW
    other = generate(model, ROWS[1], mode, cache, query_vector=-query)
    assert not torch.equal(found, other), "the query has a say"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", ["greedy", "penalised", "beams"])
def test_a_left_padded_batch_is_its_rows(model: Any, mode: str, cache: str) -> None:  # noqa: ANN401
    ids, mask = padded()
    together = generate(model, ids, mode, cache, attention_mask=mask, query_vector=vectors(2))
    alone = [
        generate(model, row, mode, cache, query_vector=vectors(2)[number : number + 1])
        for number, row in enumerate(ROWS)
    ]
    if mode == "penalised":  # transformers penalises padding, too
        together, alone = together[1:], alone[1:]
    assert torch.equal(together, torch.cat(alone))


def test_samples_of_one_prompt_differ(model: Any) -> None:  # noqa: ANN401
    found = generate(model, ROWS[1], "several", "dynamic", query_vector=vectors(1))
    assert found.shape == (3, NEW)
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_each_token_is_the_best_in_every_dtype(
    by_dtype: dict[torch.dtype, Any], dtype: torch.dtype, cache: str
) -> None:
    """To rounding: in half precision, a cache may turn a near tie."""
    model = by_dtype[dtype]
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids, mask = padded()
    new = generate(model, ids, "greedy", cache, attention_mask=mask, query_vector=vectors(2))
    for number, row in enumerate(ROWS):
        whole = torch.cat([row, new[number : number + 1]], 1)
        with torch.no_grad():
            out = model(input_ids=whole, query_vector=vectors(2)[number : number + 1]).logits[0]
        best = out[row.shape[1] - 1 : -1].max(-1).values
        chosen = out[row.shape[1] - 1 : -1].gather(1, new[number][:, None])[:, 0]
        slack = 1e-4 if dtype == torch.float32 else 0.15
        assert torch.all(best - chosen <= slack), best - chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mode", "cache"), CASES)
def test_in_half_precision_each_step_sees_what_a_whole_pass_sees(
    by_dtype: dict[torch.dtype, Any], mode: str, cache: str, dtype: torch.dtype
) -> None:
    """In every mode, from a left-padded batch where transformers takes one."""
    ids, mask = (ROWS[1], torch.ones_like(ROWS[1])) if mode in ASSISTED else padded()
    query = vectors(len(ids))
    noted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    given = {"attention_mask": mask, "query_vector": query, **noted}
    found = generated(by_dtype[dtype], ids, mode, cache, **given)
    copies = len(found.sequences) // len(ids)
    assert found.sequences.shape == (copies * len(ids), ids.shape[1] + NEW)
    whole_mask = torch.nn.functional.pad(mask.repeat_interleave(copies, 0), (0, NEW), value=1)
    with torch.no_grad():
        out = by_dtype[dtype](
            input_ids=found.sequences,
            attention_mask=whole_mask,
            position_ids=(whole_mask.cumsum(-1) - 1).clamp_min(0),
            query_vector=query.repeat_interleave(copies, 0),
        ).logits[:, ids.shape[1] - 1 : -1]
    if "num_beams" in MODES[mode]:
        chosen = out.gather(-1, found.sequences[:, ids.shape[1] :, None]).sum((1, 2))
        length = NEW ** MODES[mode].get("length_penalty", 1.0)
        torch.testing.assert_close(found.sequences_scores, chosen / length, atol=0.15, rtol=0)
    else:
        steps = torch.stack(found.logits, 1)
        likely = out > -6  # where rounding is small beside the probability
        torch.testing.assert_close(steps[likely], out[likely], atol=0.3, rtol=0)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_at_the_ends_one_side_is_alone(
    model: Any,  # noqa: ANN401
    tiny_backbone: Backbone,
    memory_on: Callable[..., MLPMemForCausalLM],
    lambda_: float,
) -> None:
    open_model: Any = memory_on(tiny_backbone, query_size=QUERY)
    given = {"memory_lambda": lambda_, "query_vector": vectors(1)}
    for mode in ("greedy", "beams", "sampling", "assisted"):
        found = generate(open_model, ROWS[1], mode, "dynamic", **given)
        if lambda_ == 0.0:
            plain = mode if mode != "assisted" else "greedy"
            assert torch.equal(found, generate(tiny_backbone.model, ROWS[1], plain, "dynamic"))
        else:
            tokens = set(open_model.memory.corpus_tokens.tolist())
            assert set(found.flatten().tolist()) <= tokens, "what the memory knows"


@pytest.mark.parametrize(
    ("mode", "cache"),
    [case for case in CASES if not {"num_beams", "num_return_sequences"} & {*MODES[case[0]]}],
)
def test_streamed_text_is_the_whole(
    model: Any,  # noqa: ANN401
    tiny_backbone: Backbone,
    mode: str,
    cache: str,
) -> None:
    """Wherever transformers takes a streamer."""
    given = {"query_vector": vectors(1)}
    streamer = TextIteratorStreamer(tiny_backbone.tokenizer, skip_prompt=True)
    new = generate(model, ROWS[1], mode, cache, streamer=streamer, **given)
    assert "".join(streamer) == tiny_backbone.tokenizer.decode(new[0])
    assert torch.equal(new, generate(model, ROWS[1], mode, cache, **given))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", ["greedy", "penalised", "sampling"])
def test_a_stop_string_cuts_what_would_have_come(
    model: Any,  # noqa: ANN401
    tiny_backbone: Backbone,
    mode: str,
    cache: str,
) -> None:
    tokenizer, given = tiny_backbone.tokenizer, {"query_vector": vectors(1)}
    free = generate(model, ROWS[1], mode, cache, **given)[0]
    stop = tokenizer.decode(free[6])
    length = next(n for n in range(1, NEW + 1) if stop in tokenizer.decode(free[:n]))
    inputs = {"stop_strings": [stop], "tokenizer": tokenizer, **given}
    assert torch.equal(generate(model, ROWS[1], mode, cache, **inputs)[0], free[:length])


@pytest.mark.parametrize("cache", CACHES)
def test_a_new_request_knows_nothing_of_the_one_before(model: Any, cache: str) -> None:  # noqa: ANN401
    """transformers keeps a static cache for the next call."""
    plain = generate(model, ROWS[1], "greedy", cache)
    asked = generate(model, ROWS[1], "greedy", cache, query_vector=vectors(1))
    assert not torch.equal(plain, asked)
    assert torch.equal(generate(model, ROWS[1], "greedy", cache), plain)


def test_logits_processors_see_log_probabilities_of_the_mixture(model: Any) -> None:  # noqa: ANN401
    sums = []

    class Note(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            sums.append(scores.double().exp().sum(-1))
            banned = scores.clone()
            banned[:, scores.argmax(-1)] = -torch.inf
            return banned

    processors = LogitsProcessorList([Note()])
    given = {"query_vector": vectors(1), "logits_processor": processors}
    found = generate(model, ROWS[1], "greedy", "dynamic", **given)
    torch.testing.assert_close(torch.cat(sums), torch.ones(NEW).double(), atol=1e-5, rtol=0)
    plain = generate(model, ROWS[1], "greedy", "dynamic", query_vector=vectors(1))
    assert found[0, 0] != plain[0, 0]


def test_embeddings_can_be_given_instead_of_ids(model: Any) -> None:  # noqa: ANN401
    embedded = model.get_input_embeddings()(ROWS[1])
    query = vectors(1)
    with torch.no_grad():
        expected = model(input_ids=ROWS[1], query_vector=query).logits
        torch.testing.assert_close(
            model(inputs_embeds=embedded, query_vector=query).logits, expected
        )
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    new = model.generate(inputs_embeds=embedded, query_vector=query, **settings)
    assert torch.equal(new, generate(model, ROWS[1], "greedy", "dynamic", query_vector=query))
    model.query_encoder = SimpleNamespace(
        name="fake",
        size=model.query_size,
        encode=lambda texts: np.repeat(query.numpy(), len(texts), 0),
    )
    twice = model.generate(inputs_embeds=embedded.repeat(2, 1, 1), query_text="all", **settings)
    assert torch.equal(twice, new.repeat(2, 1)), "one text is for all rows"


def test_outputs_are_tuples_where_asked(model: Any) -> None:  # noqa: ANN401
    with torch.no_grad():
        expected = model(input_ids=ROWS[1], labels=ROWS[1], use_cache=False)
        loss, logits = model(input_ids=ROWS[1], labels=ROWS[1], use_cache=False, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_hidden_states_and_attentions_are_the_bases(model: Any) -> None:  # noqa: ANN401
    model.base.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found = model(input_ids=ROWS[1], **wanted)
        expected = model.base(input_ids=ROWS[1], **wanted)
    model.base.set_attn_implementation("sdpa")
    assert len(found.hidden_states) == 5
    # But for last bits: with a memory beside it, products of few rows are summed in another order.
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    assert len(found.attentions) == 4
    torch.testing.assert_close(found.attentions, expected.attentions)


# Training and compiling.


def test_gradients_reach_the_memory_and_only_it(
    tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]
) -> None:
    model: Any = memory_on(tiny_backbone, query_size=QUERY, gate=GATE)
    ids, query = ROWS[1], vectors(1)
    output = model(input_ids=ids, labels=ids, query_vector=query)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.memory.parameters())
    assert all(p.grad is None for p in model.base.parameters())
    # The slope of the loss along one weight, by finite differences.
    weight = model.memory.layers[0].mlp.up_proj.weight
    slope, step = float(weight.grad[3, 5]), 1e-2
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * step
            losses.append(float(model(input_ids=ids, labels=ids, query_vector=query).loss))
            weight[3, 5] -= sign * step
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_a_few_steps_of_training_lower_the_loss(
    tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]
) -> None:
    model: Any = memory_on(tiny_backbone, vocab_size=280, lambda_=0.9)
    optimizer = torch.optim.AdamW(model.memory.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ROWS[1], labels=ROWS[1]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_loss_over_accumulated_batches_counts_all_items(model: Any) -> None:  # noqa: ANN401
    """As transformers' Trainer asks for it."""
    with torch.no_grad():
        mean = model(input_ids=ROWS[1], labels=ROWS[1]).loss
        share = model(input_ids=ROWS[1], labels=ROWS[1], num_items_in_batch=70).loss
    assert float(share) == pytest.approx(float(mean) * 7 / 70, rel=1e-5)


def test_compiled_it_computes_the_same(model: Any) -> None:  # noqa: ANN401
    """In one graph, traced anew for nothing but another shape."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:  # noqa: ANN401
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            ids = torch.randint(5, 290, (2, 9), generator=torch.Generator().manual_seed(seed))
            given = {"input_ids": ids, "query_vector": vectors(2), "use_cache": False}
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
        assert len(graphs) == 1
        expected = model(input_ids=ROWS[0]).logits
    torch.compiler.reset()
    with torch.no_grad():
        again = model(input_ids=ROWS[0]).logits
    assert torch.equal(again, expected), "not compiled, it is as it was"


def test_compiled_steps_generate_the_same(model: Any) -> None:  # noqa: ANN401
    """Of `generate` with a static cache, which compiles the step after prefill."""
    torch.compiler.reset()
    compiling: Any = CompileConfig(backend="eager", fullgraph=True)
    compiling.mode, compiling._compile_all_devices = None, True
    found = generate(
        model, ROWS[1], "greedy", "static", query_vector=vectors(1), compile_config=compiling
    )
    expected = generate(model, ROWS[1], "greedy", "dynamic", query_vector=vectors(1))
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()


def test_threads_do_not_see_each_others_states(model: Any) -> None:  # noqa: ANN401

    ids = [
        torch.randint(5, 290, (1, 20), generator=torch.Generator().manual_seed(n))
        for n in range(12)
    ]

    def run(row: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(input_ids=row).logits
        return out

    expected = [run(row) for row in ids]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(run, ids * 4), expected * 4, strict=True):
            torch.testing.assert_close(found, one)


def test_without_a_memory_model_an_assistant_is_told_nothing(model: Any, tiny_folder: Any) -> None:  # noqa: ANN401
    """Any causal model with the same vocabulary may assist."""
    assistant = AutoModelForCausalLM.from_pretrained(tiny_folder)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    given = {"query_vector": vectors(1), "memory_lambda": 0.8}
    expected = model.generate(ROWS[1], **settings, **given)
    found = model.generate(ROWS[1], assistant_model=assistant, **settings, **given)
    assert torch.equal(found, expected)
