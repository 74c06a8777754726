"""Where an index's training writes to, and how it shows how far it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llama_index.indices.managed.mlpmem.documents import NamedCorpus
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.lessons import StudyConfig
from mlpmem_rag.pipeline import train
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress

WHERE = ("device", "dtype", "max_memory")
"""Settings that say where to compute, not what."""


def memory_folder(out: str | Path | None, corpus: Corpus, settings: Mapping[str, Any]) -> Path:
    """The folder asked for, else one in the working folder named after corpus and settings."""
    if out is not None:
        return Path(out)
    name = f"mlpmem-{corpus.fingerprint[:12]}"
    own = sorted((key, str(value)) for key, value in settings.items() if key not in WHERE)
    return Path(f"{name}-{hashlib.sha256(str(own).encode()).hexdigest()[:8]}" if own else name)


def config_of(training: dict[str, Any]) -> TrainConfig:
    """The settings that a memory's manifest tells of, to train again with."""
    distill = training["distill"]
    changes = {
        "questions": tuple(training["questions"]),
        "study": StudyConfig(**training["study"]),
        "distill": None if distill is None else DistillConfig(**distill),
    }
    return TrainConfig(**{**training, **changes})


def train_memory(
    named: NamedCorpus,
    folder: Path,
    config: TrainConfig,
    show_progress: bool,
    on_progress: OnProgress | None,
) -> dict[str, str]:
    """Train, or find what the same training has left.

    Returns:
        The ids that the memory was taught with -> ids of the documents, where they differ.

    Raises:
        MLPMemError: as `mlpmem_rag.train`.
    """
    with bars(show_progress, on_progress) as told:
        train(named.corpus, out=folder, config=config, on_progress=told)
    return {name: given for name, given in named.names.items() if name != given}


@contextmanager
def bars(show: bool, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Pass progress on, and show a bar for each stage if asked to."""
    on_progress = on_progress or ignore_progress
    if not show:
        yield on_progress
        return
    shown: dict[str, tqdm[None]] = {}

    def tell(event: ProgressEvent) -> None:
        on_progress(event)
        if event.stage not in shown:
            shown[event.stage] = tqdm(total=event.total, desc=event.stage, unit=f" {event.unit}")
        bar = shown[event.stage]
        bar.total = event.total
        bar.update(event.done - bar.n)

    try:
        yield tell
    finally:
        for bar in shown.values():
            bar.close()
