"""A second model that shares the loaded base model, with something else in the memory's place."""

from __future__ import annotations

import copy
from typing import cast

import torch

from mlpmem_rag.memory import Memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM


def sharing_base(memory: MemoryModel, replacement: torch.nn.Module, lambda_: float) -> MemoryModel:
    """Like `memory`, but mixed with `replacement`'s distribution; the base is the same object.

    Args:
        memory: the original, which is left as it is.
        replacement: has `log_probs`, `corpus_tokens` and `config` as a `Memory` has.
        lambda_: mixing weight of the twin; it has no gate, no temperature and no confidence.
    """
    config = copy.deepcopy(memory.model.config)
    config.gate, config.memory_lambda, config.memory_temperature = None, lambda_, 1.0
    model = MLPMemForCausalLM(config, memory.model.base, cast(Memory, replacement))
    model.tokenizer, model.query_encoder = memory.tokenizer, memory.encoder
    torch.nn.Module.eval(model)
    return _answering(memory, model)


def with_own_base(memory: MemoryModel) -> MemoryModel:
    """A copy with a base model of its own, for changing it."""
    return _answering(memory, copy.deepcopy(memory.model))


def _answering(memory: MemoryModel, model: MLPMemForCausalLM) -> MemoryModel:
    twin = MemoryModel(model, memory.tokenizer, memory.encoder)
    twin.folder = memory.folder
    return twin
