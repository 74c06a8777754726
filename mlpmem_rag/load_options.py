"""What transformers' `from_pretrained` may be given for a memory whose base model is elsewhere.

Where the base model lies inside the memory's folder, transformers itself loads both and follows
all of its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.hardware import dtype_name

IGNORED = ("_from_auto", "_from_pipeline", "trust_remote_code", "adapter_kwargs", "use_safetensors",
    "low_cpu_mem_usage", "weights_only")  # fmt: skip
"""Options that change nothing here: there is no code to trust, nothing pickled."""


@dataclass(frozen=True)
class LoadOptions:
    """Options that are followed.

    Attributes:
        config: the memory's own, with the settings that were given.
        base_model: where to take the base model from.
        device: as `resolve_device` takes it.
        dtype: as `resolve_dtype` takes it.
        attention: how the base model attends, by transformers' names.
        generation_config: instead of the base model's.
        with_info: whether to return what was missing or left over, too.
    """

    config: MLPMemConfig
    base_model: str | None
    device: str
    dtype: str
    attention: str | None
    generation_config: GenerationConfig | None
    with_info: bool


def taken_options(folder: Path, given: Mapping[str, Any]) -> LoadOptions:
    """The options among what `from_pretrained` was given.

    Raises:
        ConfigError: there is one that cannot be followed.
    """
    refuse_quantization(given)
    rest = {name: value for name, value in given.items() if name not in IGNORED}
    own = {name: rest.pop(name, None) for name in ("base_model", "generation_config")}
    attention = rest.pop("attn_implementation", None)
    with_info = bool(rest.pop("output_loading_info", False))
    dtype = named_dtype(rest.pop("dtype", None) or rest.pop("torch_dtype", None))
    device = one_device(rest.pop("device_map", None))
    config = rest.pop("config", None)
    if not isinstance(config, MLPMemConfig):
        config, rest = MLPMemConfig.from_pretrained(folder, return_unused_kwargs=True, **rest)
    refuse_options(rest)
    return LoadOptions(
        config, device=device, dtype=dtype, attention=attention, with_info=with_info, **own
    )


def refuse_other_memory(given: MLPMemConfig, own: MLPMemConfig) -> None:
    """Settings that make the memory what it is cannot be others than it was trained with.

    Raises:
        ConfigError: one is.
    """
    fixed = ("base", "layer", "memory", "encoder", "gate", "confidence")
    if others := [name for name in fixed if getattr(given, name) != getattr(own, name)]:
        raise ConfigError(
            f"{', '.join(others)}: cannot be other than the memory was trained with; of its "
            "settings, from_pretrained takes memory_lambda and memory_temperature"
        )


def refuse_quantization(options: Mapping[str, Any]) -> None:
    """A memory reads the hidden states of the weights that it was trained beside.

    Raises:
        ConfigError: they are to be quantised.
    """
    if options.get("quantization_config") is not None:
        raise ConfigError(
            "quantization_config: not for a memory, which reads the hidden states of the weights "
            "that it was trained beside; load it without, in bfloat16 or float16 to save space"
        )


def refuse_options(options: Mapping[str, Any]) -> None:
    """Say which options of `from_pretrained` cannot be followed.

    Raises:
        ConfigError: there is one.
    """
    if options:
        raise ConfigError(
            f"{', '.join(sorted(options))}: not for a memory whose base model is elsewhere; load "
            "it without, or save it with merge_base=True and load that"
        )


def named_dtype(dtype: torch.dtype | str | None) -> str:
    """A `dtype` as `resolve_dtype` takes it."""
    return dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype or "auto"


def one_device(device_map: object) -> str:
    """The device that a `device_map` names.

    Raises:
        ConfigError: it spreads the model over several.
    """
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    place = places[0] if len(set(map(str, places))) == 1 else None
    if (place is None and device_map is not None) or str(place) in ("balanced", "sequential"):
        raise ConfigError(
            f"device_map = {device_map}: base model and memory stay together; give one device, or "
            "save the memory with merge_base=True and load that"
        )
    if place is None:
        return "cpu"
    return f"cuda:{place}" if isinstance(place, int) else str(place)
