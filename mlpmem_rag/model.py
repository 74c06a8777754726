"""A base language model with its memory, as a transformers model.

`forward` returns the log-probabilities of the mixture as logits; generation is transformers' own.
At lambda 0 it returns the base model's output, untouched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel
from transformers import initialization as init

from mlpmem_rag import base_tokenizer as base_tokenizer  # registers itself
from mlpmem_rag import checkpoint
from mlpmem_rag.artifact import MemorySettings, check_base, load_memory, load_settings
from mlpmem_rag.augmented import AugmentedLM
from mlpmem_rag.backbone import Backbone, load_referenced, resolve_layer
from mlpmem_rag.checkpoint import Source
from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.hardware import resolve_device, resolve_dtype
from mlpmem_rag.integrity import Verify, verify_mode
from mlpmem_rag.late_interaction import Words
from mlpmem_rag.load_options import refuse_other_memory, refuse_quantization, taken_options
from mlpmem_rag.memory import Candidates, Memory, MemoryConfig
from mlpmem_rag.mixing import asks, check_lambda, check_temperature, mix
from mlpmem_rag.query import QueryEncoder, check_encoder, fitting_encoder
from mlpmem_rag.recollection import SHARE, RecollectionProcessor
from mlpmem_rag.words import requests


class MLPMemForCausalLM(AugmentedLM):
    """p = lambda * p_mem + (1 - lambda) * p_LM at every position (paper, section 3).

    Attributes:
        base: the base model, frozen.
        memory: the memory.
        gate: adapts lambda to each token; None: the same everywhere.
        tokenizer: the base's; None where the model was made without one.
        source: the folder that the memory comes from, kept for the next save.
    """

    config_class = MLPMemConfig
    config: MLPMemConfig

    def __init__(
        self,
        config: MLPMemConfig,
        base: PreTrainedModel | None = None,
        memory: Memory | None = None,
    ) -> None:
        if base is None:
            base = _new_base(config)
        else:
            keep_weights(base)
        super().__init__(config, base)
        check_lambda(config.memory_lambda)
        check_temperature(config.memory_temperature)
        if memory is None:
            memory = Memory(MemoryConfig(**(config.memory or {})))
        else:
            keep_weights(memory)
        self.memory = memory
        gate = config.gate
        self.gate = Gate(**{n: tuple(w) for n, w in gate.items()}) if gate else None
        self.source: Source | None = None
        self._encoder: QueryEncoder | None = None
        self._found: tuple[Tensor, Candidates] | None = None
        self._listeners: dict[int, Callable[[Tensor], None]] = {}
        self._tap_layers(config.layer)
        self.base.requires_grad_(False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: torch.nn.Module) -> None:
        """What transformers does to weights that a checkpoint lacks."""
        parent: Any = super()
        parent._init_weights(module)
        if isinstance(module, Memory):
            init.copy_(module.corpus_tokens, torch.arange(module.config.vocab_size))
            init.zeros_(module.questions)
            init.constant_(module.drafts, -1)
        if isinstance(module, Words):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)

    @property
    def query_size(self) -> int:
        """Q, width of the query vectors; 0: the memory reads none."""
        return self.memory.config.query_size

    @property
    def query_encoder(self) -> QueryEncoder | None:
        """What turns texts into query vectors, loaded when first asked for; None: there is none.

        Raises:
            ArtifactError: its vectors are not of the width that the memory reads.
        """
        if self._encoder is None:
            self._encoder = fitting_encoder(self.encoder_source, self.backbone, self.query_size)
        return self._encoder

    @query_encoder.setter
    def query_encoder(self, encoder: QueryEncoder | None) -> None:
        check_encoder(encoder, encoder.name if encoder else "none", self.query_size)
        self._encoder, self._encoded = encoder, None

    @property
    def encoder_source(self) -> str:
        """Where the encoder is loaded from: the memory's own folder, or by its name."""
        inside = self.source.encoder_folder if self.source else None
        return str(inside or self.config.encoder)

    @property
    def backbone(self) -> Backbone:
        """The base model as the rest of the library takes it.

        Raises:
            ConfigError: the model was made without a tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer; load it with from_pretrained or set model.tokenizer"
            )
        reference = checkpoint.reference_of(self.config, self.base, self.tokenizer)
        return Backbone(self.base, self.tokenizer, self.config.layer, reference)

    def encode_queries(self, texts: Sequence[str]) -> Tensor:
        """Requests: query vectors of texts, and their tokens'. *Shape:* B texts -> (B, R).

        Raises:
            ConfigError: the memory reads no query vector, or its encoder is not known.
        """
        encoder = self.query_encoder
        if encoder is None:
            raise ConfigError(
                f"this memory has no query encoder (encoder {self.config.encoder!r}); "
                "pass query_vector, or set model.query_encoder"
            )
        words = self.memory.words is not None
        return torch.from_numpy(requests(encoder, list(texts), words=words)).to(self.device)

    @property
    def request_size(self) -> int:
        """See `MemoryConfig.request_size`."""
        return self.memory.config.request_size

    def place(self, query: Tensor) -> Tensor:
        """See `Memory.place`. *Shape:* (B, R) -> (B, Q)."""
        return self.memory.place(query)

    def recall(self, query: Tensor) -> Tensor:
        """See `Memory.recall`. *Shape:* (B, R) -> (B, Q)."""
        if not self.memory.recalls or torch.compiler.is_compiling():
            return self.memory.recall(query)
        candidates = self.memory.candidates(query)
        self._found = (query, candidates)
        return self.memory.recall(query, candidates.best)

    def taught_answers(self, query: Tensor) -> Tensor:
        """How the answers to the questions begin that requests are recalled as.

        -1 behind their ends, and where nothing is asked or recalled. *Shape:* (B, R) -> (B, K).
        """
        told = query.to(self.device)
        candidates = self.candidates(told) if self.memory.recalls else None
        return self.memory.taught_answers(told, candidates.best if candidates else None)

    def candidates(self, query: Tensor) -> Candidates | None:
        """See `Memory.candidates`, found once for a tensor; the recall serves the next pass too.

        None: the memory was taught no questions. *Shape:* (B, R).
        """
        if not self.memory.config.num_questions:
            return None
        if self.memory.recalls:
            self.recalled(query)
        found = self._found  # another thread may put its own there
        return found[1] if found and found[0] is query else self.memory.candidates(query)

    def processors(self, query: Tensor, begins: Tensor, lambda_: float) -> list[LogitsProcessor]:
        """See `AugmentedLM.processors`; the recall serves the first pass too."""
        answers = self.taught_answers(query).masked_fill(~begins[:, None], -1)
        return [RecollectionProcessor(answers, SHARE * lambda_)] if answers.shape[1] else []

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
        memory_log_probs = self.memory.log_probs(
            states[self.config.layer],
            None if query is None else query[:, None],
            self.config.memory_temperature,
        )
        if self._listeners and not torch.compiler.is_compiling():
            listener = self._listeners.get(threading.get_ident())
            if listener is not None:
                listener(memory_log_probs)
        return mix(
            logits,
            memory_log_probs,
            self.memory.corpus_tokens,
            lambda_,
            self.gate,
            asked=asks(query, asked=asked),
        )

    @contextmanager
    def overheard(self, listener: Callable[[Tensor], None]) -> Iterator[None]:
        """Until its end, the memory's log-probabilities go to a listener too. *Shape:* (B, T, V).

        Those of this thread, in several pieces where there are many positions.
        """
        thread = threading.get_ident()
        self._listeners[thread] = listener
        try:
            yield
        finally:
            if self._listeners.get(thread) is listener:  # the next one may be listening already
                del self._listeners[thread]

    def constant_weight(self, lambda_: float, *, asked: bool) -> float | None:
        """The memory's weight in the mixture where it is the same for every token; else None.

        Args:
            lambda_: mixing weight.
            asked: whether a request is known.
        """
        if self.gate is None:
            return lambda_
        opening = self.gate.constant_opening if asked else None
        return None if opening is None else lambda_ * opening

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        merge_base: bool | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Write the memory to a folder of safetensors and JSON.

        Args:
            save_directory: the folder.
            merge_base: put base model, tokenizer and query encoder into the folder, so that
                nothing else is needed to load it. None: only where the base model is not known by
                a name, or was in the folder that this model came from.
            push_to_hub: upload it, too.
            **kwargs: as in transformers; those that are about weights apply with `merge_base`.

        Raises:
            ConfigError: `merge_base=False` for a base model that is not known by name.
        """
        hub = {n: kwargs.pop(n) for n in checkpoint.HUB_OPTIONS if n in kwargs}
        folder = Path(save_directory)
        if merge_base is None:
            merge_base = self.config.base is None or bool(self.source and self.source.merged)
        if merge_base:
            write: Any = super().save_pretrained
            checkpoint.save_merged(self, folder, lambda inside: write(inside, **kwargs))
        else:
            checkpoint.save_memory(self, folder)
        if push_to_hub:
            checkpoint.upload(folder, hub.pop("repo_id", folder.name), **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        merge_base: bool | None = None,
        max_shard_size: str | int = "50GB",
        **options: Any,  # noqa: ANN401
    ) -> str:
        """Save and upload; `options` as in transformers. Returns the address of the commit."""
        return checkpoint.save_and_upload(
            lambda folder: self.save_pretrained(
                folder, merge_base=merge_base, max_shard_size=max_shard_size
            ),
            repo_id,
            **options,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load a memory folder, or a hub repository of one, with its base model.

        Args:
            pretrained_model_name_or_path: the folder or repository.
            *args: as in transformers.
            **kwargs: as in transformers, the settings of `MLPMemConfig` among them, and
                `base_model`: where to take the base from when its place has changed since the
                training; its fingerprint must be the same; and `verify`: `full` or `fast`, see
                `mlpmem_rag.integrity.Verify`.

        Raises:
            ArtifactError: files are missing, damaged, or belong to another base model.
            BaseModelError: the base model cannot be loaded.
            ConfigError: an option that this model does not take.
        """
        load: Any = super().from_pretrained
        if pretrained_model_name_or_path is None:  # weights are given as state_dict
            return load(None, *args, **kwargs)
        folder = checkpoint.fetch(os.fspath(pretrained_model_name_or_path), kwargs)
        source = checkpoint.open_folder(folder, verify_mode(kwargs.pop("verify", Verify.full)))
        if not source.merged:
            return _load_beside(source, kwargs)
        if kwargs.pop("base_model", None) is not None:
            raise _base_inside(source)
        refuse_quantization(kwargs)
        checkpoint.check_inside(source)
        loaded = load(source.folder, *args, **kwargs)
        model: MLPMemForCausalLM = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base.requires_grad_(False)  # transformers has put new parameters in place
        model.source = source
        model.base.generation_config = model.generation_config
        if (source.folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
            checkpoint.adopt_tokenizer(model, tokenizer)
        return loaded


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
    config = MLPMemConfig(base_config=backbone.model.config, **asdict(settings))
    config.layer = resolve_layer(settings.layer, backbone.num_layers)
    memory = memory.to(device=backbone.device, dtype=backbone.model.dtype)
    model = MLPMemForCausalLM(config, backbone.model, memory)
    model.tokenizer = backbone.tokenizer
    torch.nn.Module.eval(model)
    return model


def load_model(
    folder: str | Path,
    *,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: str = Verify.full,
) -> tuple[MLPMemForCausalLM, Backbone, MemorySettings]:
    """Load a memory and its base model from a folder written by training or `save_pretrained`.

    Args:
        folder: the memory.
        base_model: where to take the base from when its place has changed since the training;
            its fingerprint must be the same.
        device: `auto`, `cpu`, `cuda`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        verify: `full` compares all checksums, `fast` spares those of the weights.

    Raises:
        ArtifactError: the folder is missing, damaged, or belongs to another base model.
        BaseModelError: the base model cannot be loaded.
    """
    source = checkpoint.open_folder(Path(folder), verify_mode(verify))
    settings = load_settings(source.folder)
    if not source.merged:
        model = _on_its_base(source, settings, base_model, device, dtype)
        return model, model.backbone, settings
    if base_model is not None:
        raise _base_inside(source)
    place = resolve_device(device)
    # Verified just now: the second look costs little.
    model = MLPMemForCausalLM.from_pretrained(
        source.folder, dtype=resolve_dtype(dtype, place), verify=Verify.fast
    )
    torch.nn.Module.to(model, place)
    return model, model.backbone, replace(settings, encoder=model.encoder_source)


def _on_its_base(
    source: Source,
    settings: MemorySettings,
    base_model: str | None,
    device: str,
    dtype: str,
) -> MLPMemForCausalLM:
    memory = load_memory(source.folder, settings.memory, num_tokens=settings.base.vocab_size)
    backbone = load_referenced(settings.base, base_model, device=device, dtype=dtype)
    model = attach_memory(backbone, memory, settings)
    model.source = source
    return model


def _load_beside(source: Source, given: dict[str, Any]) -> Any:  # noqa: ANN401
    """`from_pretrained` of a memory whose base model is elsewhere."""
    options = taken_options(source.folder, given)
    refuse_other_memory(options.config, MLPMemConfig.from_pretrained(source.folder))
    settings = replace(
        load_settings(source.folder),
        memory_lambda=check_lambda(options.config.memory_lambda),
        memory_temperature=check_temperature(options.config.memory_temperature),
    )
    model = _on_its_base(source, settings, options.base_model, options.device, options.dtype)
    if options.attention is not None:
        model.base.set_attn_implementation(options.attention)
    if options.generation_config is not None:
        model.generation_config = model.base.generation_config = options.generation_config
    nothing: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": []}
    info = {**nothing, "mismatched_keys": [], "error_msgs": []}
    return (model, info) if options.with_info else model


def _base_inside(source: Source) -> ConfigError:
    return ConfigError(f"{source.folder} holds its own base model; leave out base_model")


def _new_base(config: MLPMemConfig) -> PreTrainedModel:
    """An untrained base model, to be filled from a checkpoint."""
    if config.base_config is None:
        raise ConfigError(
            "this configuration names a base model but does not describe it; load the memory with "
            "from_pretrained, or put it on a loaded base model with attach_memory"
        )
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            config.base_config, trust_remote_code=False
        )
    except ValueError as error:
        raise ArtifactError(
            f"the base model inside is none that transformers knows "
            f"({str(error).splitlines()[0][:200]}), and no other code is run"
        ) from error
    return base


def keep_weights(module: torch.nn.Module) -> None:
    """Tell transformers that these weights are there already: it fills in missing ones at random.

    It does so module by module, and only where this mark is not set.
    """
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


AutoModelForCausalLM.register(MLPMemConfig, MLPMemForCausalLM, exist_ok=True)
