"""Memories that are loaded once, however many LLM objects use them."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from weakref import WeakValueDictionary

from mlpmem_rag.artifact import MANIFEST
from mlpmem_rag.memory_model import MemoryModel

_Key = tuple[str, str, str | None, str, str]
_loaded: WeakValueDictionary[_Key, MemoryModel] = WeakValueDictionary()
_lock = threading.Lock()


def shared_model(
    folder: str | Path, *, base_model: str | None, device: str, dtype: str
) -> MemoryModel:
    """Load a memory, or give the one that is loaded already and still in use.

    Raises:
        ArtifactError: the folder is missing, damaged, or belongs to another base model.
        BaseModelError: the base model cannot be loaded.
    """
    path = Path(folder)
    manifest = path / MANIFEST
    # A folder that was trained anew holds another memory.
    content = manifest.read_bytes() if manifest.is_file() else b""
    key = (str(path.resolve()), hashlib.sha256(content).hexdigest(), base_model, device, dtype)
    with _lock:
        memory = _loaded.get(key)
        if memory is None:
            memory = MemoryModel.load(path, base_model=base_model, device=device, dtype=dtype)
            _loaded[key] = memory
        return memory
