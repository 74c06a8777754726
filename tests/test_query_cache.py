"""The query vector travels with the cache, row by row, until a new request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.gate import Gate, constant_weights
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.query_cache import cached_query, keep_query

QUERY = 12
PROMPT = torch.tensor([[0, 40, 81, 122], [0, 7, 14, 21]])
NEXT = torch.tensor([[60], [99]])


@pytest.fixture(scope="module")
def model(tiny_backbone: Backbone, memory_on: Callable[..., MLPMemForCausalLM]) -> Any:  # noqa: ANN401
    """A memory that reads a query vector, and nothing but the memory's say."""
    return memory_on(tiny_backbone, query_size=QUERY, lambda_=1.0)


def vectors(count: int, seed: int = 8) -> Tensor:
    drawn = torch.randn(count, QUERY, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:  # noqa: ANN401
    with torch.no_grad():
        yield


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


@pytest.mark.parametrize("kind", CACHES)
def test_what_was_asked_at_prefill_holds_for_the_steps_after(model: Any, kind: str) -> None:  # noqa: ANN401
    queries = vectors(2)
    cache = CACHES[kind](model.base.config)
    model(input_ids=PROMPT, past_key_values=cache, query_vector=queries)
    step = model(input_ids=NEXT, past_key_values=cache).logits
    whole = torch.cat([PROMPT, NEXT], 1)
    expected = model(input_ids=whole, query_vector=queries).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    other = model(input_ids=whole).logits[:, -1:]
    assert not torch.allclose(step, other, atol=0.01), "the vector has a say"


def test_a_cache_that_forward_made_carries_it_too(model: Any) -> None:  # noqa: ANN401
    queries = vectors(2)
    cache = model(input_ids=PROMPT, query_vector=queries, use_cache=True).past_key_values
    kept, asked = cached_query(cache)
    assert asked
    assert torch.equal(kept, queries)  # type: ignore[arg-type]


def test_that_nothing_was_asked_holds_for_the_steps_after(
    model: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "gate", Gate(constant_weights(0.9), constant_weights(0.1)))
    queries = vectors(2)
    cache = DynamicCache(config=model.base.config)
    model(input_ids=PROMPT, past_key_values=cache, query_vector=queries, recall=False)
    step = model(input_ids=NEXT, past_key_values=cache).logits
    whole = torch.cat([PROMPT, NEXT], 1)
    expected = model(input_ids=whole, query_vector=queries, recall=False).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    asked = model(input_ids=whole, query_vector=queries).logits[:, -1:]
    assert not torch.allclose(step, asked, atol=0.01), "asked, the gate is wide open"


def test_rows_are_reordered_repeated_and_selected_with_the_cache(model: Any) -> None:  # noqa: ANN401
    """As beams, several samples and finished rows do."""
    queries = vectors(2)
    changes: list[tuple[Callable[[Any], None], list[int]]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]
    for change, rows in changes:
        cache = DynamicCache(config=model.base.config)
        model(input_ids=PROMPT, past_key_values=cache, query_vector=queries)
        change(cache)
        step = model(input_ids=NEXT[rows], past_key_values=cache).logits
        whole = torch.cat([PROMPT, NEXT], 1)[rows]
        expected = model(input_ids=whole, query_vector=queries[rows]).logits[:, -1:]
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_cropping_keeps_it(model: Any) -> None:  # noqa: ANN401
    """Assisted generation takes back tokens, not the question."""
    queries = vectors(2)
    cache = DynamicCache(config=model.base.config)
    model(input_ids=torch.cat([PROMPT, NEXT], 1), past_key_values=cache, query_vector=queries)
    cache.crop(-1)
    step = model(input_ids=NEXT, past_key_values=cache).logits
    whole = torch.cat([PROMPT, NEXT], 1)
    expected = model(input_ids=whole, query_vector=queries).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_has_forgotten_the_request(model: Any, kind: str) -> None:  # noqa: ANN401
    cache = CACHES[kind](model.base.config)
    model(input_ids=PROMPT, past_key_values=cache, query_vector=vectors(2))
    cache.reset()
    again = model(input_ids=PROMPT, past_key_values=cache).logits
    torch.testing.assert_close(again, model(input_ids=PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_a_new_request_replaces_the_one_before(model: Any) -> None:  # noqa: ANN401
    first, second = vectors(2), vectors(2, seed=9)
    cache = DynamicCache(config=model.base.config)
    model(input_ids=PROMPT, past_key_values=cache, query_vector=first)
    step = model(input_ids=NEXT, past_key_values=cache, query_vector=second).logits
    whole = torch.cat([PROMPT, NEXT], 1)
    expected = model(input_ids=whole, query_vector=second).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached_query(cache)[0], second)  # type: ignore[arg-type]


def test_nothing_is_kept_where_nothing_is_asked(model: Any) -> None:  # noqa: ANN401
    cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    assert len(cache) == len(model.base.model.layers)
    assert cached_query(cache)[0] is None
    assert cached_query(None)[0] is None
    keep_query(None, vectors(2), asked=True)


def test_the_layer_does_not_count_as_one_of_the_model(model: Any) -> None:  # noqa: ANN401
    cache = DynamicCache(config=model.base.config)
    model(input_ids=PROMPT, past_key_values=cache, query_vector=vectors(2))
    assert cache.get_seq_length() == PROMPT.shape[1]
    assert cache.is_croppable
    assert sum(keys is not None for keys, *_ in cache) == len(model.base.model.layers)
