"""From documents to a memory: the stages of the method, in order."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_rag.artifact import (
    FORMAT_VERSION,
    Manifest,
    MemorySettings,
    load_manifest,
    save_artifact,
    verify_files,
)
from mlpmem_rag.config import TrainConfig, resolve_config, resolved
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.distill import DistillReport
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory import Memory
from mlpmem_rag.neighbors import import_faiss
from mlpmem_rag.output import is_memory, output_folder
from mlpmem_rag.plan import Plan, make_plan
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.report import TrainReport, model_card
from mlpmem_rag.split import split_rows
from mlpmem_rag.storage import folder_bytes
from mlpmem_rag.targets import derive_tau
from mlpmem_rag.training import STAGES, Prepared, Stages, prepare, run_key


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
        config = resolved(config, prepared.backbone)
        run = run_key(prepared, config)
        if not fresh and (done := finished_run(out, run)) is not None:
            return done
        if fresh:
            for stage in STAGES:
                shutil.rmtree(work / stage, ignore_errors=True)
        plan = _plan(prepared, config, out)
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
    return _plan(prepared, config, out), prepared.corpus


def _plan(prepared: Prepared, config: TrainConfig, out: Path) -> Plan:
    return make_plan(
        prepared.backbone,
        prepared.windows,
        out,
        size=config.size,
        k=config.neighbors,
        held_out=config.held_out,
        distill=config.distill,
    )


def _train(
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
    work: Path,
    run: str,
    on_progress: OnProgress,
) -> TrainReport:
    stages = Stages(prepared, config, work, on_progress)

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
