"""From documents to a memory: the stages of the method, in order."""

from __future__ import annotations

import errno
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from mlpmem_rag.artifact import (
    FORMAT_VERSION,
    MANIFEST,
    WORK,
    Manifest,
    MemorySettings,
    load_manifest,
    save_artifact,
    verify_files,
)
from mlpmem_rag.backbone import Backbone, load_backbone, mlp_shape, output_embedding
from mlpmem_rag.corpus import Corpus, read_corpus
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.distill import (
    DistillConfig,
    DistillReport,
    TrainingData,
    Validation,
    distill,
    true_token_probabilities,
)
from mlpmem_rag.embedded import SMOLLM2
from mlpmem_rag.errors import ArtifactError, ConfigError, CorpusError, OutputError, ResourceError
from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.heldout import (
    TEMPERATURES,
    Perplexities,
    Probabilities,
    measure,
    score_base,
    tune,
)
from mlpmem_rag.memory import SIZES, Memory, derive_config, new_memory
from mlpmem_rag.mixing import best_lambda
from mlpmem_rag.neighbors import MAX_NEIGHBORS, Neighbors, find_neighbors, import_faiss
from mlpmem_rag.plan import Plan, make_plan
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.report import TrainReport, model_card
from mlpmem_rag.split import Split, check_held_out, split_rows
from mlpmem_rag.stages import enter_stage, finish_stage, stage_key, stage_seconds
from mlpmem_rag.storage import folder_bytes
from mlpmem_rag.targets import Targets, build_targets, check_tau, derive_tau, teacher_probability
from mlpmem_rag.windows import TokenArray, Window, make_windows, tokenize

