"""The memory on disk: safetensors and JSON, a manifest with checksums, nothing else.

`config.json` and `model.safetensors` hold everything that changes output. `manifest.json` says
how they came about and guards them. `work/` beside them is the training's own and may be deleted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mlpmem_rag.backbone import BaseReference
from mlpmem_rag.confidence import Confidence
from mlpmem_rag.configuration import MODEL_TYPE
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.gate import Gate
from mlpmem_rag.integrity import Verify, problems, read_json, sha256
from mlpmem_rag.memory import Memory, MemoryConfig
from mlpmem_rag.query import NONE
from mlpmem_rag.storage import replace_file, write_json
from mlpmem_rag.tensors import (
    check_drafts,
    check_headers,
    check_tokens,
    check_words,
    parse_shape,
    read_headers,
    read_tensors,
)

FORMAT_VERSION = 5
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SAFETENSORS = ".safetensors"
INSIDE = "memory."
"""Begins the names of a memory's tensors where its base model's lie beside them."""
MANIFEST = "manifest.json"
CARD = "README.md"
ENCODER = "encoder"
WORK = "work"


@dataclass(frozen=True)
class MemorySettings:
    """`config.json`: all that generation needs besides the weights.

    Attributes:
        base: the base model the memory belongs to.
        layer: decoder layer whose MLP input the memory reads.
        memory: shape of the memory.
        memory_lambda: mixing weight, 0 (base alone) to 1 (memory as far as its gate lets it).
        memory_temperature: divides the memory's logits.
        encoder: makes the query vectors, by the name that `load_encoder` takes.
        gate: adapts lambda to each token; None: the same everywhere.
        confidence: probability that an answer is right; None: not known.
    """

    base: BaseReference
    layer: int
    memory: MemoryConfig
    memory_lambda: float
    memory_temperature: float
    encoder: str = NONE
    gate: Gate | None = None
    confidence: Confidence | None = None


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: where the memory comes from, what it measured, and checksums.

    Attributes:
        format_version: of this folder's layout.
        created: ISO 8601 time, UTC.
        run: fingerprint of corpus, base and configuration.
        corpus: fingerprint, number of documents.
        training: the resolved configuration of every stage.
        figures: held-out perplexities, seconds a stage, sizes.
        versions: of the libraries used.
        files: name -> {sha256, bytes}.
    """

    format_version: int
    created: str
    run: str
    corpus: dict[str, Any]
    training: dict[str, Any]
    figures: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def encoder_files(self) -> dict[str, dict[str, Any]]:
        """Those of a query encoder that lies inside."""
        return {n: entry for n, entry in self.files.items() if n.startswith(f"{ENCODER}/")}


_MANIFEST_KINDS = {
    "created": str,
    "run": str,
    "corpus": dict,
    "training": dict,
    "figures": dict,
    "versions": dict,
    "files": dict,
}


def save_artifact(
    folder: Path,
    settings: MemorySettings,
    memory: Memory,
    manifest: Manifest,
    card: str,
    encoder: Path | None = None,
) -> None:
    """Write a memory; an earlier one in the same folder is replaced file by file, manifest last.

    Args:
        folder: where to.
        settings: become `config.json`.
        memory: the weights.
        manifest: without the files.
        card: for people.
        encoder: folder of a query encoder that is the memory's own; None: it goes by its name.
    """
    config = {"model_type": MODEL_TYPE, **asdict(settings)}
    weights = {name: tensor.contiguous().cpu() for name, tensor in memory.state_dict().items()}
    weights["questions"] = weights["questions"].half()  # as they were made

    def fill(staged: Path) -> None:
        write_json(staged / CONFIG, config)
        replace_file(staged / WEIGHTS, lambda path: save_file(weights, path, {"format": "pt"}))
        (staged / CARD).write_text(card, encoding="utf-8")
        if encoder is not None:
            shutil.copytree(encoder, staged / ENCODER, copy_function=shutil.copyfile)
        write_json(staged / MANIFEST, {**asdict(manifest), "files": listed_files(staged)})

    replace_memory(folder, folder / WORK / "finished", fill)


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of all that a folder holds; of the card, last.

    In this order they are renamed, and a new card alone would go unnoticed.
    """
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"), key=lambda path: (path == folder / CARD, path))
        if path.is_file()
    }


def replace_memory(folder: Path, staged: Path, fill: Callable[[Path], None]) -> None:
    """Put a memory into a folder once all of it is written; the manifest comes last.

    Nothing stays of what an earlier one had there.

    Args:
        folder: where to.
        staged: a folder on the same disk, made for this and then removed.
        fill: writes the memory, its manifest included, to the folder that it is given.
    """
    earlier = _listed(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        fill(staged)
        files = load_manifest(staged).files
        for name in (*files, MANIFEST):  # everything is on the disk: only renames are left
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(folder / name)
        _remove(folder, earlier - set(files))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _listed(folder: Path) -> set[str]:
    """The files of the memory that is in a folder, if there is one."""
    try:
        return set(load_manifest(folder).files)
    except ArtifactError:
        return set()


def _remove(folder: Path, names: set[str]) -> None:
    """Take away files of an earlier memory that the new one does not have."""
    for name in names:
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)


def load_settings(folder: Path, *, inside: bool = False) -> MemorySettings:
    """Read `config.json`.

    Args:
        folder: the memory.
        inside: whether its base model is inside, and so may have no name.

    Raises:
        ArtifactError: it is missing, damaged, or not a memory's.
    """
    config = read_folder_json(folder, CONFIG)
    if inside and config.get("base") is None:
        config["base"] = asdict(BaseReference("", None, "", "", 0))
    if config.get("model_type") != MODEL_TYPE:
        raise ArtifactError(
            f"{folder / CONFIG} describes a {config.get('model_type')!r}, not a {MODEL_TYPE!r}; "
            "give a folder written by mlpmem-rag train"
        )
    try:
        settings = parse_settings(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{folder / CONFIG} is damaged ({type(error).__name__}: {error}); train again"
        ) from error
    if not 0 <= settings.memory_lambda <= 1 or not 0 < settings.memory_temperature < math.inf:
        raise ArtifactError(
            f"{folder / CONFIG} has lambda {settings.memory_lambda} (allowed 0 to 1) and "
            f"temperature {settings.memory_temperature} (allowed above 0); train again"
        )
    return settings


def parse_settings(config: dict[str, Any]) -> MemorySettings:
    """The settings among the fields of a configuration.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: a field is missing, of
            another kind, or out of range.
    """
    return MemorySettings(
        base=parse_reference(config["base"]),
        layer=int(config["layer"]),
        memory=parse_shape(config["memory"]),
        memory_lambda=float(config["memory_lambda"]),
        memory_temperature=float(config["memory_temperature"]),
        encoder=str(config["encoder"]),
        gate=Gate(**_weights(config["gate"])) if config["gate"] else None,
        confidence=(Confidence(**_weights(config["confidence"])) if config["confidence"] else None),
    )


def parse_reference(values: dict[str, Any]) -> BaseReference:
    """What names the base model.

    Raises:
        TypeError, ValueError: a field is missing, unknown or of another kind.
    """
    reference = BaseReference(**values)
    texts = (reference.name, reference.weights, reference.tokenizer, reference.revision or "")
    if not all(isinstance(text, str) for text in texts) or type(reference.vocab_size) is not int:
        raise ValueError("base: a field of another kind")
    return reference


def _weights(values: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    weights = {name: tuple(map(float, numbers)) for name, numbers in values.items()}
    if not all(math.isfinite(number) for numbers in weights.values() for number in numbers):
        raise ValueError("weights that are not finite")
    return weights


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ArtifactError: it is missing, damaged, or of a newer format.
    """
    content = read_folder_json(folder, MANIFEST)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder / MANIFEST} has format version {version!r}, this program reads "
            f"{FORMAT_VERSION}; update mlpmem-rag or train again"
        )
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise ArtifactError(f"{folder / MANIFEST} is damaged ({error}); train again") from error
    for name, kind in _MANIFEST_KINDS.items():
        if not isinstance(getattr(manifest, name), kind):
            raise ArtifactError(
                f"{folder / MANIFEST} is damaged ({name}: no {kind.__name__}); train again"
            )
    return manifest


