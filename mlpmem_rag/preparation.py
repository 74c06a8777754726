"""A corpus, its base model and windows, and the keys that tell whether a stage is still valid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mlpmem_rag import __version__
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.config import DEPTHS, TrainConfig
from mlpmem_rag.corpus import Corpus, read_corpus
from mlpmem_rag.errors import CorpusError
from mlpmem_rag.integrity import sha256
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.questions import BASE_MODEL, WRITERS
from mlpmem_rag.stages import stage_key
from mlpmem_rag.windows import Window, make_windows, tokenize

MIN_ROWS = 128
"""Fewer tokens than this hold nothing that a distribution could be learned from."""


@dataclass(frozen=True)
class Prepared:
    """A corpus, cut into windows for a base model."""

    corpus: Corpus
    backbone: Backbone
    windows: list[Window]
    tokens: int


def prepare(
    source: str | Path | Corpus,
    config: TrainConfig,
    *,
    strict: bool = False,
    follow_links: bool = False,
    exclude: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Prepared:
    """Read the documents, load the base model, cut windows.

    Raises:
        CorpusError: fewer than `MIN_ROWS` tokens to learn.
    """
    corpus = (
        source
        if isinstance(source, Corpus)
        else read_corpus(
            source,
            strict=strict,
            follow_links=follow_links,
            exclude=exclude,
            on_progress=on_progress,
        )
    )
    on_progress(ProgressEvent("base model", 0, 1, "model"))
    backbone = load_backbone(
        config.base_model,
        layer=config.layer,
        depth=DEPTHS[config.recipe],
        device=config.device,
        dtype=config.dtype,
    )
    on_progress(ProgressEvent("base model", 1, 1, "model"))
    token_ids = tokenize(corpus.documents, backbone.tokenizer, on_progress=on_progress)
    length = min(config.window, backbone.context_window)
    windows = make_windows(token_ids, length=length, stride=length // 2)
    rows = sum(window.num_rows for window in windows)
    if rows < MIN_ROWS:
        raise CorpusError(
            f"the corpus has {rows} tokens to learn in {len(corpus.documents)} document(s); "
            f"at least {MIN_ROWS} are needed, a few paragraphs. Add documents"
        )
    return Prepared(corpus, backbone, windows, sum(len(ids) for ids in token_ids))


def datastore_key(prepared: Prepared, config: TrainConfig) -> str:
    """What decides the keys: documents, base model, layer, windows, number format."""
    reference = prepared.backbone.reference
    return stage_key(
        prepared.corpus.fingerprint,
        (reference.weights, reference.tokenizer, prepared.backbone.layer),
        (config.window, config.device, config.dtype),
    )


def question_sources(prepared: Prepared, config: TrainConfig) -> list[str]:
    """What decides the questions.

    Writers by name and version, with the titles that they use, files by what is in them, the base
    model by its weights.
    """
    sources = [__version__, *(document.title or "" for document in prepared.corpus.documents)]
    for name in config.questions:
        path = Path(name)
        sources.append(sha256(path) if name not in WRITERS and path.is_file() else name)
        if name == BASE_MODEL:
            sources.append(prepared.backbone.reference.weights)
    return sources


def run_key(prepared: Prepared, config: TrainConfig) -> str:
    """What decides the whole memory."""
    settings = (asdict(config), question_sources(prepared, config), encoder_key(config))
    return stage_key(datastore_key(prepared, config), settings, asking_key(prepared))


def asking_key(prepared: Prepared) -> str:
    """What decides the form of prompts and answers, the chat template among it."""
    tokenizer = prepared.backbone.tokenizer
    asked = prompt_ids(tokenizer, [{"role": "user", "content": "Who?"}])
    return stage_key(asked, answer_ids(tokenizer, "I"))


def encoder_key(config: TrainConfig) -> str:
    """What decides the query encoder: its name, or where that is a folder, the weights in it."""
    folder = Path(config.encoder)
    weights = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    return stage_key(config.encoder, [sha256(path) for path in weights])
