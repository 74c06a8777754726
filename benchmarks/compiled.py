"""What compiling brings on a GPU: to generation with a static cache, and to steps of distillation.

Where the cache is static, transformers compiles the step after prefill by itself, into CUDA graphs.
In training the memory's blocks are compiled. Both are beside the same without, and generation
beside the base model alone that is compiled as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks import distillation
from benchmarks.decoding import query_given
from benchmarks.figures import Figure
from benchmarks.rounds import interleaved, median_ratio
from benchmarks.setup import Setup

PROMPT = 256
TOKENS = 64
BACKEND = "inductor"
"""Of the blocks."""


def run(setup: Setup) -> list[Figure]:
    """Ratios of times, compiled over not compiled."""
    return [*generation(setup), training_step(setup)]


def generation(setup: Setup) -> list[Figure]:
    """Greedy, of a length that is the same for all."""
    model: Any = setup.model
    ids = torch.arange(5, 5 + PROMPT, device=model.device)[None]
    given = query_given(model, 1)

    def generating(generator: Any, cache: str, **more: object) -> Callable[[], object]:  # noqa: ANN401
        settings = GenerationConfig(
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            use_cache=True,
            cache_implementation=cache,
            pad_token_id=0,
        )
        return lambda: generator.generate(ids, generation_config=settings, **more)

    took = interleaved(
        {
            "compiled": generating(model, "static", **given),
            "plain": generating(model, "dynamic", **given),
            "base": generating(model.base, "static"),
        },
        setup.rounds,
        device=setup.device,
    )
    what = f"generating {TOKENS} tokens, static cache, compiled"
    names = {"plain": "dynamic cache, not compiled", "base": "bare base model, the same"}
    return [
        Figure(
            what,
            "ms/token",
            1e3 * min(took["compiled"]) / TOKENS,
            name,
            1e3 * min(took[arm]) / TOKENS,
            median_ratio(took["compiled"], took[arm]),
        )
        for arm, name in names.items()
    ]


def training_step(setup: Setup) -> Figure:
    """Rows a second with the memory's blocks compiled."""
    config, folder = distillation.prepared(setup)
    rows = distillation.RELEASED_ROWS
    drawn = distillation.drawn_rows(folder, rows)
    (plain,) = distillation.arms(config, folder, setup.device, ("ours",))
    (compiled,) = distillation.arms(config, folder, setup.device, ("ours",))
    for block in compiled.memory.blocks():
        block.compile(backend=BACKEND)
    took = interleaved(
        {"compiled": lambda: compiled.step(drawn), "plain": lambda: plain.step(drawn)},
        distillation.ROUNDS,
        device=setup.device,
    )
    return Figure(
        f"distillation, {rows:,} rows a step, blocks compiled",
        "rows/s",
        rows / min(took["compiled"]),
        "not compiled",
        rows / min(took["plain"]),
        median_ratio(took["plain"], took["compiled"]),
    )
