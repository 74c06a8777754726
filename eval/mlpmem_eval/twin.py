"""A second model that shares the loaded base model, with something else in the memory's place."""

from __future__ import annotations

import copy

import torch

from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.model import MLPMemForCausalLM


def sharing_base(memory: MemoryModel, replacement: torch.nn.Module, lambda_: float) -> MemoryModel:
    """Like `memory`, but mixed with `replacement`'s distribution; the base is the same object.

    Args:
        memory: the original, which is left as it is.
        replacement: has `log_probs`, `corpus_tokens` and `config` as a `Memory` has.
        lambda_: mixing weight of the twin; it has no gate and no confidence.
    """
    base: torch.nn.Module = memory.model.base
    shared: dict[int, object] = {id(module): module for module in base.modules()}
    shared[id(memory.model.memory)] = replacement
    model: MLPMemForCausalLM = copy.deepcopy(memory.model, shared)
    model.gate = None
    model.memory_lambda = lambda_
    return _answering(memory, model)


def with_own_base(memory: MemoryModel) -> MemoryModel:
    """A copy with a base model of its own, for changing it."""
    return _answering(memory, copy.deepcopy(memory.model))


def _answering(memory: MemoryModel, model: MLPMemForCausalLM) -> MemoryModel:
    twin = MemoryModel(model, memory.tokenizer, memory.encoder)
    twin.folder = memory.folder
    return twin
