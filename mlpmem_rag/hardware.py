"""Which device and number format to compute with. `auto` picks; everything else is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mlpmem_rag.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that is present.

    Raises:
        ConfigError: unknown name, or CUDA asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device {device!r} is not known; choose one of {', '.join(DEVICES)}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for, but torch sees no GPU; "
            "use --device cpu or install a CUDA build of torch"
        )
    return torch.device(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have hardware of their own on this device."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_amd(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor is one of AMD's, by its capabilities as torch tells them."""
    return "AMD" in str(capabilities.get("cpu_name", ""))


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn `auto` or a name of `DTYPES` into a dtype: auto is bfloat16 where it is fast.

    Raises:
        ConfigError: unknown name.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`, as accepted by `resolve_dtype`."""
    return str(dtype).removeprefix("torch.")
