"""From documents to a memory: the stages of the method, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_rag.artifact import (
    FORMAT_VERSION,
    WORK,
    Manifest,
    MemorySettings,
    load_manifest,
    save_artifact,
    verify_files,
)
from mlpmem_rag.calibrate import Calibration
from mlpmem_rag.circumstances import what_decides_bytes
from mlpmem_rag.config import TrainConfig, optimisation, resolve_config, resolved
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import DistillReport
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.hardware import resolve_device
from mlpmem_rag.index import check_search
from mlpmem_rag.memory import Memory
from mlpmem_rag.neighbors import Neighbors
from mlpmem_rag.output import is_memory, output_folder
from mlpmem_rag.plan import Plan, make_plan
from mlpmem_rag.preparation import Prepared, prepare, run_key
from mlpmem_rag.processes import Team, join_team
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.provenance import note_documents
from mlpmem_rag.query import NONE, QueryEncoder, load_encoder, num_parameters
from mlpmem_rag.questions import RULES
from mlpmem_rag.report import TrainReport, model_card
from mlpmem_rag.schedule import in_two_parts
from mlpmem_rag.split import (
    MAX_HELD_OUT_ROWS,
    MAX_STUDY_HELD_OUT_ROWS,
    Split,
    split_rows,
)
from mlpmem_rag.stages import forget_stage
from mlpmem_rag.storage import folder_bytes
from mlpmem_rag.targets import Targets, derive_tau
from mlpmem_rag.training import (
    MEMORY_LAMBDA,
    STAGES,
    Stages,
    Tuned,
)
from mlpmem_rag.writers import check_own


def train(
    corpus: str | Path | Corpus,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    fresh: bool = False,
    strict: bool = False,
    follow_links: bool = False,
    max_memory: int | None = None,
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
        follow_links: read what symbolic links in the corpus lead to.
        max_memory: bytes of main memory that the run may take; None: as many as there are.
        on_progress: called often, with the stage and how far it is.
        on_plan: called once with what the run needs, before the work starts.
        **options: fields of `TrainConfig`.

    Raises:
        CorpusError: nothing to train on.
        ConfigError: a setting outside what is allowed.
        BaseModelError: the base model cannot be used.
        OutputError: `out` cannot be used.
        ResourceError: the disk or `max_memory` cannot hold the run.
        TrainingError: the loss is no longer finite.
    """
    config = resolve_config(config, options)
    device = resolve_device(config.device)
    check_search(device)  # refuse now rather than after the datastore
    if config.recipe != "paper":
        check_own(config.questions)
    out = Path(out)
    team = join_team(device)
    if not team.first:
        on_progress, on_plan = ignore_progress, None
    with _work_folder(out, team) as work:
        prepared = prepare(
            corpus,
            config,
            strict=strict,
            follow_links=follow_links,
            exclude=out,
            on_progress=on_progress,
        )
        config = resolved(config, prepared.backbone)
        run = run_key(prepared, config)
        if not fresh and (done := finished_run(out, run)) is not None:
            return done
        team.wait()  # all have seen what was there before
        if fresh and team.first:
            for stage in STAGES:
                forget_stage(work / stage)
        encoder = _first_encoder(prepared, config)  # refused now if it cannot be
        plan = _plan(prepared, config, encoder, out, max_memory)
        if on_plan is not None:
            on_plan(plan)
        if team.first:
            replace(plan, disk_bytes=plan.disk_bytes - folder_bytes(work)).check()
        stages = Stages(
            prepared,
            encoder,
            config,
            work,
            on_progress,
            keys_in_memory=plan.keys_in_memory,
            writing_processes=plan.writing_processes,
            team=team,
        )
        return _train(stages, prepared, config, out, work, run, team)


@contextmanager
def _work_folder(out: Path, team: Team) -> Iterator[Path]:
    """The working folder; the first process of a team makes it and holds its lock."""
    if team.first:
        with output_folder(out) as work:
            team.wait()
            yield work
            team.wait()
    else:
        team.wait()
        yield out / WORK
        team.wait()


