"""A whole comparison: questions, arms, answers, report. Goes on where it was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlpmem_eval.arms import Arm, make_arms
from mlpmem_eval.comparison import RunSettings, run_comparison
from mlpmem_eval.environment import machine, versions
from mlpmem_eval.folder import JUDGEMENTS, ROWS, report_folder
from mlpmem_eval.judge import Judge, Judgements, judged
from mlpmem_eval.named_llm import load_llm, source_of
from mlpmem_eval.questions import (
    EvalQuestion,
    QuestionSet,
    drawn,
    load_questions,
    written_questions,
)
from mlpmem_eval.render import write_report
from mlpmem_eval.report import build_report
from mlpmem_eval.schema import Report
from mlpmem_eval.taught import taught_questions
from mlpmem_eval.tuning import QUESTIONS as TUNING_QUESTIONS
from mlpmem_eval.workbench import Workbench, sentence_encoder
from mlpmem_rag.artifact import Manifest, load_manifest
from mlpmem_rag.corpus import Corpus, read_corpus
from mlpmem_rag.errors import ConfigError, CorpusError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import OnProgress, ignore_progress

DEFAULT_ARMS = ("base", "rag", "rag-tuned", "memory")


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, on what, and how.

    Attributes:
        memory: folder of a trained memory.
        out: folder for the report.
        questions: file of questions; None: only written ones.
        corpus: documents, for arms that read them and for written questions.
        arms: names, in the order in which they are shown.
        write: questions to write from the corpus, besides those of the file.
        limit: of the file's questions, at most so many, drawn by chance; 0: all.
        max_new_tokens: most tokens of an answer.
        concurrency: questions that an arm has at the same time.
        warm_up: questions asked of every arm before.
        threshold: confidence below which `memory-first` asks RAG; None: the best on
            questions that training held out.
        judge: name of an LLM that judges the answers, as `named_llm.load_llm` reads it.
        follow_links: whether symbolic links in the corpus are followed.
        seed: of everything random.
        base_model: where the base model is, if not where it was in training.
        device: where to compute.
        dtype: number format of the base model.
        strict: whether a row that is no question is an error.
        command: how the comparison was called.
    """

    memory: Path
    out: Path
    questions: Path | None = None
    corpus: str | None = None
    arms: tuple[str, ...] = DEFAULT_ARMS
    write: int = 0
    limit: int = 0
    max_new_tokens: int = 24
    concurrency: int = 1
    warm_up: int = 2
    threshold: float | None = None
    judge: str | None = None
    follow_links: bool = False
    seed: int = 0
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    strict: bool = False
    command: str = ""