def verify_files(folder: Path, manifest: Manifest, how: Verify = Verify.full) -> None:
    """Compare every file with what the manifest says of it; see `Verify`.

    Raises:
        ArtifactError: a file is missing, changed (both values are named) or outside the folder.
    """
    for problem in file_problems(folder, manifest, how):
        raise ArtifactError(problem)


def file_problems(folder: Path, manifest: Manifest, how: Verify = Verify.full) -> Iterator[str]:
    """What is wrong with the files of a memory, one message each."""
    if not any(name.endswith(SAFETENSORS) for name in manifest.files):
        yield f"the manifest of {folder} lists no {WEIGHTS}; train again"
    yield from problems(folder, manifest.files, required=(CONFIG, CARD), editable=(CARD,), how=how)


def load_memory(
    folder: Path, config: MemoryConfig, *, inside: bool = False, num_tokens: int | None = None
) -> Memory:
    """Read the weights into a memory of the given shape.

    Args:
        folder: with the safetensors.
        config: the shape.
        inside: whether the base model's weights lie in the same files.
        num_tokens: how many tokens the base model has, where that is known.

    Raises:
        ArtifactError: file damaged, other tensors or shapes than configured, values not finite.
    """
    prefix = INSIDE if inside else ""
    files = sorted(folder.glob(f"*{SAFETENSORS}")) if inside else [folder / WEIGHTS]
    headers = read_headers(files, prefix)
    names = list(check_headers(headers, config, folder / WEIGHTS))
    tensors = read_tensors(headers, names, prefix)
    check_tokens(tensors["corpus_tokens"], folder / WEIGHTS, num_tokens)
    check_drafts(tensors["drafts"], folder / WEIGHTS, num_tokens)
    if config.words:
        check_words(tensors, folder / WEIGHTS)
    # Copies: they alone would keep the whole file mapped after a cast of the weights.
    tensors |= {
        n: tensor.clone() for n, tensor in tensors.items() if not tensor.is_floating_point()
    }
    with torch.device("meta"):
        memory = Memory(config)
    memory.load_state_dict(tensors, assign=True)
    return memory.eval()


def check_base(settings: MemorySettings, given: BaseReference) -> None:
    """Refuse a base model other than the one the memory was trained on.

    Raises:
        ArtifactError: weights, tokenizer or vocabulary differ; both values are named.
    """
    for what in ("vocab_size", "tokenizer", "weights"):
        expected, found = getattr(settings.base, what), getattr(given, what)
        if expected != found:
            raise ArtifactError(
                f"this memory was trained on {settings.base.name!r} ({what} "
                f"{str(expected)[:16]}), not on {given.name!r} ({what} {str(found)[:16]}); "
                "load it with the base model it belongs to, or train one for this base"
            )


def read_folder_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files.

    Raises:
        ArtifactError: it is missing, or no JSON object.
    """
    if not (folder / name).is_file():
        raise ArtifactError(
            f"{folder} is not a memory: it has no {name}; give a folder written by mlpmem-rag train"
        )
    return read_json(folder / name)
