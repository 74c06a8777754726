"""The beginning that prompts have in common is computed once and kept.

A chat template opens every conversation alike, often with a system message that is longer than the
question. A conversation is always cut at the same place, so an answer does not depend on what was
asked before it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Layer = TypeVar("Layer")

KEPT = 4
"""Openings whose keys and values are kept: an application has few system messages."""
SHORTEST = 8
"""Tokens below which computing costs no more than looking up."""


class Openings:
    """Keys and values of prompts' beginnings on one base model. For one thread at a time."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._kept: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()

    @torch.inference_mode()
    def cache(self, opening: Sequence[int], batch: int = 1) -> DynamicCache | None:
        """A cache of the tokens, to be continued by so many sequences.

        None: the model is to read the tokens itself.
        """
        tokens = tuple(opening)
        if len(tokens) < SHORTEST:
            return None
        if tokens not in self._kept:
            read = self._read(tokens)
            if read is None:
                return None
            self._kept[tokens] = read
        self._kept.move_to_end(tokens)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        cache = continued(self._kept[tokens])
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        return cache

    def _read(self, tokens: tuple[int, ...]) -> DynamicCache | None:
        ids = torch.tensor([tokens], device=self._base.device)
        last = torch.tensor([len(tokens) - 1], device=ids.device)
        output = self._base(input_ids=ids, use_cache=True, logits_to_keep=last)
        cache = output.past_key_values
        return cache if isinstance(cache, DynamicCache) else None


def continued(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from another one, which stays as it is.

    Layers of attention take up new tokens by joining tensors to new ones, so that both can share
    what they begin with. Layers of other kinds, which may write in place, are copied.
    """
    own = copy.copy(cache)
    own.layers = [_continued(layer) for layer in cache.layers]
    return own


def _continued(layer: Layer) -> Layer:
    joins = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    return copy.copy(layer) if joins else copy.deepcopy(layer)