def compare(
    config: CompareConfig,
    *,
    own: Sequence[Arm] = (),
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Run a comparison and write its report.

    Args:
        config: what is compared.
        own: arms of one's own, besides those named in `config`.
        on_progress: called often.

    Raises:
        ArtifactError: the memory is missing, damaged, or belongs to another base model.
        ConfigError: no questions, an unknown arm or judge, or an arm that lacks the documents.
        CorpusError: the documents cannot be read.
        OutputError: the output folder cannot be used.
    """
    manifest = load_manifest(config.memory)
    judge = None
    if config.judge is not None:
        judge = Judge(config.judge, load_llm(config.judge), source_of(config.judge))
    corpus = (
        read_corpus(config.corpus, follow_links=config.follow_links)
        if config.corpus is not None
        else None
    )
    asked = questions_of(config, corpus, on_progress)
    with report_folder(config.out) as work:
        bench = opened(config, manifest, work, corpus, asked.questions, on_progress)
        arms = [*make_arms(config.arms, bench), *own]
        report = compare_arms(
            arms,
            asked.questions,
            work / ROWS,
            config,
            settings=settings_of(config, manifest, corpus, bench),
            warnings=warnings_of(config, manifest, corpus, asked),
            memory=bench.memory,
            judge=judge,
            on_progress=on_progress,
        )
        write_report(report, config.out)
    return report


def opened(
    config: CompareConfig,
    manifest: Manifest,
    work: Path,
    corpus: Corpus | None,
    asked: Sequence[EvalQuestion],
    on_progress: OnProgress = ignore_progress,
) -> Workbench:
    """Load the memory and lay out what arms are made from.

    Args:
        config: of the comparison.
        manifest: of the memory.
        work: a folder for indexes and searches.
        corpus: the documents.
        asked: evaluation questions, none of which any setting is chosen on.
        on_progress: called often.
    """
    memory = MemoryModel.load(
        config.memory, base_model=config.base_model, device=config.device, dtype=config.dtype
    )
    return Workbench(
        memory,
        config.memory,
        manifest,
        work,
        corpus,
        config.max_new_tokens,
        lambda: _tuning_questions(corpus, asked, config.seed, on_progress),
        frozenset(question.text for question in asked),
        threshold=config.threshold,
        seed=config.seed,
        on_progress=on_progress,
    )


def compare_arms(
    arms: Sequence[Arm],
    questions: Sequence[EvalQuestion],
    rows_path: Path,
    config: CompareConfig,
    *,
    settings: dict[str, Any],
    warnings: Sequence[str],
    memory: MemoryModel,
    judge: Judge | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Report:
    """Ask arms that are made already, and report."""
    rows = run_comparison(
        [arm.answerer for arm in arms],
        questions,
        rows_path,
        RunSettings(
            config.concurrency,
            config.warm_up,
            {"machine": settings["machine"], "versions": settings["versions"]},
            str(memory.model.device),
        ),
        on_progress=on_progress,
    )
    found = Judgements({}, 0)
    if judge is not None:
        path = rows_path.with_name(JUDGEMENTS)
        found = judged(judge, questions, rows, path, on_progress=on_progress)
    return build_report(
        questions,
        rows,
        arm_settings={arm.answerer.name: arm.answerer.settings for arm in arms},
        setups={arm.answerer.name: arm.setup for arm in arms},
        settings=settings,
        warnings=[*warnings, *([found.problem] if found.problem else [])],
        encoder=sentence_encoder(memory),
        judgements=found.scores,
        seed=config.seed,
    )


def questions_of(
    config: CompareConfig, corpus: Corpus | None, on_progress: OnProgress = ignore_progress
) -> QuestionSet:
    """The questions of the file and those written from the corpus.

    Raises:
        ConfigError: neither is asked for, or no corpus to write from.
    """
    given = QuestionSet(())
    if config.questions is not None:
        given = load_questions(config.questions, strict=config.strict)
        asked = drawn(given.questions, config.limit, config.seed)
        given = QuestionSet(asked, given.problems, len(given.questions) - len(asked))
    if config.write and corpus is None:
        raise ConfigError(f"--write {config.write} needs the documents; give them with --corpus")
    if not config.write and not given.questions:
        raise ConfigError("no questions; give a file with --questions, or --write N to write some")
    written: list[EvalQuestion] = []
    if config.write and corpus is not None:
        known = {question.text for question in given.questions}
        written = written_questions(
            corpus.documents,
            config.write,
            seed=config.seed,
            exclude=known,
            on_progress=on_progress,
        )
    taken = {question.id for question in given.questions}
    while any(question.id in taken for question in written):
        written = [replace(question, id=f"new-{question.id}") for question in written]
    return replace(given, questions=(*given.questions, *written))


def warnings_of(
    config: CompareConfig, manifest: Manifest, corpus: Corpus | None, asked: QuestionSet
) -> list[str]:
    """What a reader of the report has to know."""
    warnings = [
        f"{config.questions}, line {line}: left out, {reason}" for line, reason in asked.problems
    ]
    if asked.left:
        warnings.append(
            f"{asked.left:,} questions of {config.questions} were not asked: {config.limit:,} "
            f"were drawn by chance, with seed {config.seed}"
        )
    expected = str(manifest.corpus.get("fingerprint", ""))
    if corpus is not None and corpus.fingerprint != expected:
        warnings.append(
            f"the documents are not those that the memory was trained on: their fingerprint is "
            f"{corpus.fingerprint[:16]}, the memory's {expected[:16]}; RAG and memory know "
            "different things"
        )
    if corpus is not None and corpus.skipped:
        warnings.append(f"{len(corpus.skipped)} files or rows of the corpus could not be read")
    taught = taught_questions(config.memory)
    if taught is None and manifest.training.get("recipe") != "paper":
        warnings.append(
            "which questions were taught to the memory cannot be told: its work/ folder is gone, "
            "or of another training"
        )
    texts = {question.text for question in taught or ()}
    known = sum(question.text in texts for question in asked.questions)
    if known:
        warnings.append(
            f"{known} of {len(asked.questions)} questions were taught to the memory word for "
            "word: on these it shows what it recalls, not how it does on new ones"
        )
    return warnings


def settings_of(
    config: CompareConfig, manifest: Manifest, corpus: Corpus | None, bench: Workbench
) -> dict[str, Any]:
    """All that is needed to repeat the run."""
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }
    return {
        "command": given.pop("command"),
        "options": given,
        "model": {
            "base": manifest.training.get("base_model"),
            "dtype": str(bench.memory.model.base.dtype),
            "device": str(bench.memory.model.device),
        },
        "memory": {"run": manifest.run, "created": manifest.created, **manifest.training},
        "corpus": None
        if corpus is None
        else {"fingerprint": corpus.fingerprint, "documents": len(corpus.documents)},
        "questions_sha256": None if config.questions is None else _sha256(config.questions),
        "searches": bench.searches,
        "machine": machine(),
        "versions": versions(),
    }


def _tuning_questions(
    corpus: Corpus | None, asked: Sequence[EvalQuestion], seed: int, on_progress: OnProgress
) -> list[EvalQuestion]:
    if corpus is None:
        return []
    try:
        return written_questions(
            corpus.documents,
            TUNING_QUESTIONS,
            seed=seed + 1,
            exclude={question.text for question in asked},
            on_progress=on_progress,
        )
    except CorpusError:  # whoever needs them says so
        return []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
