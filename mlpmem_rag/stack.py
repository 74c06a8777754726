"""Several memories on one base model, each of a corpus of its own.

Memories are independent: each was trained beside the frozen base alone, so one can be put on or
taken off without touching the others. At every position

    p = sum of w_i p_i + (1 - sum of w_i) p_LM,    w_i = lambda_i g_i / max(1, sum of lambda_j g_j)

with g_i the opening of memory i's gate (1 without one). While the weights sum to no more than 1,
this is the plain mixture; beyond, they are scaled, and what divides the say among the memories is
their lambda and how far their gates open. One memory in a stack is that memory, bit for bit.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import load_settings
from mlpmem_rag.augmented import AugmentedLM
from mlpmem_rag.backbone import Backbone, load_referenced
from mlpmem_rag.base_tokenizer import BaseTokenizer
from mlpmem_rag.configuration import MemoryStackConfig
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.load_options import IGNORED, named_dtype, one_device, refuse_options
from mlpmem_rag.members import Member, open_member, slices
from mlpmem_rag.memory import Memory
from mlpmem_rag.mixing import Share, asks, check_lambda, gated_weight, mixture
from mlpmem_rag.model import MLPMemForCausalLM, attach_memory, keep_weights, load_model
from mlpmem_rag.recollection import SHARE, RecollectionProcessor
from mlpmem_rag.words import requests

NAME = re.compile(r"[A-Za-z0-9_-]+")


class MemoryStack(AugmentedLM):
    """A base model and any number of memories, which share hidden states and cache.

    Attributes:
        base: the base model, frozen.
        memories: by name.
    """

    config_class = MemoryStackConfig
    config: MemoryStackConfig

    def __init__(self, backbone: Backbone) -> None:
        config = MemoryStackConfig(base_config=backbone.model.config)
        keep_weights(backbone.model)
        super().__init__(config, backbone.model)
        self.base.requires_grad_(False)
        self.tokenizer = backbone.tokenizer
        self.backbone = backbone
        self.memories = nn.ModuleDict()
        self._members: dict[str, Member] = {}
        self.post_init()  # type: ignore[no-untyped-call]
        nn.Module.eval(self)

    @classmethod
    def load(
        cls,
        folders: Mapping[str, str | os.PathLike[str]],
        *,
        base_model: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> MemoryStack:
        """Load memories and the one base model that they were trained beside.

        Args:
            folders: of the memories, by the names they are to have.
            base_model: where to take the base from when its place has changed. Without it, the
                one that the first folder names, or has inside.
            device: `auto`, `cpu`, `cuda`.
            dtype: `auto`, `float32`, `bfloat16`, `float16`.

        Raises:
            ArtifactError: a folder is damaged, or the memories belong to different base models.
            ConfigError: there is no folder, or a name that no folder may have.
        """
        if not folders:
            raise ConfigError("a stack needs a memory to know its base model; give one folder")
        first = checkpoint.open_folder(Path(next(iter(folders.values()))))
        if first.merged and base_model is None:
            _, backbone, _ = load_model(first.folder, device=device, dtype=dtype)
        else:
            base = load_settings(first.folder).base
            backbone = load_referenced(base, base_model, device=device, dtype=dtype)
        stack = cls(backbone)
        for name, folder in folders.items():
            stack.add(name, folder)
        return stack

    def add(
        self, name: str, folder: str | os.PathLike[str], *, lambda_: float | None = None
    ) -> None:
        """Put one more memory on; the others are not touched.

        Args:
            name: to know it by: letters, digits, `-` and `_`.
            folder: of the memory.
            lambda_: its mixing weight; None: the one it was saved with.

        Raises:
            ArtifactError: the folder is damaged, or belongs to another base model.
            ConfigError: the name is taken or not allowed, or lambda outside 0..1.
        """
        if not NAME.fullmatch(name) or name in self._members or hasattr(nn.ModuleDict, name):
            raise ConfigError(
                f"a memory cannot be named {name!r}: allowed are letters, digits, - and _, and "
                f"each name once (taken: {', '.join(self._members) or 'none'})"
            )
        weight = None if lambda_ is None else check_lambda(lambda_)
        member, memory = open_member(Path(folder), self.backbone, self._members.values())
        self.memories[name] = memory.to(device=self.device, dtype=self.base.dtype)
        self._members[name] = member
        self.config.members[name] = member.settings.memory_lambda if weight is None else weight
        self._changed()

    def remove(self, name: str) -> None:
        """Take a memory off; the others are not touched.

        Raises:
            ConfigError: there is none of that name.
        """
        self._known(name)
        del self.memories[name], self._members[name], self.config.members[name]
        self._changed()

    @property
    def lambdas(self) -> dict[str, float]:
        """Mixing weight of each memory; a copy, see `set_lambda`."""
        return dict(self.config.members)

    def set_lambda(self, name: str, lambda_: float) -> None:
        """Give one memory another mixing weight.

        Raises:
            ConfigError: there is none of that name, or lambda outside 0..1.
        """
        self._known(name)
        self.config.members[name] = check_lambda(lambda_)

    @property
    def query_size(self) -> int:
        """Q: the vectors of all different encoders, one after the other."""
        return max((part.stop for part in slices(self._members.values()).values()), default=0)

    @property
    def request_size(self) -> int:
        """R: the requests of all different encoders, one after the other."""
        views = slices(self._members.values(), words=True).values()
        return max((part.stop for part in views), default=0)

    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Query vectors of texts, as each different encoder sees them, and their tokens'.

        *Shape:* B texts -> (B, R).
        """
        members = {m.view: m for m in self._members.values()}
        views = [
            torch.from_numpy(requests(m.encoder, list(texts), words=bool(m.settings.memory.words)))
            for m in members.values()
            if m.encoder
        ]
        return torch.cat(views, dim=1).to(self.device)

    def recall(self, query: Tensor) -> Tensor:
        """As each memory does for itself, one after the other. *Shape:* (B, R) -> (B, P)."""
        told = self._told(query).items()
        return torch.cat([self._memory(name).recall(view) for name, view in told], dim=1)

    def place(self, query: Tensor) -> Tensor:
        """What each memory is told, one after the other. *Shape:* (B, R) -> (B, P)."""
        told = self._told(query).items()
        return torch.cat([self._memory(name).place(view) for name, view in told], dim=1)

    def _told(self, query: Tensor) -> dict[str, Tensor]:
        """The requests as the encoder of each memory that reads any sees them."""
        members = self._members.items()
        views = slices(self._members.values(), words=query.shape[1] != self.query_size)
        reading = {name: m.view for name, m in members if m.settings.memory.query_size}
        return {name: query[:, views[view]] for name, view in reading.items()}

    def processors(self, query: Tensor, begins: Tensor, lambda_: float) -> list[LogitsProcessor]:
        """See `AugmentedLM.processors`; one for each memory that recalls."""
        found: list[LogitsProcessor] = []
        for name, view in self._told(query).items():
            share = SHARE * lambda_ * self.config.members[name]
            answers = self._memory(name).taught_answers(view).masked_fill(~begins[:, None], -1)
            if share > 0 and answers.shape[1]:
                found.append(RecollectionProcessor(answers, share))
        return found

    def mixes(self, lambda_: float) -> bool:
        """Whether a memory has any weight at this one."""
        return lambda_ > 0 and any(self.config.members.values())

    def mixed(
        self,
        logits: Tensor,
        states: Mapping[int, Tensor],
        query: Tensor | None,
        lambda_: float,
        *,
        asked: bool,
    ) -> Tensor:
        """See `AugmentedLM.mixed`."""
        base = logits.float().log_softmax(-1)
        shares = [
            self._share(name, base, states, query, weight, asked=asked)
            for name, factor in sorted(self.config.members.items())  # one order, one rounding
            if (weight := lambda_ * factor) > 0
        ]
        return mixture(base, shares) if shares else logits

    def _share(
        self,
        name: str,
        base: Tensor,
        states: Mapping[int, Tensor],
        query: Tensor | None,
        lambda_: float,
        *,
        asked: bool,
    ) -> Share:
        settings, memory = self._members[name].settings, self._memory(name)
        view = None
        if query is not None and settings.memory.query_size:
            view = query[:, self._places()[name]]  # (B, Q_i)
        log_probs = memory.log_probs(
            states[settings.layer],
            None if view is None else view[:, None],
            settings.memory_temperature,
        )
        tokens = memory.corpus_tokens
        known = asks(view, asked=asked)
        weight = gated_weight(base, log_probs, tokens, lambda_, settings.gate, asked=known)
        return Share(log_probs, tokens, weight)

    def _memory(self, name: str) -> Memory:
        memory = self.memories[name]
        assert isinstance(memory, Memory)
        return memory

    def _places(self) -> dict[str, slice]:
        """Where each memory finds what it has recalled."""
        widths = [member.settings.memory.query_size for member in self._members.values()]
        ends = itertools.accumulate(widths)
        found = zip(self._members, ends, widths, strict=True)
        return {name: slice(end - width, end) for name, end, width in found}

    def _changed(self) -> None:
        self._tap_layers(*{member.settings.layer for member in self._members.values()})
        self._encoded = self._recalled = None

    def _known(self, name: str) -> None:
        if name not in self._members:
            raise ConfigError(
                f"there is no memory {name!r} in the stack; it has "
                f"{', '.join(self._members) or 'none'}"
            )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        merge_base: bool | None = None,
        push_to_hub: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Write each memory to a folder of its own, below a `config.json` that names them.

        Args:
            save_directory: the folder.
            merge_base: only single memories can have their base model inside.
            push_to_hub: upload it, too.
            **options: as in transformers; those that are about weights change nothing here.

        Raises:
            ConfigError: `merge_base=True`.
        """
        if merge_base:
            raise ConfigError(
                "a stack names its base model and never holds it; save one memory with "
                "stack.single(name).save_pretrained(folder, merge_base=True)"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, member in self._members.items():
            single = self.single(name)
            single.source = member.source
            single.save_pretrained(folder / name, merge_base=False)
        inside = self.config.base_config
        self.config.base_config = None
        try:
            self.config.save_pretrained(folder)
        finally:
            self.config.base_config = inside
        if push_to_hub:
            hub = {n: options[n] for n in checkpoint.HUB_OPTIONS if n in options}
            checkpoint.upload(folder, hub.pop("repo_id", folder.name), **hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]  # noqa: ANN401
        """Save and upload; `options` as in transformers. Returns the address of the commit."""
        return checkpoint.save_and_upload(self.save_pretrained, repo_id, **options)

    def single(self, name: str) -> MLPMemForCausalLM:
        """One of the memories alone on the same base model, at its weight in the stack.

        Raises:
            ConfigError: there is none of that name.
        """
        self._known(name)
        settings = replace(self._members[name].settings, memory_lambda=self.config.members[name])
        return attach_memory(self.backbone, self._memory(name), settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *_: Any,  # noqa: ANN401
        config: MemoryStackConfig | None = None,
        base_model: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> MemoryStack:
        """Load what `save_pretrained` wrote, from a folder or a hub repository; see `load`.

        Raises:
            ArtifactError: it is neither, or a memory in it is damaged.
            ConfigError: an option of transformers that a stack cannot follow.
        """
        folder = checkpoint.fetch(os.fspath(pretrained_model_name_or_path), options)
        refuse_options({n: v for n, v in options.items() if n not in IGNORED and v is not None})
        config = config or MemoryStackConfig.from_pretrained(folder)
        stack = cls.load(
            {name: folder / name for name in config.members},
            base_model=base_model,
            device=one_device(device_map),
            dtype=named_dtype(dtype),
        )
        for name, weight in config.members.items():
            stack.set_lambda(name, weight)
        stack.memory_lambda = config.memory_lambda
        return stack


AutoTokenizer.register(MemoryStackConfig, fast_tokenizer_class=BaseTokenizer, exist_ok=True)
AutoModelForCausalLM.register(MemoryStackConfig, MemoryStack, exist_ok=True)
