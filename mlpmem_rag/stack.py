"""Several memories on one base model, each of a corpus of its own.

Memories are independent: each was trained beside the frozen base alone, so one can be put on or
taken off without touching the others. At every position

    p = sum of w_i p_i + (1 - sum of w_i) p_LM,    w_i = lambda_i g_i / max(1, sum of lambda_j g_j)

with g_i the opening of memory i's gate (1 without one). While the weights sum to no more than 1,
this is the plain mixture; beyond, they are scaled, and what divides the say among the memories is
their lambda and how far their gates open. One memory in a stack is that memory, bit for bit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import MemorySettings, check_base, load_memory, load_settings
from mlpmem_rag.augmented import AugmentedLM
from mlpmem_rag.backbone import Backbone, load_backbone, resolve_layer
from mlpmem_rag.base_tokenizer import BaseTokenizer
from mlpmem_rag.checkpoint import Provenance
from mlpmem_rag.configuration import MemoryStackConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.memory import Memory
from mlpmem_rag.mixing import Share, check_lambda, gated_weight, mixture
from mlpmem_rag.model import (
    IGNORED,
    MLPMemForCausalLM,
    attach_memory,
    keep_weights,
    one_device,
    refuse_options,
)
from mlpmem_rag.query import POOLED, QueryEncoder, fitting_encoder

NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Member:
    """What a stack knows of one memory besides its weights."""

    settings: MemorySettings
    provenance: Provenance | None
    encoder: QueryEncoder | None

    @property
    def view(self) -> str:
        """The same for memories whose encoders give the same vectors."""
        settings = self.settings
        return f"{POOLED} {settings.layer}" if settings.encoder == POOLED else settings.encoder


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
            base_model: where to take the base from when its place has changed.
            device: `auto`, `cpu`, `cuda`.
            dtype: `auto`, `float32`, `bfloat16`, `float16`.

        Raises:
            ArtifactError: a folder is damaged, or the memories belong to different base models.
            ConfigError: there is no folder, or a name that no folder may have.
        """
        if not folders:
            raise ConfigError("a stack needs a memory to know its base model; give one folder")
        first = load_settings(Path(next(iter(folders.values())))).base
        revision = None if base_model else first.revision
        backbone = load_backbone(
            base_model or first.name, revision=revision, device=device, dtype=dtype
        )
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
        source = checkpoint.open_folder(Path(folder))
        if source.merged:
            raise ArtifactError(
                f"{folder} holds a base model of its own; save that memory with merge_base=False"
            )
        settings = load_settings(source.folder)
        check_base(settings, self.backbone.reference)
        layer = resolve_layer(settings.layer, self.backbone.num_layers)
        settings = replace(settings, layer=layer)
        weight = settings.memory_lambda if lambda_ is None else check_lambda(lambda_)
        memory = load_memory(source.folder, settings.memory)
        encoder = self._encoder_of(settings)
        self.memories[name] = memory.to(device=self.device, dtype=self.base.dtype)
        self._members[name] = Member(settings, source, encoder)
        self.config.members[name] = weight
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
        return sum(size for _, size in self._slices().values())

    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Query vectors of texts, as each different encoder sees them. *Shape:* (B, Q)."""
        encoders = {m.view: m.encoder for m in self._members.values() if m.encoder}
        views = [torch.from_numpy(encoder.encode(list(texts))) for encoder in encoders.values()]
        return torch.cat(views, dim=1).to(self.device)

    def mixed(
        self, logits: Tensor, states: Mapping[int, Tensor], query: Tensor | None, lambda_: float
    ) -> Tensor:
        """See `AugmentedLM.mixed`."""
        base = logits.float().log_softmax(-1)
        shares = [
            self._share(name, base, states, query, weight)
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
    ) -> Share:
        member, memory = self._members[name], self.memories[name]
        settings = member.settings
        assert isinstance(memory, Memory)
        view, asked = None, False  # type: Tensor | None, bool | Tensor
        if query is not None and settings.memory.query_size:
            start, size = self._slices()[member.view]
            view = query[:, start : start + size]  # (B, Q_i)
            asked = view.ne(0).any(-1, keepdim=True)  # (B, 1)
        log_probs = memory.log_probs(
            states[settings.layer],
            None if view is None else view[:, None],
            settings.memory_temperature,
        )
        tokens = memory.corpus_tokens
        weight = gated_weight(base, log_probs, tokens, lambda_, settings.gate, asked=asked)
        return Share(log_probs, tokens, weight)

    def _slices(self) -> dict[str, tuple[int, int]]:
        """Where each encoder's vector lies: its start and its width."""
        slices: dict[str, tuple[int, int]] = {}
        for member in self._members.values():
            size = member.settings.memory.query_size
            if size and member.view not in slices:
                slices[member.view] = (sum(s for _, s in slices.values()), size)
        return slices

    def _encoder_of(self, settings: MemorySettings) -> QueryEncoder | None:
        """The encoder of a memory, shared with the memories that have the same."""
        if not settings.memory.query_size:
            return None
        wanted = Member(settings, None, None).view
        for member in self._members.values():
            if member.view == wanted:
                return member.encoder
        backbone = replace(self.backbone, layer=settings.layer)
        return fitting_encoder(settings.encoder, backbone, settings.memory.query_size)

    def _changed(self) -> None:
        self._tap_layers(*{member.settings.layer for member in self._members.values()})
        self._encoded = None

    def _known(self, name: str) -> None:
        if name not in self._members:
            raise ConfigError(
                f"there is no memory {name!r} in the stack; it has "
                f"{', '.join(self._members) or 'none'}"
            )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Write each memory to a folder of its own, below a `config.json` that names them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, member in self._members.items():
            single = self.single(name)
            single.provenance = member.provenance
            single.save_pretrained(folder / name, merge_base=False)
        inside = self.config.base_config
        self.config.base_config = None
        try:
            self.config.save_pretrained(folder)
        finally:
            self.config.base_config = inside

    def single(self, name: str) -> MLPMemForCausalLM:
        """One of the memories alone on the same base model, at its weight in the stack.

        Raises:
            ConfigError: there is none of that name.
        """
        self._known(name)
        settings = replace(self._members[name].settings, memory_lambda=self.config.members[name])
        memory = self.memories[name]
        assert isinstance(memory, Memory)
        return attach_memory(self.backbone, memory, settings)

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
        """Load what `save_pretrained` wrote, from a local folder; see `load`.

        Raises:
            ConfigError: an option of transformers that a stack cannot follow.
        """
        given = {n: v for n, v in options.items() if n not in IGNORED and v is not None}
        refuse_options(given)
        folder = Path(pretrained_model_name_or_path)
        config = config or MemoryStackConfig.from_pretrained(folder)
        stack = cls.load(
            {name: folder / name for name in config.members},
            base_model=base_model,
            device=one_device(device_map),
            dtype=dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype or "auto",
        )
        for name, weight in config.members.items():
            stack.set_lambda(name, weight)
        stack.memory_lambda = config.memory_lambda
        return stack


AutoTokenizer.register(MemoryStackConfig, fast_tokenizer_class=BaseTokenizer, exist_ok=True)
AutoModelForCausalLM.register(MemoryStackConfig, MemoryStack, exist_ok=True)