def plan_training(
    corpus: str | Path | Corpus,
    *,
    out: str | Path = ".",
    config: TrainConfig | None = None,
    strict: bool = False,
    follow_links: bool = False,
    max_memory: int | None = None,
    on_progress: OnProgress = ignore_progress,
    **options: Any,  # noqa: ANN401
) -> tuple[Plan, Corpus]:
    """What `train` with the same arguments would need; nothing is written."""
    config = resolve_config(config, options)
    out = Path(out)
    # Its default, the working folder, may hold the corpus: only a memory is left out.
    exclude = out if is_memory(out) else None
    prepared = prepare(
        corpus,
        config,
        strict=strict,
        follow_links=follow_links,
        exclude=exclude,
        on_progress=on_progress,
    )
    encoder = _first_encoder(prepared, config)
    return _plan(prepared, config, encoder, out, max_memory), prepared.corpus


def _first_encoder(prepared: Prepared, config: TrainConfig) -> QueryEncoder | None:
    """The query encoder as it is before it has read the corpus."""
    name = NONE if config.recipe == "paper" else config.encoder
    return load_encoder(name, prepared.backbone)


def _plan(
    prepared: Prepared,
    config: TrainConfig,
    encoder: QueryEncoder | None,
    out: Path,
    max_memory: int | None,
) -> Plan:
    return make_plan(
        prepared.backbone,
        prepared.windows,
        out,
        size=config.size,
        k=config.neighbors,
        held_out=config.held_out,
        distill=optimisation(config),
        query_size=encoder.size if encoder else 0,
        studies=config.recipe != "paper",
        by_rules=config.recipe != "paper" and RULES in config.questions,
        encoder_parameters=num_parameters(encoder),
        max_memory=max_memory,
    )


@dataclass(frozen=True)
class _Trained:
    """A memory with what its training has found out, and the folder of its own encoder."""

    memory: Memory
    distilled: DistillReport
    tuned: Tuned
    epochs: int
    questions: int = 0
    study_rows: int = 0
    calibration: Calibration | None = None
    encoder: Path | None = None


def _train(
    stages: Stages,
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
    work: Path,
    run: str,
    team: Team,
) -> TrainReport:
    # (hidden state -> next token) for every token of the corpus.
    datastore = stages.datastore()
    if team.first:
        note_documents(work, prepared.corpus, run)

    # Only training rows may be neighbours: what teacher and memory know of the held-out rows
    # is what the others tell.
    split = split_rows(
        np.asarray(datastore.documents),
        held_out=config.held_out,
        seed=config.seed,
        most=MAX_HELD_OUT_ROWS if config.recipe == "paper" else MAX_STUDY_HELD_OUT_ROWS,
    )
    neighbors = stages.neighbors(datastore, split)

    # The neighbours' votes are what the memory learns to imitate.
    next_tokens = np.asarray(datastore.next_tokens)
    tau = config.tau or derive_tau(neighbors, next_tokens, split.train, seed=config.seed)
    targets = stages.targets(neighbors, next_tokens, tau)

    teach = _imitate if config.recipe == "paper" else _study
    trained = teach(stages, datastore, neighbors, targets, split, tau)

    memory, calibration = trained.memory, trained.calibration
    report = TrainReport(
        out=str(out),
        recipe=config.recipe,
        base_model=prepared.backbone.reference.name,
        layer=prepared.backbone.layer,
        documents=len(prepared.corpus.documents),
        skipped=tuple((s.source, s.reason) for s in prepared.corpus.skipped),
        tokens=prepared.tokens,
        rows=datastore.num_rows,
        questions=trained.questions,
        study_rows=trained.study_rows,
        vocabulary=memory.config.vocab_size,
        parameters=sum(p.numel() for p in memory.parameters()),
        tau=tau,
        kept_mass=targets.kept_mass,
        epochs=trained.epochs,
        memory_lambda=trained.tuned.lambda_,
        memory_temperature=trained.tuned.temperature,
        held_out_by=split.held_out_by if trained.tuned.perplexity else None,
        perplexity=trained.tuned.perplexity,
        study=calibration.figures if calibration else None,
        seconds=stages.seconds(),
        datastore_bytes=sum(
            folder_bytes(work / n) for n in ("datastore", "neighbors", "targets", "words", "study")
        ),
        memory_bytes=sum(t.numel() * t.element_size() for t in memory.state_dict().values()),
    )
    if team.first:
        _save(report, prepared, config, trained, run)
    return report


