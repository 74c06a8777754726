"""Where a comparison ran: machine and versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from mlpmem_rag.circumstances import library_versions

CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, and GPU if there is one."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def versions() -> dict[str, str]:
    """Installed versions of what can change a figure."""
    more = ("llama-index-core", "scipy", "sentence-transformers", "peft")
    return {
        "python": platform.python_version(),
        **library_versions(),
        **library_versions(more),
    }


def _processor() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
