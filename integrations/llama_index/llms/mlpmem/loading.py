"""Memories that are loaded once, however many LLM objects use them."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from weakref import WeakValueDictionary

from mlpmem_rag.artifact import MANIFEST
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.hardware import dtype_name, resolve_device, resolve_dtype
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
    path, place = Path(folder), resolve_device(device)
    number = dtype_name(resolve_dtype(dtype, place))
    key = (str(path.resolve()), _digest(path), base_model, str(place), number)
    with _lock:
        memory = _loaded.get(key)
        if memory is None:
            memory = MemoryModel.load(path, base_model=base_model, device=device, dtype=dtype)
            _loaded[key] = memory
        return memory


def check_loaded(memory: MemoryModel, *, device: str, dtype: str) -> None:
    """Refuse settings that a memory which is loaded already does not have.

    Raises:
        ConfigError: it was loaded on another device, or in another number format.
    """
    place, number = str(memory.model.device), dtype_name(memory.model.dtype)
    for name, given, has in (("device", device, place), ("dtype", dtype, number)):
        if given != "auto" and not has.startswith(given):
            raise ConfigError(
                f"{name} = {given!r}: this memory is loaded already, with {has}; leave {name} "
                "out, or give MLPMemLLM the memory's folder"
            )


def reload(memory: MemoryModel) -> None:
    """Have a loaded memory, and others of its folder, be what that holds now, for all who use them.

    Raises:
        ArtifactError: the folder is missing or damaged.
        BaseModelError: the base model cannot be loaded.
        ConfigError: the memory was not loaded from a folder.
    """
    if memory.folder is None:
        raise ConfigError("only a memory that was loaded from a folder can be loaded again")
    folder = memory.folder
    with _lock:
        digest, here = _digest(folder), str(folder.resolve())
        same = {key: loaded for key, loaded in _loaded.items() if key[0] == here}
        for loaded in {id(m): m for m in (memory, *same.values())}.values():
            place, dtype = str(loaded.model.device), dtype_name(loaded.model.dtype)
            loaded.become(MemoryModel.load(folder, device=place, dtype=dtype))
        for key, loaded in same.items():
            del _loaded[key]  # the old content may come back
            _loaded[here, digest, *key[2:]] = loaded


def _digest(folder: Path) -> str:
    """A folder that was trained anew holds another memory."""
    manifest = folder / MANIFEST
    content = manifest.read_bytes() if manifest.is_file() else b""
    return hashlib.sha256(content).hexdigest()
