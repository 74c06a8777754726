"""A second model that shares the loaded base model, with something else in the memory's place."""

from __future__ import annotations

import copy
from typing import cast

import torch

from mlpmem_rag.memory import Memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.query import QueryEncoder


def sharing_base(memory: MemoryModel, replacement: torch.nn.Module, lambda_: float) -> MemoryModel:
    """Like `memory`, but mixed with `replacement`'s distribution; the base is the same object.

    Args:
        memory: the original, which is left as it is.
        replacement: has `log_probs`, `corpus_tokens` and `config` as a `Memory` has; and all that
            is said of requests, from `words` to `familiarity`, where it reads query vectors.
        lambda_: mixing weight of the twin; it has no gate, no temperature and no confidence.
    """
    config = copy.deepcopy(memory.model.config)
    config.gate, config.memory_lambda, config.memory_temperature = None, lambda_, 1.0
    model = MLPMemForCausalLM(config, memory.model.base, cast(Memory, replacement))
    encoder = memory.encoder if model.query_size else None
    model.tokenizer, model.query_encoder = memory.tokenizer, encoder
    torch.nn.Module.eval(model)
    return _answering(memory, model, encoder)


def with_own_base(memory: MemoryModel) -> MemoryModel:
    """A copy with a base model of its own, for changing it."""
    return _answering(memory, copy.deepcopy(memory.model), memory.encoder)


def _answering(
    memory: MemoryModel, model: MLPMemForCausalLM, encoder: QueryEncoder | None
) -> MemoryModel:
    twin = MemoryModel(model, memory.tokenizer, encoder)
    twin.folder = memory.folder
    return twin
