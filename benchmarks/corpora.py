"""Decoding with memories of the same size that were trained on corpora of different sizes.

Without a second memory, an untrained one stands in for it: made for the whole corpus where the
first was trained on its first documents. Trained or not, the same products are computed.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import torch

from benchmarks.decoding import PROMPT, STEPS, timed
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.memory import new_memory
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory, load_model

ROUNDS = 3
MARGIN = 0.05


def run(setup: Setup) -> list[Figure]:
    """Ratio of times, the larger corpus's memory over the other's."""
    first = setup.model
    second = (
        load_model(setup.other_memory, device=setup.device, dtype=setup.dtype)[0]
        if setup.other_memory
        else untrained(setup, first)
    )
    small, large = sorted((first, second), key=lambda model: model.memory.config.vocab_size)
    _, decodes = timed(
        {"small": small, "large": large},
        setup.rounds * ROUNDS,
        batch=1,
        prompt=PROMPT,
        steps=STEPS,
    )
    return [
        Figure(
            "decoding, a token, memory of the corpus with more distinct tokens",
            "ms",
            1e3 * statistics.median(decodes["large"]),
            "memory of the other corpus",
            1e3 * statistics.median(decodes["small"]),
            median_ratio(decodes["large"], decodes["small"]),
            Goal(at_least=1 - MARGIN, at_most=1 + MARGIN),
            details={
                "distinct_tokens": large.memory.config.vocab_size,
                "distinct_tokens_other": small.memory.config.vocab_size,
                "parameters": sum(p.numel() for p in large.memory.parameters()),
                "parameters_other": sum(p.numel() for p in small.memory.parameters()),
                "other_memory": str(setup.other_memory.name if setup.other_memory else "untrained"),
            },
        )
    ]


def untrained(setup: Setup, like: MLPMemForCausalLM) -> MLPMemForCausalLM:
    """A memory as `like`, with a head for all tokens of the corpus."""
    tokens = np.unique(np.concatenate([w.token_ids[w.context :] for w in setup.windows]))
    config = replace(like.memory.config, vocab_size=len(tokens))
    memory = new_memory(config, torch.from_numpy(tokens.astype(np.int64)), None, seed=0)
    found = MemorySettings(
        like.backbone.reference,
        like.backbone.layer,
        config,
        like.config.memory_lambda,
        like.config.memory_temperature,
        gate=like.gate,
    )
    return attach_memory(like.backbone, memory, found)
