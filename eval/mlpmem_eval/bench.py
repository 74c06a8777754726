"""The paper's protocols on what data is at hand, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from mlpmem_eval import published
from mlpmem_eval.arms import make_arms
from mlpmem_eval.bench_schema import (
    BENCH,
    BENCH_TABLE,
    BENCH_VERSION,
    Bench,
    Section,
    markdown,
)
from mlpmem_eval.folder import ROWS
from mlpmem_eval.headtohead import (
    CompareConfig,
    compare_arms,
    opened,
    questions_of,
    settings_of,
    warnings_of,
)
from mlpmem_eval.knn import NeighborMemory, open_teacher
from mlpmem_eval.perplexity import text_perplexity
from mlpmem_eval.preference import Choice, load_choices, prefers_right
from mlpmem_eval.protocols import (
    growth_section,
    perplexity_section,
    preference_section,
    question_section,
    speed_section,
    text_section,
)
from mlpmem_eval.questions import QuestionSet, drawn
from mlpmem_eval.workbench import Workbench
from mlpmem_rag.artifact import WORK, Manifest, load_manifest
from mlpmem_rag.corpus import read_corpus
from mlpmem_rag.errors import ArtifactError, ConfigError
from mlpmem_rag.heldout import Perplexities
from mlpmem_rag.lock import LOCK
from mlpmem_rag.output import output_folder
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.storage import replace_file

ARMS = ("base", "rag", "knn", "memory")


@dataclass(frozen=True)
class BenchConfig:
    """What there is to measure on.

    Attributes:
        memory: folder of a trained memory.
        out: folder for `bench.json` and `bench.md`.
        questions: file of questions; rows with a `hallucinated_answer` are for the preference too.
        corpus: the documents that the memory was trained on.
        text: a file of running text, for perplexity.
        limit: questions, at most, drawn by chance; 0: all.
        tokens: of the text, at most; 0: all.
        max_new_tokens: most tokens of an answer.
        follow_links: whether symbolic links in the corpus are followed.
        seed: of everything random.
        base_model: where the base model is, if not where it was in training.
        device: where to compute.
        dtype: number format of the base model.
        command: how the bench was called.
    """

    memory: Path
    out: Path
    questions: Path | None = None
    corpus: str | None = None
    text: Path | None = None
    limit: int = 100
    tokens: int = 20_000
    max_new_tokens: int = 24
    follow_links: bool = False
    seed: int = 0
    base_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    command: str = ""


def run_bench(config: BenchConfig, *, on_progress: OnProgress = ignore_progress) -> Bench:
    """Run every protocol that there is data for, and write what came out.

    Raises:
        ArtifactError: the memory is missing, damaged, or belongs to another base model.
        ConfigError: no data, or a file that cannot be read.
        CorpusError: the documents cannot be read.
        OutputError: the output folder cannot be used.
    """
    if config.questions is None and config.text is None:
        raise ConfigError("nothing to measure on; give --questions, --text, or both")
    manifest = load_manifest(config.memory)
    text = None if config.text is None else _text(config.text)
    choices = [] if config.questions is None else load_choices(config.questions)
    corpus = (
        None
        if config.corpus is None
        else read_corpus(config.corpus, follow_links=config.follow_links)
    )
    compared = _as_comparison(config, knn=_has_rows(config.memory), documents=corpus is not None)
    asked = QuestionSet(()) if config.questions is None else questions_of(compared, corpus)
    with output_folder(config.out, kind="bench", is_ours=is_bench) as work:
        bench = opened(compared, manifest, work, corpus, asked.questions, on_progress)
        sections = [*_trained(manifest)]
        if text is not None:
            sections.append(_text_section(bench, text, config.tokens, on_progress))
        if asked.questions:
            sections += _questions(bench, compared, asked, manifest, on_progress)
        if choices:
            sections.append(
                _preference(bench, drawn(choices, config.limit, config.seed), on_progress)
            )
        if asked.questions and corpus is not None:
            teacher = (lambda: _teacher(bench)) if "knn" in compared.arms else None
            sections.append(
                growth_section(bench, asked.questions, teacher, on_progress=on_progress)
            )
        found = Bench(
            schema_version=BENCH_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=settings_of(compared, manifest, corpus, bench),
            warnings=warnings_of(compared, manifest, corpus, asked),
            sections=sections,
            not_run=_not_run(config, sections, compared),
        )
        for name, content in (
            (BENCH, found.model_dump_json(indent=1) + "\n"),
            (BENCH_TABLE, markdown(found)),
        ):
            _write(config.out / name, content)
    return found


def is_bench(folder: Path) -> bool:
    """Whether a folder holds a bench, or one that was interrupted."""
    return (folder / BENCH).is_file() or (folder / WORK / LOCK).is_file()


def _as_comparison(config: BenchConfig, *, knn: bool, documents: bool) -> CompareConfig:
    """The questions are asked as `compare` asks them."""
    known = {field.name for field in fields(CompareConfig)}
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
    possible = {"base": True, "rag": documents, "knn": knn and documents, "memory": True}
    return CompareConfig(**given, arms=tuple(arm for arm in ARMS if possible[arm]))


def _has_rows(folder: Path) -> bool:
    return (folder / WORK / "datastore").is_dir()


def _teacher(bench: Workbench) -> NeighborMemory:
    return open_teacher(bench.folder, bench.manifest, bench.memory.model.memory)


def _trained(manifest: Manifest) -> list[Section]:
    """What training measured on documents that it had held out."""
    found = manifest.figures.get("perplexity")
    if not isinstance(found, dict):
        return []
    names = {field.name for field in fields(Perplexities)}
    figures = Perplexities(**{name: value for name, value in found.items() if name in names})
    return [
        perplexity_section(
            "held-out perplexity",
            "Perplexity of documents held out in training (as training measured it)",
            figures,
            with_teacher=True,
            settings={"held_out_by": manifest.figures.get("held_out_by")},
        )
    ]


def _text_section(bench: Workbench, text: str, tokens: int, on_progress: OnProgress) -> Section:
    try:
        teacher = _teacher(bench)
    except ArtifactError:
        teacher = None
    return text_section(
        text_perplexity(bench.memory, teacher, text, tokens=tokens, on_progress=on_progress)
    )


def _questions(
    bench: Workbench,
    config: CompareConfig,
    asked: QuestionSet,
    manifest: Manifest,
    on_progress: OnProgress,
) -> list[Section]:
    report = compare_arms(
        make_arms(config.arms, bench),
        asked.questions,
        bench.work / ROWS,
        config,
        settings=settings_of(config, manifest, bench.corpus, bench),
        warnings=(),
        memory=bench.memory,
        on_progress=on_progress,
    )
    return [question_section(report), speed_section(report)]


def _preference(bench: Workbench, choices: Sequence[Choice], on_progress: OnProgress) -> Section:
    passages = None
    if bench.corpus is not None:
        retriever = bench.index("rag", 0).index.as_retriever(similarity_top_k=1)
        passages = [retriever.retrieve(c.question)[0].node.get_content() for c in choices]
    right = prefers_right(bench.memory, choices, passages, on_progress=on_progress)
    return preference_section(right, seed=bench.seed)


def _not_run(
    config: BenchConfig, sections: Sequence[Section], compared: CompareConfig
) -> list[str]:
    """What the paper measures and this run does not, and why."""
    there = {section.name for section in sections}
    reasons = {
        "perplexity": "perplexity of a text: give one with --text",
        "questions": "open-domain questions: give them with --questions",
        "preference": "HaluEval: give --questions with a hallucinated_answer in each row",
        "corpus size": "time by corpus size: give --questions and --corpus",
    }
    missing = [reason for name, reason in reasons.items() if name not in there]
    arms = [arm for arm in ARMS if arm not in compared.arms]
    why = "rag and knn need --corpus, knn the datastore that training left in work/"
    left_out = [f"arms {', '.join(arms)}: {why}"] if arms and "questions" in there else []
    return [*missing, *left_out, *published.NOT_RUN]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read ({error}); give a UTF-8 text") from error


def _write(path: Path, content: str) -> None:
    replace_file(path, lambda beside: beside.write_text(content, encoding="utf-8"))
