"""The retriever's view of a request: a text becomes one vector, computed once a request.

A hidden state alone does not tell a memory which question is being asked; the vector does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.datastore import length_buckets, pad
from mlpmem_rag.embedded import MINILM, embedded_model_path
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.windows import Window

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOLED = "pooled"
NONE = "none"
PICKLED = "pytorch_model.bin"
PIECE = 4096
"""Texts after which it is told how far all are."""

Vectors = npt.NDArray[np.float32]


class QueryEncoder(Protocol):
    """Turns texts into vectors of length 1.

    Attributes:
        name: what `load_encoder` takes to load it again.
        size: Q, width of the vectors.
    """

    name: str
    size: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        """*Shape:* N texts -> (N, Q)."""
        ...


class SentenceEncoder:
    """A sentence-transformers model.

    Attributes:
        model: the model itself.
    """

    def __init__(self, name: str, model: SentenceTransformer) -> None:
        self.name = name
        self.size = int(model.get_embedding_dimension() or 0)
        self.model = model

    def encode(self, texts: Sequence[str]) -> Vectors:
        """*Shape:* N texts -> (N, Q)."""
        vectors = self.model.encode(
            list(texts), batch_size=128, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32).reshape(-1, self.size)

    def encode_tokens(self, texts: Sequence[str]) -> tuple[Vectors, list[Vectors] | None]:
        """What `encode` gives, and the vectors of each text's tokens, of length 1, too.

        The model's own marks and its prompt are left out. None for a model that shows no tokens.
        *Shapes:* N texts -> (N, Q), N times (T_n, Q').
        """
        # One dictionary a text, whatever the annotation says of it.
        found: Any = self.model.encode(
            list(texts),
            batch_size=128,
            normalize_embeddings=True,
            show_progress_bar=False,
            output_value=None,
        )
        normalize = torch.nn.functional.normalize  # which `encode` leaves out here
        vectors = [normalize(text["sentence_embedding"].float().cpu(), dim=-1) for text in found]
        out = np.asarray(vectors, dtype=np.float32).reshape(-1, self.size)
        marks = getattr(self.model.tokenizer, "all_special_ids", None)
        shown = all("token_embeddings" in text and "input_ids" in text for text in found)
        if marks is None or not shown:
            return out, None
        marks = torch.tensor(marks)
        prompt = self.model.prompts.get(self.model.default_prompt_name or "", "")
        said = len(self.model.tokenizer.tokenize(prompt)) if prompt else 0
        tokens: list[Vectors] = []
        for text in found:
            words = torch.isin(text["input_ids"].cpu(), marks, invert=True)
            unit = normalize(text["token_embeddings"].float().cpu(), dim=-1)
            tokens.append(unit[words & text["attention_mask"].cpu().bool()][said:].numpy())
        return out, tokens

    def save(self, folder: Path) -> None:
        """Write the model, as safetensors and JSON, where `load_encoder` can take it from."""
        self.model.save_pretrained(str(folder), create_model_card=False)


class PooledEncoder:
    """The mean of the base model's own tapped hidden states: no second model."""

    def __init__(self, backbone: Backbone) -> None:
        self.name = POOLED
        self.size = backbone.hidden_size
        self._backbone = backbone

    def encode(self, texts: Sequence[str]) -> Vectors:
        """*Shape:* N texts -> (N, Q). A text without tokens gets the zero vector."""
        vectors = np.zeros((len(texts), self.size), dtype=np.float32)
        limit = self._backbone.context_window
        token_ids = [np.asarray(self._backbone.tokenizer(t)["input_ids"], np.int32) for t in texts]
        there = [number for number, ids in enumerate(token_ids) if len(ids)]
        windows = [Window(number, 0, token_ids[number][-limit:], 0) for number in there]
        for batch in length_buckets(windows):
            ids, mask = pad([windows[w] for w in batch], self._backbone.device)
            hidden = self._backbone.hidden(ids, mask).float()  # (B, T, D)
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            unit = torch.nn.functional.normalize(mean, dim=-1)
            vectors[[windows[w].document for w in batch]] = unit.cpu().numpy()
        return vectors


def load_encoder(name: str, backbone: Backbone) -> QueryEncoder | None:
    """An encoder by name: a sentence-transformers model, `pooled`, or `none`.

    Args:
        name: hub id, local folder, the embedded `all-minilm-l6-v2`, `pooled` for the base model's
            own states, `none` for no query vector.
        backbone: gives the device, and the states for `pooled`.

    Raises:
        ConfigError: no such sentence-transformers model.
        MissingDependencyError: the wheel of the embedded model is not installed.
    """
    if name == NONE:
        return None
    if name == POOLED:
        return PooledEncoder(backbone)
    path = str(embedded_model_path(name) or name)
    _check_modules(Path(path))
    from sentence_transformers import SentenceTransformer  # seconds, and not every memory needs it

    try:
        model = SentenceTransformer(
            path,
            device=str(backbone.device),
            trust_remote_code=False,
            local_files_only=False,
            model_kwargs={
                "use_safetensors": True,  # nothing is unpickled
                # In half precision, in which it may be stored, a CPU is slow.
                "dtype": torch.float32 if backbone.device.type == "cpu" else "auto",
            },
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"query encoder {name!r} cannot be loaded ({str(error).splitlines()[0][:150]}); give "
            f"a sentence-transformers model, the embedded {MINILM!r}, {POOLED!r} or {NONE!r}"
        ) from error
    return SentenceEncoder(name, model)


def _check_modules(folder: Path) -> None:
    """Refuse modules of one's own code, and weights that would be unpickled.

    Only for its transformer can sentence-transformers be told to take safetensors alone.

    Raises:
        ConfigError: there are some.
    """
    listed = folder / "modules.json"
    if not listed.is_file():
        return
    try:
        modules = [(str(m["type"]), folder / m["path"]) for m in json.loads(listed.read_text())]
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{listed} is damaged ({error}); give another encoder") from error
    for kind, place in modules:
        if not kind.startswith("sentence_transformers."):
            raise ConfigError(
                f"{listed} names {kind}, which is not sentence-transformers' own, and no other "
                "code is run; give another encoder"
            )
        if (place / PICKLED).is_file() and not (place / "model.safetensors").is_file():
            raise ConfigError(
                f"{place / PICKLED} would be unpickled, which runs what it holds; save the encoder "
                "anew with safetensors (SentenceTransformer.save_pretrained)"
            )


def num_parameters(encoder: QueryEncoder | None) -> int:
    """Of a model of its own; 0: it has none."""
    if not isinstance(encoder, SentenceEncoder):
        return 0
    return sum(parameter.numel() for parameter in encoder.model.parameters())


def fitting_encoder(name: str, backbone: Backbone, width: int) -> QueryEncoder | None:
    """`load_encoder`, for a memory that reads vectors of this width.

    Raises:
        ArtifactError: they are of another width.
    """
    encoder = load_encoder(name, backbone)
    check_encoder(encoder, name, width)
    return encoder


def check_encoder(encoder: QueryEncoder | None, name: str, width: int) -> None:
    """Refuse an encoder whose vectors the memory cannot read.

    Raises:
        ArtifactError: they are of another width.
    """
    if (found := encoder.size if encoder else 0) != width:
        raise ArtifactError(
            f"query encoder {name!r} gives vectors of width {found}, the memory was trained with "
            f"width {width}; load the encoder it was trained with, or train again"
        )


def quickened(encoder: QueryEncoder) -> AbstractContextManager[object]:
    """While many texts are encoded: in bfloat16, where the processor has units for it.

    Their vectors are kept in half precision. A single text gains nothing.
    """
    if not isinstance(encoder, SentenceEncoder):
        return nullcontext()
    device = torch.device(encoder.model.device)
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def encoded(
    encoder: QueryEncoder | None,
    texts: Sequence[str],
    on_done: Callable[[int], None] | None = None,
) -> Vectors:
    """Vectors of many texts; without an encoder, of width 0.

    Now and then, and at the end, `on_done` is told how many are done. *Shape:* N texts -> (N, Q).
    """
    vectors = np.zeros((len(texts), encoder.size if encoder else 0), np.float32)
    if encoder is None:
        return vectors
    for start in range(0, len(texts), PIECE):
        piece = texts[start : start + PIECE]
        with quickened(encoder):
            vectors[start : start + len(piece)] = encoder.encode(piece)
        if on_done is not None:
            on_done(start + len(piece))
    return vectors
