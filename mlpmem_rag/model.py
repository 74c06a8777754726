"""A base language model with its memory, as a transformers model.

`forward` returns the log-probabilities of the mixture as logits; generation is transformers' own.
At lambda 0 it returns the base model's output, untouched.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mlpmem_rag.artifact import (
    MODEL_TYPE,
    MemorySettings,
    check_base,
    load_manifest,
    load_memory,
    load_settings,
    verify_files,
)
from mlpmem_rag.backbone import Backbone, HiddenTap, load_backbone, resolve_layer
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.memory import Memory
from mlpmem_rag.mixing import check_lambda, mix


class MLPMemConfig(PreTrainedConfig):
    """The base model's configuration plus what the memory adds."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        base_config: PreTrainedConfig | None = None,
        layer: int = 0,
        memory_lambda: float = 0.0,
        memory_temperature: float = 1.0,
        gate: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        self.base_config = base_config  # first: validation in the base class asks for it
        self.layer = layer
        self.memory_lambda = memory_lambda
        self.memory_temperature = memory_temperature
        self.gate = gate
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:  # noqa: ANN401
        """The base's own, which decides how key-value caches are laid out."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


class MLPMemForCausalLM(PreTrainedModel, GenerationMixin):
    """p = lambda * p_mem + (1 - lambda) * p_LM at every position (paper, section 3)."""

    config_class = MLPMemConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"

    def __init__(
        self, config: MLPMemConfig, base: PreTrainedModel, memory: Memory, tapped: torch.nn.Module
    ) -> None:
        super().__init__(config)
        self.base = base
        self.memory = memory
        self._tapped = (tapped,)  # in a tuple: a second registration would double its weights
        self.generation_config = base.generation_config
        self._memory_lambda = check_lambda(config.memory_lambda)
        gate = config.gate
        self.gate = Gate(**{n: tuple(w) for n, w in gate.items()}) if gate else None

    @property
    def memory_lambda(self) -> float:
        """Mixing weight: 0 is the base model alone, 1 the memory alone where its gate is open."""
        return self._memory_lambda

    @memory_lambda.setter
    def memory_lambda(self, value: float) -> None:
        self._memory_lambda = check_lambda(value)

    @property
    def device(self) -> torch.device:
        """Where the base model computes."""
        return self.base.device

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base's."""
        embeddings: torch.nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> torch.nn.Module:
        """The base's."""
        embeddings: torch.nn.Module = self.base.get_output_embeddings()
        return embeddings

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """The base's, since every architecture has its own needs."""
        mine = {name: kwargs.pop(name, None) for name in ("memory_lambda", "query_vector")}
        base: Any = self.base  # torch types submodules as tensors or modules
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, **mine}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        memory_lambda: float | None = None,
        query_vector: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> CausalLMOutputWithPast:
        """Log-probabilities of the mixture as `logits` (the base's own logits at lambda 0).

        Args:
            input_ids: *Shape:* (B, T).
            attention_mask: as the base takes it.
            position_ids: as the base takes it.
            past_key_values: the base's cache; the memory needs none.
            inputs_embeds: instead of ids. *Shape:* (B, T, D).
            labels: token ids to predict, -100 where none; gives a loss. *Shape:* (B, T).
            use_cache: whether to return a cache.
            logits_to_keep: as in transformers; the memory, too, runs on these positions only.
            memory_lambda: mixing weight of this call instead of the model's.
            query_vector: what is asked, as the memory's encoder sees it; the same on every step
                of a generation. None: no request is known. *Shape:* (B, Q).
            **kwargs: everything else the base model takes.

        Raises:
            ConfigError: lambda outside 0..1, or query vectors of another number or width.
        """
        lambda_ = self.memory_lambda if memory_lambda is None else check_lambda(memory_lambda)
        if lambda_ > 0:
            logits_to_keep = _named(logits_to_keep, input_ids, inputs_embeds)
        with HiddenTap(self._tapped[0]).listen() as tap:
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        logits = output.logits
        if lambda_ > 0:
            hidden = tap.hidden.reshape(len(logits), -1, tap.hidden.shape[-1])  # (B, T, D)
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(None)
            query = self._checked(query_vector, len(hidden))
            memory_log_probs = self.memory.log_probs(
                hidden[:, kept], query, self.config.memory_temperature
            )
            logits = mix(
                logits,
                memory_log_probs,
                self.memory.corpus_tokens,
                lambda_,
                self.gate,
                asked=query is not None,
            )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _checked(self, query_vector: Tensor | None, batch: int) -> Tensor | None:
        """The vectors as the memory takes them. *Shape:* (B, Q) -> (B, 1, Q)."""
        width = self.memory.config.query_size
        if query_vector is None or width == 0:
            return None
        if query_vector.shape != (batch, width):
            raise ConfigError(
                f"query_vector has shape {tuple(query_vector.shape)}; this memory takes "
                f"{(batch, width)}, one vector for each sequence"
            )
        return query_vector[:, None].to(self.device)


def _named(
    logits_to_keep: int | Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> int | Tensor:
    """The last n positions by their numbers; a tensor, and 0 for all, stay as they are.

    A slice of the last positions is not contiguous, and on CPUs torch then copies the output
    matrix once for each sequence of the batch: gigabytes.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if isinstance(logits_to_keep, Tensor) or logits_to_keep == 0 or given is None:
        return logits_to_keep
    length = given.shape[1]
    return torch.arange(max(0, length - logits_to_keep), length, device=given.device)


def attach_memory(
    backbone: Backbone, memory: Memory, settings: MemorySettings
) -> MLPMemForCausalLM:
    """Put a memory on a loaded base model.

    Raises:
        ArtifactError: the memory belongs to another base model.
    """
    check_base(settings, backbone.reference)
    if settings.memory.hidden_size != backbone.hidden_size:
        raise ArtifactError(
            f"the memory reads hidden states of width {settings.memory.hidden_size}, the base "
            f"model has {backbone.hidden_size}; train a memory for this base"
        )
    config = MLPMemConfig(
        base_config=backbone.model.config,
        layer=settings.layer,
        memory_lambda=settings.memory_lambda,
        memory_temperature=settings.memory_temperature,
        gate=asdict(settings.gate) if settings.gate else None,
    )
    memory = memory.to(device=backbone.device, dtype=backbone.model.dtype)
    model = MLPMemForCausalLM(config, backbone.model, memory, backbone.mlp)
    torch.nn.Module.eval(model)
    return model


def load_model(
    folder: str | Path,
    *,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[MLPMemForCausalLM, Backbone, MemorySettings]:
    """Load a memory and its base model from a folder written by training.

    Args:
        folder: the memory.
        base_model: where to take the base from when its place has changed since the training;
            its fingerprint must be the same.
        device: `auto`, `cpu`, `cuda`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.

    Raises:
        ArtifactError: the folder is missing, damaged, or belongs to another base model.
        BaseModelError: the base model cannot be loaded.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    verify_files(folder, manifest)
    settings = load_settings(folder)
    memory = load_memory(folder, settings.memory)
    backbone = load_backbone(
        base_model or settings.base.name,
        revision=None if base_model else settings.base.revision,
        device=device,
        dtype=dtype,
    )
    check_base(settings, backbone.reference)  # before the layer, which another base may not have
    layer = resolve_layer(settings.layer, backbone.num_layers)
    backbone = replace(backbone, layer=layer)
    return attach_memory(backbone, memory, settings), backbone, settings
