"""The beginning that prompts have in common is computed once and kept.

A chat template opens every conversation alike, often with a system message that is longer than the
question. A conversation is always cut at the same place, so an answer does not depend on what was
asked before it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mlpmem_rag.backbone import text_config
from mlpmem_rag.prompts import Prompt, left_padded

Layer = TypeVar("Layer")
Form = tuple[tuple[int, ...], torch.device, torch.dtype]
"""Tokens, and where and as what the base model computes."""

KEPT = 4
"""Openings whose keys and values are kept: an application has few system messages."""
SHORTEST = 8
"""Tokens below which computing costs no more than looking up."""


@dataclass(frozen=True)
class Begun:
    """Prompts of a batch, whose common beginning may have been read.

    Attributes:
        token_ids: all of them, padded in front or behind that beginning. *Shape:* (B, T).
        mask: 0 for padding. *Shape:* (B, T).
        cache: of their first tokens, to be taken over; None: nothing has been read.
        read: how many these are.
    """

    token_ids: Tensor
    mask: Tensor
    cache: DynamicCache | None
    read: int

    @property
    def unread(self) -> Tensor:
        """What the model is to read first. *Shape:* (B, T - read)."""
        return self.token_ids[:, self.read :]


class Openings:
    """Keys and values of prompts' beginnings on one base model. For one thread at a time."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._kept: OrderedDict[Form, DynamicCache] = OrderedDict()

    def begin(self, prompts: Sequence[Prompt], pad: int, *, shared: bool = True) -> Begun:
        """A batch of prompts, from where they differ if they begin alike.

        Args:
            prompts: what the model reads.
            pad: token id of the padding.
            shared: False: the model is to read all at once, which has other last bits.
        """
        opening = self._common(prompts) if shared else []
        ids, mask = left_padded([p.token_ids[len(opening) :] for p in prompts], pad)
        before = torch.tensor([opening] * len(prompts), dtype=torch.long)
        cache = self.cache(opening, len(prompts))
        device = self._base.device
        return Begun(
            torch.cat([before, ids], dim=1).to(device),
            torch.cat([torch.ones_like(before), mask], dim=1).to(device),
            cache,
            0 if cache is None else len(opening),
        )

    def _common(self, prompts: Sequence[Prompt]) -> list[int]:
        """The opening of all prompts, unless a layer that counts places would mistake the padding.

        Padding in the middle moves the opening of the shorter prompts away. Nor is a base model
        whose settings ask for a cache of another kind given one.
        """
        openings = {tuple(prompt.token_ids[: prompt.opening]) for prompt in prompts}
        lengths = {len(prompt.token_ids) for prompt in prompts}
        kind = getattr(self._base.generation_config, "cache_implementation", None)
        if len(openings) > 1 or kind or (len(lengths) > 1 and counts_places(self._base)):
            return []
        return list(openings.pop())

    @torch.inference_mode()
    def cache(self, opening: Sequence[int], batch: int = 1) -> DynamicCache | None:
        """A cache of the tokens, to be continued by so many sequences.

        None: the model is to read the tokens itself.
        """
        tokens = tuple(opening)
        if len(tokens) < SHORTEST:
            return None
        form = tokens, self._base.device, self._base.dtype
        if form not in self._kept:
            read = self._read(tokens)
            if read is None:
                return None
            self._kept[form] = read
        self._kept.move_to_end(form)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        cache = continued(self._kept[form])
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        return cache

    def _read(self, tokens: tuple[int, ...]) -> DynamicCache | None:
        ids = torch.tensor([tokens], device=self._base.device)
        last = torch.tensor([len(tokens) - 1], device=ids.device)
        output = self._base(input_ids=ids, use_cache=True, logits_to_keep=last)
        cache = output.past_key_values
        return cache if isinstance(cache, DynamicCache) else None


def counts_places(base: PreTrainedModel) -> bool:
    """Whether attention goes by places in the cache, padding among them, instead of positions.

    So do windows, chunks, and MPT's linear biases (other models with such take them from the mask).
    """
    config = text_config(base)
    limited = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(limited) or config.model_type == "mpt"


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
