"""MLP Memory: a corpus distilled into a small network that replaces retrieval.

from mlpmem_rag import MemoryModel, train

train("./documents", out="./memory")
print(MemoryModel.load("./memory").answer("What …?").text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Corpus",
    "Document",
    "MLPMemError",
    "MemoryModel",
    "TrainConfig",
    "TrainReport",
    "__version__",
    "plan_training",
    "read_corpus",
    "train",
]

if TYPE_CHECKING:
    from mlpmem_rag.config import TrainConfig
    from mlpmem_rag.corpus import Corpus, Document, read_corpus
    from mlpmem_rag.errors import MLPMemError
    from mlpmem_rag.generation import Answer
    from mlpmem_rag.memory_model import MemoryModel
    from mlpmem_rag.pipeline import plan_training, train
    from mlpmem_rag.report import TrainReport
else:
    from wrapt import register_post_import_hook

    # Whichever of the two is imported first: transformers' Auto classes know the model.
    register_post_import_hook(
        lambda _: importlib.import_module("mlpmem_rag.configuration"),
        "transformers.models.auto.configuration_auto",
    )
    _HOMES = {
        "Answer": "generation",
        "Corpus": "corpus",
        "Document": "corpus",
        "MLPMemError": "errors",
        "MemoryModel": "memory_model",
        "TrainConfig": "config",
        "TrainReport": "report",
        "plan_training": "pipeline",
        "read_corpus": "corpus",
        "train": "pipeline",
    }

    def __getattr__(name: str) -> object:
        """Import public names on first use: `import mlpmem_rag` alone loads no torch."""
        if name not in _HOMES:
            raise AttributeError(f"module 'mlpmem_rag' has no attribute {name!r}")
        return getattr(importlib.import_module(f"mlpmem_rag.{_HOMES[name]}"), name)
