"""A memory's tensors in safetensors files, checked by their headers before any is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory import Memory, MemoryConfig

FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = {torch.int8: ("I8",), torch.int32: ("I32",), torch.int64: ("I64",)}
_LIMITS = {
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "num_blocks": (0, 2**12),
    "vocab_size": (1, 2**24),
    "query_size": (0, 2**20),
    "num_questions": (0, 2**24),
    "draft_size": (0, 2**12),
    "num_question_tokens": (0, 2**30),
    "num_sentences": (0, 2**24),
    "num_sentence_tokens": (0, 2**30),
    "inner_size": (0, 2**20),
}
"""Far beyond any model there is; a folder that says more would only cost memory and time."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of a tensor."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def parse_shape(values: dict[str, Any]) -> MemoryConfig:
    """The shape of a memory, as a configuration has it.

    Raises:
        TypeError, ValueError: a field is missing, unknown, of another kind, or out of range.
    """
    config = MemoryConfig(**values)
    fields = asdict(config)
    for name, (low, high) in _LIMITS.items():
        value = fields[name]
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"memory.{name} is {value!r}, allowed are {low} to {high}")
    for name in ("hidden_scale", "norm_eps"):
        value = fields[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"memory.{name} is {value!r}, allowed are numbers above 0")
    if type(config.gated) is not bool or not isinstance(config.activation, str):
        raise ValueError(f"memory.gated {config.gated!r}, memory.activation {config.activation!r}")
    if type(config.recalls) is not bool:
        raise ValueError(f"memory.recalls {config.recalls!r}, allowed are true and false")
    kept = (config.num_question_tokens, config.num_sentences, config.num_sentence_tokens)
    if any(kept) and not (all(kept) and config.recalls and config.num_questions):
        raise ValueError(
            f"memory.num_question_tokens, num_sentences and num_sentence_tokens are {kept}, "
            "allowed are all 0, or all above 0 for a memory that recalls questions"
        )
    return config


def read_headers(files: list[Path], prefix: str) -> dict[str, Header]:
    """Tensors whose names begin so, by the rest of their names.

    Raises:
        ArtifactError: a file is no safetensors, or its header does not fit its size.
    """
    found: dict[str, Header] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    part = file.get_slice(name)
                    header = Header(path, part.get_dtype(), tuple(part.get_shape()))
                    found[name.removeprefix(prefix)] = header
    return found


def check_headers(
    headers: dict[str, Header], config: MemoryConfig, where: Path
) -> dict[str, Tensor]:
    """Compare what files hold with what a memory of this shape has.

    Returns:
        The memory's tensors by name, without storage.

    Raises:
        ArtifactError: a tensor is missing, or of another shape or kind.
    """
    if config.num_blocks > len(headers):  # before a memory of that many is built
        raise ArtifactError(
            f"{where}: {len(headers)} tensors for {config.num_blocks} blocks; train again"
        )
    try:
        with torch.device("meta"):
            expected = Memory(config).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{where.parent / 'config.json'} describes a memory that cannot be built "
            f"({type(error).__name__}: {error}); train again"
        ) from error
    for name, tensor in expected.items():
        header = headers.get(name)
        if header is None or header.shape != tuple(tensor.shape):
            raise ArtifactError(
                f"{where}: tensor {name} has shape {header.shape if header else None}, the "
                f"configuration says {tuple(tensor.shape)}; train again"
            )
        allowed = INTEGERS.get(tensor.dtype, FLOATS)
        if header.dtype not in allowed:
            raise ArtifactError(
                f"{where}: tensor {name} holds {header.dtype}, allowed are {', '.join(allowed)}; "
                "train again"
            )
    return expected


def read_tensors(headers: dict[str, Header], names: list[str], prefix: str) -> dict[str, Tensor]:
    """The tensors themselves, mapped into memory where the file system can.

    Raises:
        ArtifactError: a value is not finite, or a file can no longer be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in {headers[name].path for name in names}:
        with _opened(path) as file:
            here = [name for name in names if headers[name].path == path]
            tensors |= {name: file.get_tensor(prefix + name) for name in here}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ArtifactError(f"{headers[name].path}: tensor {name} is not finite; train again")
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are. Takes no memory, and no sum that half precision could not hold."""
    if not tensor.numel():
        return True
    return all(math.isfinite(value.item()) for value in tensor.aminmax())


def check_tokens(tokens: Tensor, where: Path, num_tokens: int | None) -> None:
    """Refuse token ids that a memory cannot have: they are those of its corpus, ascending.

    Args:
        tokens: the ids. *Shape:* (V,).
        where: their file.
        num_tokens: how many tokens the base model has; None: not known here.

    Raises:
        ArtifactError: negative, not ascending, or unknown to the base model.
    """
    if int(tokens[0]) < 0 or not bool((tokens[1:] > tokens[:-1]).all()):
        raise ArtifactError(f"{where}: corpus_tokens are not ascending token ids; train again")
    if num_tokens is not None and int(tokens[-1]) >= num_tokens:
        raise ArtifactError(
            f"{where}: corpus_tokens go up to {int(tokens[-1])}, the base model has {num_tokens} "
            "tokens; train again"
        )


def check_drafts(drafts: Tensor, where: Path, num_tokens: int | None) -> None:
    """Refuse drafts that are no token ids.

    Args:
        drafts: token ids, -1 where there is none. *Shape:* (M, K).
        where: their file.
        num_tokens: how many tokens the base model has; None: not known here.

    Raises:
        ArtifactError: below -1, or unknown to the base model.
    """
    if not drafts.numel():
        return
    low, high = (int(value) for value in drafts.aminmax())
    if low < -1 or (num_tokens is not None and high >= num_tokens):
        raise ArtifactError(
            f"{where}: drafts go from {low} to {high}, allowed are the base model's "
            f"{num_tokens or ''} token ids, and -1 for none; train again"
        )


def check_words(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse words that lie outside the tables that hold them.

    Raises:
        ArtifactError: ends that fall, or lie behind a table; a sentence that there is not.
    """
    for kind in ("question", "sentence"):
        ends, codes = tensors[f"words.{kind}_ends"], tensors[f"words.{kind}_tokens"]
        if int(ends[0]) < 0 or int(ends[-1]) > len(codes) or bool((ends[1:] < ends[:-1]).any()):
            raise ArtifactError(
                f"{where}: words.{kind}_ends are not ascending numbers up to {len(codes)}; train "
                "again"
            )
    sentences = len(tensors["words.sentence_ends"])
    low, high = (int(value) for value in tensors["words.sources"].aminmax())
    if low < 0 or high >= sentences:
        raise ArtifactError(
            f"{where}: words.sources go from {low} to {high}, there are {sentences} sentences; "
            "train again"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); train again") from error
