"""The serving benchmark measures what it says, on a tiny memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding

from benchmarks.serving import measured, ratio
from llama_index.indices.managed.mlpmem import MLPMemIndex

QUESTIONS = ["Who found wild honey in the old mill?", "Did Ines Maro find a map of the tunnels?"]


@pytest.mark.usefixtures("open_loop")  # LlamaIndex leaves the loop of its index open
def test_a_run_tells_all_figures(index: MLPMemIndex) -> None:
    vectors = VectorStoreIndex(list(index.docstore.docs.values()), embed_model=MockEmbedding(8))
    rag = vectors.as_query_engine(llm=index.as_llm(lambda_=0.0, max_new_tokens=4), streaming=True)
    found = measured(index, {"RAG": rag, "tuned RAG": rag}, QUESTIONS, rounds=2)
    for reached in ("first_token", "whole_answer"):
        assert set(found[reached]["over_memory"]) == {"RAG", "tuned RAG"}
        for name, times in found[reached]["over_memory"].items():
            assert 0 < times["low"] <= times["ratio"] <= times["high"], name
    served = found["throughput"]
    ways = {"asyncio", "threads", "in batches of 8"}
    assert set(served["requests_a_second"]) == {"one by one", *ways}
    assert set(served["faster_than_one_by_one"]) == ways
    assert served["same_answers"] == dict.fromkeys({"one by one", *ways}, 1.0)
    assert 0 <= served["loop_ms"]["median"] <= served["loop_ms"]["longest"]


def test_an_answer_that_differs_is_noticed(
    index: MLPMemIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = index.as_query_engine(attribution="none")
    monkeypatch.setattr(type(engine), "aquery", lambda _, question: late(question))
    with pytest.raises(AssertionError, match="asyncio: not the answers"):
        measured(index, {}, QUESTIONS, rounds=1)


async def late(question: str) -> str:
    time.sleep(0.001)
    return f"Another answer to {question}"


def test_a_ratio_is_of_the_sums() -> None:
    above, below = np.array([4.0, 6.0, 8.0]), np.array([2.0, 3.0, 4.0])
    found = ratio(above, below)
    assert (found.ratio, found.low, found.high) == (2.0, 2.0, 2.0)
    spread = ratio(np.array([1.0, 9.0]), np.array([1.0, 1.0]))
    assert (spread.ratio, spread.low, spread.high) == (5.0, 1.0, 9.0)
