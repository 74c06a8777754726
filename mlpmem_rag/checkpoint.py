"""A model as a folder, in two forms: the memory alone, or the memory with its base model inside.

Alone, the folder is what training writes (`artifact.py`) and names its base model. With the base
inside, transformers writes and reads the weights, the tokenizer and the query encoder lie beside
them, and nothing else is needed. Both have a manifest with the checksum of every file.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mlpmem_rag.artifact import (
    CARD,
    CONFIG,
    ENCODER,
    FORMAT_VERSION,
    MANIFEST,
    WORK,
    Manifest,
    MemorySettings,
    listed_files,
    load_manifest,
    load_memory,
    load_settings,
    parse_settings,
    read_folder_json,
    replace_memory,
    save_artifact,
    verify_files,
)
from mlpmem_rag.backbone import BaseReference, tokenizer_fingerprint, weights_fingerprint
from mlpmem_rag.configuration import MLPMemConfig
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.integrity import Verify
from mlpmem_rag.storage import write_json

if TYPE_CHECKING:
    from mlpmem_rag.model import MLPMemForCausalLM

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", CARD)
"""What is fetched from a hub repository: no code, nothing pickled."""
STAGED = ".saving"
HUB_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
)


@dataclass(frozen=True)
class Source:
    """The folder that a model came from.

    Attributes:
        folder: where it was read.
        manifest: how the memory came about.
        card: text of the model card.
        merged: whether the base model is inside.
    """

    folder: Path
    manifest: Manifest
    card: str
    merged: bool

    @property
    def encoder_folder(self) -> Path | None:
        """Where the query encoder lies; None: it goes by its name."""
        return self.folder / ENCODER if self.manifest.encoder_files else None

    @property
    def encoder_weights(self) -> str | None:
        """What tells this encoder from others; None: its name does."""
        return " ".join(f["sha256"] for f in self.manifest.encoder_files.values()) or None


def open_folder(folder: Path, how: Verify = Verify.full) -> Source:
    """Check a local folder against its manifest.

    Raises:
        ArtifactError: no memory, or a file is missing or changed; both checksums are named.
    """
    manifest = load_manifest(folder)
    verify_files(folder, manifest, how)
    merged = read_folder_json(folder, CONFIG).get("base_config") is not None
    return Source(folder, manifest, (folder / CARD).read_text(encoding="utf-8"), merged)


def check_inside(source: Source) -> None:
    """Check settings and the memory's tensors before transformers loads what has the base inside.

    It fills in tensors that are missing.

    Raises:
        ArtifactError: they are damaged, or others than configured.
    """
    settings = load_settings(source.folder, inside=True)
    try:
        base = MLPMemConfig.from_pretrained(source.folder).get_text_config()
        num_layers, num_tokens = int(base.num_hidden_layers), getattr(base, "vocab_size", None)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"{source.folder / CONFIG} is damaged ({error})") from error
    if not 0 <= settings.layer < num_layers:
        raise ArtifactError(
            f"{source.folder / CONFIG} has layer {settings.layer}, its base model {num_layers}"
        )
    load_memory(source.folder, settings.memory, inside=True, num_tokens=num_tokens)


def fetch(name: str, options: dict[str, Any]) -> Path:
    """A local folder, or what was downloaded from a repository.

    Args:
        name: folder or repository.
        options: those of transformers' `from_pretrained` that are about downloads are taken out.

    Raises:
        ArtifactError: neither is there.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    hub = {n: v for n in names if (v := options.pop(n, None)) is not None}
    subfolder = options.pop("subfolder", None) or ""
    options.pop("proxies", None)
    if not Path(name).is_dir():
        try:
            name = snapshot_download(
                name, allow_patterns=[f"{subfolder}*{f}" for f in FILES], **hub
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ArtifactError(
                f"{name} is neither a folder nor a repository that can be fetched ({reason}); "
                "give a folder written by mlpmem-rag train"
            ) from error
    return Path(name) / subfolder


def reference_of(
    config: MLPMemConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> BaseReference:
    """What identifies the base model: as the configuration says, or taken from it."""
    if config.base is not None:
        return BaseReference(**config.base)
    return BaseReference(
        name=str(base.config.name_or_path),
        revision=None,
        weights=weights_fingerprint(base),
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=base.get_output_embeddings().weight.shape[0],
    )


def save_memory(model: MLPMemForCausalLM, folder: Path) -> None:
    """Write the memory alone, in the form that training does.

    Raises:
        ConfigError: the base model is not known by name.
    """
    config = model.config
    if config.base is None:
        raise ConfigError(
            "merge_base=False, but the base model of this memory has no name to load it by; "
            "save it with merge_base=True"
        )
    settings = parse_settings(config.to_dict())
    encoder = own_encoder(model.source, settings)
    save_artifact(folder, settings, model.memory, *_origin(model), encoder)
    drop_work(folder)


def own_encoder(source: Source | None, settings: MemorySettings) -> Path | None:
    """Folder of an encoder that no name leads to: the one that a memory recalls with."""
    return source.encoder_folder if source and settings.memory.recalls else None


def drop_work(folder: Path) -> None:
    """Take away the working folder that writing needed; a training's own is not empty and stays."""
    with contextlib.suppress(OSError):
        (folder / WORK).rmdir()


def save_merged(model: MLPMemForCausalLM, folder: Path, write: Callable[[Path], None]) -> None:
    """Write all that answering needs.

    Args:
        model: what is saved.
        folder: where to; an earlier memory there is replaced.
        write: writes configuration and weights as transformers does.
    """

    def fill(staged: Path) -> None:
        write(staged)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(staged)
        if (encoder := _saved_encoder(model)) is not None:
            encoder(staged / ENCODER)
        manifest, card = _origin(model)
        (staged / CARD).write_text(card, encoding="utf-8")
        write_json(staged / MANIFEST, {**asdict(manifest), "files": listed_files(staged)})

    replace_memory(folder, folder / STAGED, fill)


def copy_memory(source: Source, folder: Path) -> None:
    """Write the same files to another folder: what the manifest lists, no training's own."""

    def fill(staged: Path) -> None:
        for name in (*source.manifest.files, MANIFEST):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / name, staged / name)

    replace_memory(folder, folder / STAGED, fill)


def _saved_encoder(model: MLPMemForCausalLM) -> Callable[[Path], None] | None:
    """Writes the sentence encoder; None: there is none, or it is the base model itself."""
    if not model.query_size or model.tokenizer is None:
        return None
    save = getattr(model.query_encoder, "save", None)
    return save if callable(save) else None


def adopt_tokenizer(model: MLPMemForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model the tokenizer that lay beside it.

    Raises:
        ArtifactError: the memory was trained with another one; both fingerprints are named.
    """
    if model.config.base is not None:
        expected, found = model.config.base["tokenizer"], tokenizer_fingerprint(tokenizer)
        if expected != found:
            raise ArtifactError(
                f"this memory was trained with another tokenizer (fingerprint {expected[:16]}) "
                f"than the one in its folder ({found[:16]}); save or copy the folder anew"
            )
    model.tokenizer = tokenizer


def _origin(model: MLPMemForCausalLM) -> tuple[Manifest, str]:
    """Manifest, without files, and card: as they were read, or the little that is known."""
    if model.source is not None:
        return replace(model.source.manifest, files={}), model.source.card
    name = (model.config.base or {}).get("name") or "a base model that is inside"
    libraries = ("torch", "transformers")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run="",
        corpus={},
        training={},
        figures={},
        versions={library: version(library) for library in libraries},
    )
    return manifest, f"# MLP Memory\n\nA memory for {name}, saved without its training's report.\n"


def upload(folder: Path, repo_id: str, *, private: bool | None = None, **options: Any) -> str:  # noqa: ANN401
    """Send a folder to the hub; the address of the commit."""
    token = options.pop("token", None)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    allowed = [*FILES, f"{ENCODER}/*"]
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=allowed, ignore_patterns=[f"{WORK}/*"],
        **options,
    )  # fmt: skip
    return str(commit)


def save_and_upload(save: Callable[[Path], None], repo_id: str, **options: Any) -> str:  # noqa: ANN401
    """Save to a folder of its own and send that to the hub; the address of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return upload(Path(folder), repo_id, **options)