RECIPES = ("paper",)
STAGES = ("datastore", "neighbors", "targets", "base", "distil", "refit")
LOCK = ".lock"
MIN_ROWS = 128
"""Fewer tokens than this hold nothing that a distribution could be learned from."""
DEFAULT_LAMBDA = 0.25
"""Where nothing could be held out to choose it (paper, WikiText)."""
UNVALIDATED_EPOCHS = 3


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. What follows from the base model or the corpus is not among them.

    Attributes:
        recipe: `paper`: kNN targets from the corpus alone.
        base_model: hub id, local folder or embedded name.
        size: `small`, `base` or `large` memory.
        layer: decoder layer to read; None: 70 % of the depth.
        device: `auto`, `cpu`, `cuda`.
        dtype: number format of the base; `auto`, `float32`, `bfloat16`, `float16`.
        seed: of the held-out documents, the initial weights and the order of rows.
        window: tokens the base sees at once, at most its context window.
        neighbors: k, at most 1024.
        tau: temperature of the neighbours' votes; None: derived from the distances.
        held_out: share of the rows for validation, and as much again for the test figures.
        distill: the optimisation.
    """

    recipe: str = "paper"
    base_model: str = SMOLLM2
    size: str = "base"
    layer: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    window: int = 1024
    neighbors: int = MAX_NEIGHBORS
    tau: float | None = None
    held_out: float = 0.1
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        """Check what no stage checks by itself.

        Raises:
            ConfigError: a value outside what is allowed.
        """
        if self.recipe not in RECIPES:
            raise ConfigError(f"recipe {self.recipe!r} is not known; choose {', '.join(RECIPES)}")
        if self.size not in SIZES:
            raise ConfigError(f"size {self.size!r} is not known; choose {', '.join(SIZES)}")
        check_held_out(self.held_out)
        if self.tau is not None:
            check_tau(self.tau)
        if not 1 <= self.neighbors <= MAX_NEIGHBORS:
            raise ConfigError(f"neighbors = {self.neighbors}: allowed are 1 to {MAX_NEIGHBORS}")
        if self.window < 16:
            raise ConfigError(f"window = {self.window}: allowed are 16 tokens or more")


@dataclass(frozen=True)
class Prepared:
    """A corpus, cut into windows for a base model."""

    corpus: Corpus
    backbone: Backbone
    windows: list[Window]
    tokens: int


def train(
    corpus: str | Path | Corpus,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    fresh: bool = False,
    strict: bool = False,
    on_progress: OnProgress = ignore_progress,
    on_plan: Callable[[Plan], None] | None = None,
    **options: Any,  # noqa: ANN401
) -> TrainReport:
    """Train a memory from documents and write it to `out`.

    An interrupted run goes on where it stopped; stages whose input has not changed are not done
    again. An earlier memory in `out` stays as it is until the new one is complete.

    Args:
        corpus: folder, file or glob, or documents already read.
        out: folder of the memory; its training files go to `out/work`.
        config: settings; `options` replace single ones (`size="small"`, `seed=1`, …).
        fresh: do every stage again.
        strict: fail when any source had to be skipped.
        on_progress: called often, with the stage and how far it is.
        on_plan: called once with what the run needs, before the work starts.
        **options: fields of `TrainConfig`.

    Raises:
        CorpusError: nothing to train on.
        ConfigError: a setting outside what is allowed.
        BaseModelError: the base model cannot be used.
        OutputError: `out` cannot be used.
        ResourceError: the disk cannot hold the run.
        TrainingError: the loss is no longer finite.
    """
    config = resolve_config(config, options)
    import_faiss()  # refuse now rather than after the datastore
    out = Path(out)
    with output_folder(out) as work:
        prepared = prepare(corpus, config, strict=strict, exclude=out, on_progress=on_progress)
        backbone = prepared.backbone
        config = resolved(config, backbone)
        run = run_key(prepared, config)
        if not fresh and (done := finished_run(out, run)) is not None:
            return done
        if fresh:
            for stage in STAGES:
                shutil.rmtree(work / stage, ignore_errors=True)
        plan = make_plan(
            backbone,
            prepared.windows,
            out,
            size=config.size,
            k=config.neighbors,
            held_out=config.held_out,
            distill=config.distill,
        )
        if on_plan is not None:
            on_plan(plan)
        replace(plan, disk_bytes=plan.disk_bytes - folder_bytes(work)).check()
        return _train(prepared, config, out, work, run, on_progress)


def plan_training(
    corpus: str | Path | Corpus,
    *,
    out: str | Path = ".",
    config: TrainConfig | None = None,
    strict: bool = False,
    on_progress: OnProgress = ignore_progress,
    **options: Any,  # noqa: ANN401
) -> tuple[Plan, Corpus]:
    """What `train` with the same arguments would need; nothing is written."""
    config = resolve_config(config, options)
    out = Path(out)
    # Its default, the working folder, may hold the corpus: only a memory is left out.
    exclude = out if is_memory(out) else None
    prepared = prepare(corpus, config, strict=strict, exclude=exclude, on_progress=on_progress)
    plan = make_plan(
        prepared.backbone,
        prepared.windows,
        out,
        size=config.size,
        k=config.neighbors,
        held_out=config.held_out,
        distill=config.distill,
    )
    return plan, prepared.corpus


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


def _train(
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
    work: Path,
    run: str,
    on_progress: OnProgress,
) -> TrainReport:
    stages = _Stages(prepared, config, work, on_progress)

    # (hidden state -> next token) for every token of the corpus.
    datastore = stages.datastore()

    # Only training rows may be neighbours: what teacher and memory know of the held-out rows
    # is what the others tell.
    split = split_rows(np.asarray(datastore.documents), held_out=config.held_out, seed=config.seed)
    neighbors = stages.neighbors(datastore, split)

    # The neighbours' votes are what the memory learns to imitate.
    next_tokens = np.asarray(datastore.next_tokens)
    tau = config.tau or derive_tau(neighbors, next_tokens, split.train, seed=config.seed)
    targets = stages.targets(neighbors, next_tokens, tau)

    # Distilled without the held-out documents, to find out when to stop and what it is worth.
    p_base = stages.base_scores(split)
    memory, distilled = stages.distil(datastore, targets, split, p_base)
    tuned = stages.tune(memory, datastore, targets, neighbors, split, tau, p_base)

    # The memory that is kept has learned the held-out documents too, for as many epochs.
    if len(split.validation):
        memory = stages.refit(datastore, targets, distilled.best_epoch)

    report = TrainReport(
        out=str(out),
        base_model=prepared.backbone.reference.name,
        layer=prepared.backbone.layer,
        documents=len(prepared.corpus.documents),
        skipped=tuple((s.source, s.reason) for s in prepared.corpus.skipped),
        tokens=prepared.tokens,
        rows=datastore.num_rows,
        vocabulary=memory.config.vocab_size,
        parameters=sum(p.numel() for p in memory.parameters()),
        tau=tau,
        kept_mass=targets.kept_mass,
        epochs=distilled.best_epoch,
        memory_lambda=tuned.lambda_,
        memory_temperature=tuned.temperature,
        held_out_by=split.held_out_by,
        perplexity=tuned.perplexity,
        seconds=stages.seconds(),
        datastore_bytes=sum(folder_bytes(work / n) for n in ("datastore", "neighbors", "targets")),
        memory_bytes=sum(t.numel() * t.element_size() for t in memory.state_dict().values()),
    )
    _save(report, prepared, config, memory, run, distilled)
    return report


@dataclass(frozen=True)
class Tuned:
    """Settings chosen on the validation rows, and what they give on the test rows."""

    lambda_: float = DEFAULT_LAMBDA
    temperature: float = 1.0
    perplexity: Perplexities | None = None


class _Stages:
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
        config = self._config
        key = self._after("datastore", config.neighbors, config.held_out, config.seed)
        with self._stage("neighbors", key) as (folder, done):
            if done:
                return Neighbors.open(folder)
            return find_neighbors(
                datastore, split.train, folder, k=config.neighbors, on_progress=self._on_progress
            )

    def targets(self, neighbors: Neighbors, next_tokens: TokenArray, tau: float) -> Targets:
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


def _save(
    report: TrainReport,
    prepared: Prepared,
    config: TrainConfig,
    memory: Memory,
    run: str,
    distilled: DistillReport,
) -> None:
    training = asdict(config)
    settings = MemorySettings(
        base=prepared.backbone.reference,
        layer=report.layer,
        memory=memory.config,
        memory_lambda=report.memory_lambda,
        memory_temperature=report.memory_temperature,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run,
        corpus={"fingerprint": prepared.corpus.fingerprint, "documents": report.documents},
        training=training,
        figures={**report.to_dict(), "distillation": asdict(distilled)},
        versions=library_versions(),
    )
    save_artifact(Path(report.out), settings, memory, manifest, model_card(report, training))


def library_versions() -> dict[str, str]:
    """Installed versions of what can change a result."""
    versions = {}
    for name in ("mlpmem-rag", "torch", "transformers", "numpy", "faiss-cpu", "faiss-gpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def resolve_config(config: TrainConfig | None, options: dict[str, Any]) -> TrainConfig:
    """Settings with single fields replaced; None means not given and replaces nothing.

    Raises:
        ConfigError: no such setting.
    """
    config = config or TrainConfig()
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := set(given) - set(asdict(config)):
        raise ConfigError(
            f"unknown setting(s) {', '.join(sorted(unknown))}; "
            f"allowed are {', '.join(asdict(config))}"
        )
    config = replace(config, **given)
    return replace(config, distill=replace(config.distill, seed=config.seed))


def resolved(config: TrainConfig, backbone: Backbone) -> TrainConfig:
    """With what `auto` and None turned out to be on this machine and base model."""
    return replace(
        config,
        layer=backbone.layer,
        device=backbone.device.type,
        dtype=dtype_name(backbone.model.dtype),
        window=min(config.window, backbone.context_window),
    )


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


def finished_run(out: Path, run: str) -> TrainReport | None:
    """The report of a memory in `out` that this very run has made before; None otherwise."""
    try:
        manifest = load_manifest(out)
        verify_files(out, manifest)
    except ArtifactError:
        return None
    if manifest.run != run:
        return None
    figures = {k: v for k, v in manifest.figures.items() if k != "distillation"}
    return TrainReport.from_dict({**figures, "out": str(out)})


def is_memory(folder: Path) -> bool:
    """Whether a folder holds a memory, or one whose training was interrupted."""
    return (folder / MANIFEST).is_file() or (folder / WORK / LOCK).is_file()


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Make or check the output folder, hold its lock, and yield its working folder.

    Raises:
        OutputError: `out` is a file, holds something else, cannot be written, or is in use.
        ResourceError: the disk became full.
    """
    work = out / WORK
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; give a new folder")
    try:
        if out.is_dir() and not is_memory(out) and (names := [p.name for p in out.iterdir()]):
            raise OutputError(
                f"--out {out} is not empty and holds no memory ({', '.join(sorted(names)[:3])}); "
                "give a new or empty folder"
            )
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"another run is writing to {out}; wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise OutputError(
            f"--out {out} cannot be written ({error.strerror or error}); give a folder you may "
            "write to"
        ) from error
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {out} is full; finished stages are kept in {work}. Free some space "
            "and run the same command again to go on"
        ) from error
    finally:
        lock.release()