def _imitate(
    stages: Stages,
    datastore: Datastore,
    neighbors: Neighbors,
    targets: Targets,
    split: Split,
    tau: float,
) -> _Trained:
    """The paper's recipe."""
    # Distilled without the held-out documents, to find out when to stop and what it is worth.
    p_base = stages.base_scores(split)
    memory, distilled = stages.distil(datastore, targets, split, p_base)
    tuned = stages.tune(memory, datastore, targets, neighbors, split, tau, p_base)

    # The memory that is kept has learned the held-out documents too, for as many epochs.
    if len(split.validation):
        memory = stages.refit(datastore, targets, distilled.best_epoch)
    return _Trained(memory, distilled, tuned, distilled.best_epoch)


def _study(
    stages: Stages,
    datastore: Datastore,
    neighbors: Neighbors,
    targets: Targets,
    split: Split,
    tau: float,
) -> _Trained:
    """Self-study: the corpus and the answers to questions written from it."""
    questions = stages.questions()

    # Learned without the held-out documents and a share of the questions, to find out how far
    # encoder and memory are to be trusted.
    held_out = stages.split_questions(questions, datastore, split)
    encoder = stages.encoder(questions, held_out.train)
    studied = stages.study(questions, encoder)
    held_out = held_out.among(studied.rows.questions)
    schedule = stages.schedule(datastore, studied)
    counts = schedule.epochs, len(questions), studied.rows.num_rows
    if not held_out.calibrates:  # too few to fit anything to: everything is learned at once
        everything = np.arange(datastore.num_rows), np.arange(len(questions))
        memory, distilled = stages.learn(datastore, targets, studied, *everything, schedule)
        calibration = stages.unharming(memory, stages.uncalibrated(questions), after="distil")
        tuned = Tuned(MEMORY_LAMBDA)
        return _Trained(memory, distilled, tuned, *counts, calibration, stages.adapted)
    first, last = in_two_parts(schedule)
    learned = split.train, held_out.train
    memory, distilled = stages.learn(datastore, targets, studied, *learned, first)
    calibration, perplexity = stages.calibrate(
        memory, datastore, neighbors, studied, split, held_out, encoder, tau
    )

    # The memory that is kept learns the rest as well, as often as it has learned these.
    memory = stages.finish(memory, datastore, targets, studied, *learned, last)
    calibration = stages.unharming(memory, calibration)
    tuned = Tuned(MEMORY_LAMBDA, perplexity=perplexity)
    return _Trained(memory, distilled, tuned, *counts, calibration, stages.adapted)


def _save(
    report: TrainReport,
    prepared: Prepared,
    config: TrainConfig,
    trained: _Trained,
    run: str,
) -> None:
    training = asdict(config)
    calibration = trained.calibration
    settings = MemorySettings(
        base=prepared.backbone.reference,
        layer=report.layer,
        memory=trained.memory.config,
        memory_lambda=report.memory_lambda,
        memory_temperature=report.memory_temperature,
        encoder=config.encoder if trained.memory.config.query_size else NONE,
        gate=calibration.gate if calibration else None,
        confidence=calibration.confidence if calibration else None,
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run,
        corpus={"fingerprint": prepared.corpus.fingerprint, "documents": report.documents},
        training=training,
        figures={**report.to_dict(), "distillation": asdict(trained.distilled)},
        versions=what_decides_bytes(prepared.backbone.model.device, prepared.backbone.model.dtype),
    )
    card = model_card(report, training)
    save_artifact(Path(report.out), settings, trained.memory, manifest, card, trained.encoder)


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
