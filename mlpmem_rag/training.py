"""The stages of a training run, each with its own folder: done once, or read from there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mlpmem_rag.backbone import Backbone, load_backbone, mlp_shape, output_embedding
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, read_corpus
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.distill import (
    DistillReport,
    TrainingData,
    Validation,
    distill,
    true_token_probabilities,
)
from mlpmem_rag.errors import CorpusError
from mlpmem_rag.heldout import (
    TEMPERATURES,
    Perplexities,
    Probabilities,
    measure,
    score_base,
    tune,
)
from mlpmem_rag.memory import Memory, derive_config, new_memory
from mlpmem_rag.mixing import best_lambda
from mlpmem_rag.neighbors import Neighbors, find_neighbors
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.split import Split
from mlpmem_rag.stages import enter_stage, finish_stage, stage_key, stage_seconds
from mlpmem_rag.targets import Targets, build_targets, teacher_probability
from mlpmem_rag.windows import TokenArray, Window, make_windows, tokenize

STAGES = ("datastore", "neighbors", "targets", "base", "distil", "refit")
MIN_ROWS = 128
"""Fewer tokens than this hold nothing that a distribution could be learned from."""
DEFAULT_LAMBDA = 0.25
"""Where nothing could be held out to choose it (paper, WikiText)."""
UNVALIDATED_EPOCHS = 3


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
        else read_corpus(source, strict=strict, exclude=exclude, on_progress=on_progress)
    )
    on_progress(ProgressEvent("base model", 0, 1, "model"))
    backbone = load_backbone(
        config.base_model, layer=config.layer, device=config.device, dtype=config.dtype
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


@dataclass(frozen=True)
class Tuned:
    """Settings chosen on the validation rows, and what they give on the test rows."""

    lambda_: float = DEFAULT_LAMBDA
    temperature: float = 1.0
    perplexity: Perplexities | None = None


class Stages:
    """Each stage once: done in its own folder, or read from there when nothing has changed."""

    def __init__(
        self, prepared: Prepared, config: TrainConfig, work: Path, on_progress: OnProgress
    ) -> None:
        self._prepared = prepared
        self._config = config
        self._work = work
        self._on_progress = on_progress
        self._keys = {"datastore": datastore_key(prepared, config)}

    def datastore(self) -> Datastore:
        """(hidden state -> next token) for every token of the corpus."""
        with self._stage("datastore", self._keys["datastore"]) as (folder, done):
            if done:
                return Datastore.open(folder)
            return build_datastore(
                self._prepared.backbone,
                self._prepared.windows,
                folder,
                on_progress=self._on_progress,
            )

    def neighbors(self, datastore: Datastore, split: Split) -> Neighbors:
        """The nearest training rows of every row."""
        config = self._config
        key = self._after("datastore", config.neighbors, config.held_out, config.seed)
        with self._stage("neighbors", key) as (folder, done):
            if done:
                return Neighbors.open(folder)
            return find_neighbors(
                datastore, split.train, folder, k=config.neighbors, on_progress=self._on_progress
            )

    def targets(self, neighbors: Neighbors, next_tokens: TokenArray, tau: float) -> Targets:
        """The neighbours' votes."""
        with self._stage("targets", self._after("neighbors", tau)) as (folder, done):
            if done:
                return Targets.open(folder)
            return build_targets(
                neighbors, next_tokens, folder, tau=tau, on_progress=self._on_progress
            )

    def base_scores(self, split: Split) -> tuple[Probabilities, Probabilities]:
        """What the base alone gives the true tokens of the validation and the test rows."""
        rows = np.concatenate([split.validation, split.test])
        with self._stage("base", self._after("neighbors", "base")) as (folder, done):
            path = folder / "held_out.npy"
            scores = (
                np.load(path)
                if done
                else score_base(
                    self._prepared.backbone,
                    self._prepared.windows,
                    rows,
                    path,
                    on_progress=self._on_progress,
                )
            )
        return scores[: len(split.validation)], scores[len(split.validation) :]

    def distil(
        self,
        datastore: Datastore,
        targets: Targets,
        split: Split,
        p_base: tuple[Probabilities, Probabilities],
    ) -> tuple[Memory, DistillReport]:
        """A memory trained without the held-out rows, stopped when the validation rows say so."""
        config = self._config
        memory = self._blank(datastore)
        validated = len(split.validation) > 0
        key = self._after("targets", asdict(config.distill), config.size)
        with self._stage("distil", key) as (folder, _):
            report = distill(
                memory,
                self._data(datastore, targets, memory),
                split.train,
                config.distill,
                folder,
                validation=Validation(split.validation, p_base[0]) if validated else None,
                stop_epoch=None if validated else UNVALIDATED_EPOCHS,
                on_progress=self._on_progress,
            )
        return memory, report

    def tune(
        self,
        memory: Memory,
        datastore: Datastore,
        targets: Targets,
        neighbors: Neighbors,
        split: Split,
        tau: float,
        p_base: tuple[Probabilities, Probabilities],
    ) -> Tuned:
        """Lambda and temperature from the validation rows, figures from the test rows."""
        if not len(split.validation):
            return Tuned()
        data = self._data(datastore, targets, memory)
        lambda_, temperature = tune(
            p_base[0],
            {t: true_token_probabilities(memory, data, split.validation, t) for t in TEMPERATURES},
        )
        next_tokens = np.asarray(datastore.next_tokens)
        teacher_validation, teacher_test = (
            teacher_probability(neighbors, next_tokens, rows, tau).astype(np.float64)
            for rows in (split.validation, split.test)
        )
        perplexity = measure(
            p_base[1],
            teacher_test,
            true_token_probabilities(memory, data, split.test, temperature),
            np.asarray(datastore.documents)[split.test],
            teacher_lambda=best_lambda(p_base[0], teacher_validation),
            memory_lambda=lambda_,
        )
        return Tuned(lambda_, temperature, perplexity)

    def refit(self, datastore: Datastore, targets: Targets, epochs: int) -> Memory:
        """The same training with all rows, for as many epochs as were best."""
        memory = self._blank(datastore)
        with self._stage("refit", self._after("distil", epochs)) as (folder, _):
            distill(
                memory,
                self._data(datastore, targets, memory),
                np.arange(datastore.num_rows),
                self._config.distill,
                folder,
                validation=None,
                stop_epoch=epochs,
                stage="refit",
                on_progress=self._on_progress,
            )
        return memory

    def seconds(self) -> dict[str, float]:
        """Time of each stage, also of those that an earlier run has done."""
        return {name: stage_seconds(self._work / name) for name in self._keys}

    def _blank(self, datastore: Datastore) -> Memory:
        backbone, config = self._prepared.backbone, self._config
        tokens = torch.from_numpy(np.unique(datastore.next_tokens).astype(np.int64))
        shape = mlp_shape(backbone.model, backbone.layer)
        memory_config = derive_config(shape, backbone.num_layers, len(tokens), config.size)
        head = output_embedding(backbone.model, tokens)
        return new_memory(memory_config, tokens, head, seed=config.seed).to(backbone.device)

    def _data(self, datastore: Datastore, targets: Targets, memory: Memory) -> TrainingData:
        vocab_size = self._prepared.backbone.reference.vocab_size
        return TrainingData(datastore, targets, memory, vocab_size)

    def _after(self, earlier: str, *settings: object) -> str:
        return stage_key(self._keys[earlier], *settings)

    @contextmanager
    def _stage(self, name: str, key: str) -> Iterator[tuple[Path, bool]]:
        """The folder of a stage and whether it is finished; marks it so at the end."""
        self._keys[name] = key
        folder = self._work / name
        done = enter_stage(folder, key)
        started = time.perf_counter()
        yield folder, done
        if not done:
            finish_stage(folder, key, time.perf_counter() - started)


def datastore_key(prepared: Prepared, config: TrainConfig) -> str:
    """What decides the keys: documents, base model, layer, windows, number format."""
    reference = prepared.backbone.reference
    return stage_key(
        prepared.corpus.fingerprint,
        (reference.weights, reference.tokenizer, config.layer),
        (config.window, config.device, config.dtype),
    )


def run_key(prepared: Prepared, config: TrainConfig) -> str:
    """What decides the whole memory."""
    return stage_key(datastore_key(prepared, config), asdict(config))
