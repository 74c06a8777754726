"""Documents to memory: the whole run, its interruptions, its repetitions, and its refusals."""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlpmem_rag import (
    adaptation,
    calibrate,
    heldout,
    neighbors,
    pipeline,
    schedule,
    targets,
    training,
)
from mlpmem_rag.answering import answer_batch
from mlpmem_rag.artifact import (
    CARD,
    MANIFEST,
    WEIGHTS,
    WORK,
    load_manifest,
    load_memory,
    load_settings,
    verify_files,
)
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.calibrate import Calibration
from mlpmem_rag.config import TrainConfig, optimisation
from mlpmem_rag.corpus import Corpus, Document, read_corpus
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import DistillConfig, DistillReport, distill
from mlpmem_rag.embedded import MINILM
from mlpmem_rag.errors import (
    BaseModelError,
    ConfigError,
    CorpusError,
    MissingDependencyError,
    OutputError,
    ResourceError,
)
from mlpmem_rag.lessons import StudyConfig
from mlpmem_rag.memory import Memory
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.neighbors import Neighbors
from mlpmem_rag.pipeline import train
from mlpmem_rag.plan import Plan
from mlpmem_rag.preparation import MIN_ROWS
from mlpmem_rag.progress import OnProgress, ProgressEvent
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.questions import load_questions
from mlpmem_rag.report import TrainReport
from mlpmem_rag.scoring import exact_match
from mlpmem_rag.split import split_rows
from mlpmem_rag.stack import MemoryStack
from mlpmem_rag.storage import folder_bytes
from mlpmem_rag.study import StudyRows
from mlpmem_rag.windows import make_windows, tokenize

from .test_query import needs_minilm

STAGES = (
    "corpus",
    "base model",
    "tokenize",
    "datastore",
    "neighbors",
    "targets",
    "base scores",
    "distil",
    "refit",
)
Floats = npt.NDArray[np.float64]


class Run:
    """A finished training, which no test changes."""

    def __init__(self, source: Path, out: Path, config: TrainConfig) -> None:
        self.out = out
        self.events: list[ProgressEvent] = []
        self.peak_bytes = 0
        plans: list[Plan] = []
        self.report = train(
            source, out=out, config=config, on_progress=self.watch, on_plan=plans.append
        )
        (self.plan,) = plans

    def watch(self, event: ProgressEvent) -> None:
        self.events.append(event)
        self.peak_bytes = max(self.peak_bytes, folder_bytes(self.out))

    @property
    def weights(self) -> bytes:
        return (self.out / WEIGHTS).read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """So that every stage has a middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "QUERY_BATCH", 256)
        patch.setattr(targets, "ROW_BATCH", 256)
        patch.setattr(heldout, "SCORE_TOKENS", 100)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[Document]) -> Path:
    """A folder of sixteen texts."""
    folder = tmp_path_factory.mktemp("source")
    for document in tiny_documents:
        (folder / f"{document.id}.txt").write_text(document.text)
    return folder


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> TrainConfig:
    """Settings of a run of half a second."""
    return TrainConfig(
        recipe="paper",
        base_model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        window=48,
        neighbors=8,
        distill=DistillConfig(epochs=3, batch_rows=256, learning_rate=1e-2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path, config: TrainConfig) -> Run:
    """An uninterrupted run."""
    return Run(source, tmp_path_factory.mktemp("finished") / "memory", config)


@pytest.fixture
def trained(tmp_path: Path, finished: Run) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(finished.out, tmp_path / "memory"))


def corpus_of(texts: list[str]) -> Corpus:
    return Corpus(tuple(Document(str(n), text, None, str(n)) for n, text in enumerate(texts)))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content, the lock aside."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def interrupt_in(stage: str, *, halfway: bool) -> OnProgress:
    def on_progress(event: ProgressEvent) -> None:
        if event.stage == stage and (not halfway or 2 * event.done >= (event.total or 0) > 0):
            raise KeyboardInterrupt

    return on_progress


def stages_of(events: list[ProgressEvent]) -> list[str]:
    return list(dict.fromkeys(event.stage for event in events))


# The whole run.


def test_every_stage_reports_from_nothing_to_all(finished: Run) -> None:
    assert stages_of(finished.events) == list(STAGES)
    for stage in STAGES:
        done = [(e.done, e.total) for e in finished.events if e.stage == stage]
        assert done == sorted(done)
        assert len({total for _, total in done}) == 1
        assert done[-1][0] == done[-1][1]


def test_the_memory_can_be_loaded_and_asked(finished: Run, config: TrainConfig) -> None:
    memory = MemoryModel.load(finished.out, device="cpu", dtype="float32")
    answer = memory.answer("Who found wild honey?", max_new_tokens=5)
    assert 1 <= answer.new_tokens <= 5
    base = load_backbone(config.base_model, device="cpu", dtype="float32").model
    ids = [0, 40, 81, 122, 163]
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert torch.equal(memory.log_probs(ids, lambda_=0.0), expected)
    assert memory.model.memory_lambda == finished.report.memory_lambda > 0
    assert not torch.allclose(memory.log_probs(ids), expected)


def test_report_manifest_and_card_say_the_same(finished: Run, config: TrainConfig) -> None:
    report = finished.report
    assert TrainReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    manifest = load_manifest(finished.out)
    distillation = manifest.figures.pop("distillation")
    assert TrainReport.from_dict(manifest.figures) == report
    assert manifest.figures["perplexity"]["kept_gain"] == report.perplexity.kept_gain  # type: ignore[union-attr]
    assert distillation["best_epoch"] == report.epochs
    assert manifest.training["layer"] == report.layer == 3
    assert manifest.training["distill"]["learning_rate"] == optimisation(config).learning_rate
    settings = load_settings(finished.out)
    assert settings.memory_lambda == report.memory_lambda
    assert settings.memory_temperature == report.memory_temperature
    assert settings.base.name == config.base_model
    card = (finished.out / "README.md").read_text()
    assert report.perplexity is not None
    for figure in ("base", "teacher", "memory"):
        assert f"| {getattr(report.perplexity, figure):.2f} " in card


def test_counts_of_the_report(finished: Run, source: Path, tiny_backbone: Backbone) -> None:
    report = finished.report
    documents = read_corpus(source).documents
    ids = [tiny_backbone.tokenizer(document.text)["input_ids"] for document in documents]
    assert report.documents == len(ids)
    assert report.tokens == sum(map(len, ids))
    assert report.rows == report.tokens - len(ids)
    assert report.vocabulary == len({token for line in ids for token in line[1:]})
    memory = load_memory(finished.out, load_settings(finished.out).memory)
    assert report.parameters == sum(p.numel() for p in memory.parameters())
    assert report.seconds.keys() == {
        "datastore",
        "neighbors",
        "targets",
        "base",
        "distil",
        "refit",
    }
    assert report.total_seconds == sum(report.seconds.values())
    assert report.held_out_by == "document"


def test_the_plan_was_right(finished: Run) -> None:
    plan, report = finished.plan, finished.report
    assert (plan.documents, plan.tokens) == (report.documents, report.tokens)
    assert (plan.rows, plan.vocabulary) == (report.rows, report.vocabulary)
    assert plan.memory_parameters == report.parameters
    headers = 32_000  # of the arrays, and a few JSON files
    assert finished.peak_bytes <= plan.disk_bytes + headers
    assert plan.disk_bytes <= 2 * finished.peak_bytes


def test_perplexities_equal_a_brute_force(
    finished: Run, source: Path, tiny_backbone: Backbone
) -> None:
    """From the stored keys: all distances, all votes, full distributions, in float64."""
    work, report = finished.out / WORK, finished.report
    store = Datastore.open(work / "datastore")
    split = split_rows(np.asarray(store.documents), held_out=0.1, seed=0)
    keys, tokens = store.keys(np.arange(store.num_rows)), np.asarray(store.next_tokens)

    documents = read_corpus(source).documents
    windows = make_windows(tokenize(documents, tiny_backbone.tokenizer), length=48, stride=24)
    base: list[float] = []
    for window in windows:
        ids = torch.from_numpy(window.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            probs = tiny_backbone.model(input_ids=ids).logits[0].double().softmax(-1)
        base += [probs[p - 1, ids[0, p]].item() for p in range(window.context, ids.shape[1])]
    p_base = np.array(base)

    def teacher(row: int) -> float:
        distances = ((keys[split.train].astype(np.float64) - keys[row]) ** 2).sum(1)
        nearest = np.argsort(distances)[:8]
        votes = np.exp(-(distances[nearest] - distances[nearest[0]]) / report.tau)
        agree = tokens[split.train[nearest]] == tokens[row]
        return float((votes * agree).sum() / votes.sum())

    memory = Memory(load_settings(finished.out).memory)
    memory.load_state_dict(load_file(work / "distil" / "best.safetensors"))
    columns = {int(token): n for n, token in enumerate(memory.corpus_tokens)}

    def memory_probs(rows: npt.NDArray[np.int64]) -> Floats:
        with torch.no_grad():
            logits = memory(torch.from_numpy(keys[rows])).double() / report.memory_temperature
        chosen = [columns[int(token)] for token in tokens[rows]]
        picked: Floats = logits.softmax(-1)[torch.arange(len(rows)), chosen].numpy()
        return picked

    def perplexity(p: Floats, rows: npt.NDArray[np.int64], lambda_: float) -> float:
        return float(np.exp(-np.log(lambda_ * p + (1 - lambda_) * p_base[rows]).mean()))

    validation, test = (
        np.array([teacher(row) for row in rows]) for rows in (split.validation, split.test)
    )
    grid = np.linspace(0, 0.999, 1000)
    teacher_lambda = min(grid, key=lambda g: perplexity(validation, split.validation, g))
    found = report.perplexity
    assert found is not None
    assert found.tokens == len(split.test)
    assert found.base == pytest.approx(perplexity(test, split.test, 0.0), rel=1e-4)
    assert found.teacher == pytest.approx(perplexity(test, split.test, teacher_lambda), rel=1e-2)
    expected = perplexity(memory_probs(split.test), split.test, report.memory_lambda)
    assert found.memory == pytest.approx(expected, rel=0.03)  # bfloat16 where it is fast
    assert found.memory < found.base


def test_nothing_is_learned_from_held_out_rows_before_they_are_measured(
    tmp_path: Path, source: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[list[int]] = []

    def spy(memory: Memory, data: Any, rows: Any, *args: Any, **options: Any) -> DistillReport:  # noqa: ANN401
        trainings.append(rows.tolist())
        return distill(memory, data, rows, *args, **options)

    monkeypatch.setattr("mlpmem_rag.training.distill", spy)
    report = train(source, out=tmp_path / "memory", config=config)
    work = tmp_path / "memory" / WORK
    documents = np.asarray(Datastore.open(work / "datastore").documents)
    split = split_rows(documents, held_out=0.1, seed=0)
    assert trainings == [split.train.tolist(), list(range(report.rows))]
    assert set(np.asarray(Neighbors.open(work / "neighbors").ids).flat) <= set(split.train)
    kept = load_file(tmp_path / "memory" / WEIGHTS)
    refit = load_file(work / "refit" / "best.safetensors")
    assert all(torch.equal(kept[name], refit[name]) for name in kept)


def test_every_family_goes_all_the_way(
    tmp_path: Path, family_folder: Path, source: Path, config: TrainConfig
) -> None:
    report = train(source, out=tmp_path / "memory", config=config, base_model=str(family_folder))
    assert report.perplexity is not None
    assert report.perplexity.memory < report.perplexity.base
    memory = MemoryModel.load(tmp_path / "memory", device="cpu", dtype="float32")
    ids = torch.tensor([[0, 40, 81, 122, 163]])
    with torch.no_grad():
        base = memory.model.base(input_ids=ids).logits[0].log_softmax(-1)
    assert torch.equal(memory.log_probs(ids[0].tolist(), lambda_=0.0), base)
    assert memory.answer("Who?", max_new_tokens=3).new_tokens <= 3


def test_a_tokenizer_without_special_tokens_goes_all_the_way(
    tmp_path: Path, bare_folder: Path, source: Path, config: TrainConfig
) -> None:
    report = train(source, out=tmp_path / "memory", config=config, base_model=str(bare_folder))
    assert report.perplexity is not None
    memory = MemoryModel.load(tmp_path / "memory", device="cpu")
    assert memory.answer("Who?", max_new_tokens=3).new_tokens <= 3


def test_bfloat16_goes_all_the_way(tmp_path: Path, source: Path, config: TrainConfig) -> None:
    report = train(source, out=tmp_path / "memory", config=config, dtype="bfloat16")
    assert report.perplexity is not None
    assert report.perplexity.memory < report.perplexity.base
    memory = MemoryModel.load(tmp_path / "memory", device="cpu", dtype="bfloat16")
    assert memory.log_probs([0, 40, 81]).exp().sum(-1).tolist() == pytest.approx(
        [1, 1, 1], abs=1e-3
    )


# Small corpora.


def test_few_documents_are_held_out_by_passage(
    tmp_path: Path, tiny_documents: list[Document], config: TrainConfig
) -> None:
    corpus = Corpus(tuple(tiny_documents[:4]))
    report = train(corpus, out=tmp_path / "memory", config=config)
    assert (report.documents, report.held_out_by) == (4, "passage")
    assert report.perplexity is not None
    assert report.perplexity.tokens >= 16


def test_a_few_books_among_notes_are_held_out_by_passage(
    tmp_path: Path, tiny_documents: list[Document], config: TrainConfig
) -> None:
    """All notes together are fewer tokens than what is to be held out."""
    book = " ".join(document.text for document in tiny_documents[:4])
    texts = [f"{n}. {book}" for n in range(4)] + [f"Note {n}." for n in range(8)]
    report = train(corpus_of(texts), out=tmp_path / "memory", config=config)
    assert report.held_out_by == "passage"
    assert report.perplexity is not None


def test_a_corpus_too_small_to_hold_out_is_not_measured(
    tmp_path: Path, tiny_documents: list[Document], config: TrainConfig
) -> None:
    out, corpus = tmp_path / "memory", Corpus(tuple(tiny_documents[2:3]))
    report = train(corpus, out=out, config=config)
    assert MIN_ROWS <= report.rows < 160
    assert (report.perplexity, report.held_out_by) == (None, None)
    assert report.memory_lambda == training.DEFAULT_LAMBDA
    assert "Nothing: the corpus is too small" in (out / "README.md").read_text()
    assert train(corpus, out=out, config=config) == report
    assert MemoryModel.load(out, device="cpu").answer("Who?", max_new_tokens=2).new_tokens > 0


def test_a_corpus_of_one_word_is_learned(tmp_path: Path, config: TrainConfig) -> None:
    corpus = corpus_of(["yes " * 400])
    report = train(corpus, out=tmp_path / "memory", config=config)
    assert report.perplexity is not None
    assert report.perplexity.memory == pytest.approx(1.0, abs=0.1)


def test_nothing_is_held_out_on_request(tmp_path: Path, source: Path, config: TrainConfig) -> None:
    report = train(source, out=tmp_path / "memory", config=config, held_out=0.0)
    assert report.perplexity is None
    assert "refit" not in report.seconds


# Repetition and interruption.


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    report = train(source, out=tmp_path / "again", config=config)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == finished.weights
    assert report.perplexity == finished.report.perplexity
    train(source, out=tmp_path / "other", config=config, seed=1)
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != finished.weights


def test_the_manifest_says_what_would_change_the_bytes(finished: Run, config: TrainConfig) -> None:
    manifest = load_manifest(finished.out)
    assert {
        "torch": torch.__version__,
        "device": "cpu",
        "dtype": "float32",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }.items() <= manifest.versions.items()
    assert {"faiss-cpu", "faiss-gpu"} & manifest.versions.keys()
    assert manifest.training["seed"] == config.seed
    assert manifest.corpus["fingerprint"]


@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, source: Path, config: TrainConfig, finished: Run, stage: str, halfway: bool
) -> None:
    out = tmp_path / "memory"
    with pytest.raises(KeyboardInterrupt):
        train(source, out=out, config=config, on_progress=interrupt_in(stage, halfway=halfway))
    assert not (out / MANIFEST).exists()
    events: list[ProgressEvent] = []
    report = train(source, out=out, config=config, on_progress=events.append)
    assert (out / WEIGHTS).read_bytes() == finished.weights
    assert report.perplexity == finished.report.perplexity
    done = set(STAGES[3:7][: max(0, STAGES.index(stage) - 3)])
    assert not done & set(stages_of(events)), "what is done is not done again"


def test_interrupted_in_every_stage_one_after_another(
    tmp_path: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    out = tmp_path / "memory"
    for stage in STAGES:
        stop = interrupt_in(stage, halfway=True)
        with pytest.raises(KeyboardInterrupt):
            train(source, out=out, config=config, on_progress=stop)
    train(source, out=out, config=config)
    assert (out / WEIGHTS).read_bytes() == finished.weights


def test_interrupted_while_saving(
    tmp_path: Path,
    source: Path,
    config: TrainConfig,
    finished: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_artifact", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(source, out=tmp_path / "memory", config=config)
    train(source, out=tmp_path / "memory", config=config)
    assert (tmp_path / "memory" / WEIGHTS).read_bytes() == finished.weights


def assert_not_done_again(out: Path, source: Path, config: TrainConfig, run: Run) -> None:
    before = snapshot(out)
    events: list[ProgressEvent] = []
    report = train(source, out=out, config=config, on_progress=events.append)
    assert report == replace(run.report, out=str(out))
    assert snapshot(out) == before
    assert stages_of(events) == ["corpus", "base model", "tokenize"]


def test_a_finished_run_is_not_done_again(
    trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    assert_not_done_again(trained, source, config, finished)


def test_the_working_folder_may_be_deleted(
    trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    shutil.rmtree(trained / WORK)
    assert train(source, out=trained, config=config).perplexity == finished.report.perplexity
    verify_files(trained, load_manifest(trained))


def test_a_damaged_memory_is_made_again(
    trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    (trained / WEIGHTS).write_bytes(finished.weights[:-1])
    train(source, out=trained, config=config)
    assert (trained / WEIGHTS).read_bytes() == finished.weights


def test_a_changed_corpus_is_learned_anew(
    tmp_path: Path, trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / "new.txt").write_text("A lantern hung over the quay, and nobody had lit it.")
    report = train(changed, out=trained, config=config)
    assert report.documents == finished.report.documents + 1
    train(changed, out=tmp_path / "new", config=config)
    assert (trained / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"size": "large"}, STAGES[3:7]),
        ({"tau": 3.0}, ("datastore", "neighbors", "base scores")),
        ({"neighbors": 5}, ("datastore",)),
        ({"layer": 1}, ()),
    ],
)
def test_a_changed_setting_keeps_the_stages_before_it(
    tmp_path: Path,
    trained: Path,
    source: Path,
    config: TrainConfig,
    options: dict[str, Any],
    kept: tuple[str, ...],
) -> None:
    events: list[ProgressEvent] = []
    train(source, out=trained, config=config, on_progress=events.append, **options)
    assert [stage for stage in STAGES if stage not in stages_of(events)] == list(kept)
    train(source, out=tmp_path / "new", config=config, **options)
    assert (trained / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()


def test_fresh_does_every_stage_again(
    trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    events: list[ProgressEvent] = []
    train(source, out=trained, config=config, fresh=True, on_progress=events.append)
    assert stages_of(events) == list(STAGES)
    assert (trained / WEIGHTS).read_bytes() == finished.weights


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("stage", ["datastore", "distil", "refit"])
def test_a_failed_run_leaves_the_earlier_memory(
    trained: Path,
    source: Path,
    config: TrainConfig,
    finished: Run,
    stage: str,
    fresh: bool,
) -> None:
    def fail(event: ProgressEvent) -> None:
        if event.stage == stage and event.done:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="the power is gone"):
        train(source, out=trained, config=config, layer=1, fresh=fresh, on_progress=fail)
    verify_files(trained, load_manifest(trained))
    assert (trained / WEIGHTS).read_bytes() == finished.weights
    assert MemoryModel.load(trained, device="cpu").answer("Who?", max_new_tokens=2).new_tokens > 0


# Self-study, with one's own questions and the base model's own states as their vectors.

SELF_STUDY = (
    "corpus",
    "base model",
    "tokenize",
    "datastore",
    "neighbors",
    "targets",
    "study",
    "distil",
    "calibrate",
    "refit",
    "gate",
)
KEPT = SELF_STUDY[3:]
FACT = re.compile(r"In (.+?), (.+?) found (.+?)\. ")
WORDINGS = (
    ("Who found {0[2]} in {0[0]}", "{0[1]}"),
    ("What did {0[1]} find in {0[0]}", "{0[2]}"),
    ("Did {0[1]} find {0[2]}", "yes"),
)
"""A memory on a random base model answers those of the last kind also when they are held out."""
ENDS = ("?", "??", ", then?")


@pytest.fixture(scope="module")
def own_questions(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[Document]) -> Path:
    """Three questions about each of the sixteen documents, in three wordings each."""
    path = tmp_path_factory.mktemp("questions") / "own.jsonl"
    lines = []
    for document in tiny_documents:
        found = FACT.match(document.text)
        assert found is not None
        for (wording, answer), end in itertools.product(WORDINGS, ENDS):
            question = wording.format(found.groups()) + end
            row = {"question": question, "answer": answer.format(found.groups())}
            lines.append(json.dumps({**row, "doc_ids": [f"{document.id}.txt"]}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def _small_self_study() -> Iterator[None]:
    """Enough questions to calibrate with, and no more steps than asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_QUESTIONS", 0.2)
        for steps in ("MIN_STEPS", "ENOUGH_STEPS"):
            patch.setattr(schedule, steps, 1)
        yield


@pytest.fixture(scope="module")
def study_config(config: TrainConfig, own_questions: Path) -> TrainConfig:
    """Settings of a run of a second, which learns little."""
    return replace(
        config,
        recipe="self-study",
        encoder="pooled",
        questions=(str(own_questions),),
        distill=DistillConfig(epochs=4, batch_rows=512, learning_rate=1e-2),
    )


@pytest.fixture(scope="module")
def studied(
    tmp_path_factory: pytest.TempPathFactory, source: Path, study_config: TrainConfig
) -> Run:
    """An uninterrupted run."""
    return Run(source, tmp_path_factory.mktemp("studied") / "memory", study_config)


@pytest.fixture(scope="module")
def learned(
    tmp_path_factory: pytest.TempPathFactory, source: Path, study_config: TrainConfig
) -> Run:
    """A run long enough to learn by heart; its calibration opens the gate rather than close it."""
    config = replace(
        study_config,
        distill=DistillConfig(epochs=64, batch_rows=256, learning_rate=1e-2, patience=64),
        study=StudyConfig(query_noise=0.05, hidden_noise=0.05, source_share=0.0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "unharming", lambda plain, _: (*plain[:-1], plain[-1] + 2))
        return Run(source, tmp_path_factory.mktemp("learned") / "memory", config)


def test_every_stage_of_a_self_study_reports_from_nothing_to_all(studied: Run) -> None:
    told = list(SELF_STUDY)
    told.insert(told.index("study") + 1, "vectors")  # of the same stage, with a count of their own
    assert stages_of(studied.events) == told
    for stage in told:
        done = [(e.done, e.total) for e in studied.events if e.stage == stage]
        assert len({total for _, total in done}) == 1
        assert done[-1][0] == done[-1][1]


def test_an_encoder_that_cannot_be_loaded_is_refused_before_any_work(
    tmp_path: Path, source: Path, study_config: TrainConfig
) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    out = tmp_path / "memory"
    with pytest.raises(ConfigError, match=r"encoder .* cannot be loaded"):
        train(source, out=out, config=study_config, encoder=str(tmp_path / "encoder"))
    assert not list((out / WORK).glob("*/"))


def test_too_few_questions_to_fit_anything_to_leave_nothing_unlearned(
    tmp_path: Path,
    source: Path,
    study_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[int] = []

    def noting(*arguments: Any) -> Any:  # noqa: ANN401
        rows = curriculum_rows(*arguments)
        learned.append(len(rows))
        return rows

    curriculum_rows = training.curriculum_rows
    monkeypatch.setattr(training, "curriculum_rows", noting)
    monkeypatch.setattr(calibrate, "MIN_QUESTIONS", 10**6)
    report = train(source, out=tmp_path / "memory", config=study_config)
    assert learned == [report.rows + report.study_rows]
    assert report.held_out_by is None
    assert "Nothing: the corpus is too small" in (tmp_path / "memory" / CARD).read_text()


def test_a_self_study_can_be_loaded_and_asked(learned: Run) -> None:
    settings = load_settings(learned.out)
    config = json.loads((learned.out / "config.json").read_text())
    assert (config["encoder"], settings.memory.query_size) == ("pooled", 32)
    assert settings.gate is not None
    assert settings.confidence is not None
    assert settings.memory_lambda == learned.report.memory_lambda == training.MEMORY_LAMBDA
    card = " ".join((learned.out / CARD).read_text().split())
    assert "λ = 1.000 at most (a gate lowers it, to 0.9 for questions)" in card
    memory = MemoryModel.load(learned.out, device="cpu", dtype="float32")
    answer = memory.answer("Who found wild honey?", max_new_tokens=8)
    assert answer.confidence is not None
    assert 0 <= answer.confidence <= 1
    base = load_backbone(settings.base.name, device="cpu", dtype="float32").model
    ids = [0, 40, 81, 122, 163]
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert torch.equal(memory.log_probs(ids, lambda_=0.0), expected)


def test_the_kept_memory_answers_what_it_was_taught(learned: Run, own_questions: Path) -> None:
    """Also the questions that had been held out to calibrate it."""
    memory = MemoryModel.load(learned.out, device="cpu", dtype="float32")
    rows = [json.loads(line) for line in own_questions.read_text().splitlines()][::5]
    answers = [memory.answer(row["question"], max_new_tokens=24, lambda_=1.0) for row in rows]
    right = [exact_match(a.text, [r["answer"]]) for a, r in zip(answers, rows, strict=True)]
    assert np.mean(right) > 0.5
    sure = [a.confidence for a, r in zip(answers, right, strict=True) if r]
    unsure = [a.confidence for a, r in zip(answers, right, strict=True) if not r]
    assert np.mean(np.array(sure)) > np.mean(np.array([*unsure, 0.0]))
    study = learned.report.study
    assert study is not None
    assert study.taught is not None
    assert study.taught > 0.5
    base = [memory.answer(row["question"], max_new_tokens=24, lambda_=0.0) for row in rows[:5]]
    assert not any(exact_match(a.text, [r["answer"]]) for a, r in zip(base, rows, strict=False))


def test_answers_to_what_was_held_out_are_kept(learned: Run) -> None:
    """They were right as often as the report says, on questions that were not taught."""
    work = learned.out / WORK
    kept = Calibration.from_dict(json.loads((work / "calibration/calibration.json").read_text()))
    questions = load_questions(work / "questions" / "questions.jsonl")
    study = learned.report.study
    assert study is not None
    assert kept.answers
    assert np.mean([answer.right for answer in kept.answers]) == study.held_out
    assert len({questions[answer.question].text for answer in kept.answers}) == len(kept.answers)
    assert all(0 < answer.confidence < 1 for answer in kept.answers)


def test_the_memory_that_is_kept_does_other_text_no_harm(learned: Run) -> None:
    """The gate of its calibration would do more than is allowed."""
    memory = MemoryModel.load(learned.out, device="cpu")
    gate, backbone = memory.model.gate, memory.backbone
    assert gate is not None
    assert backbone is not None
    texts = calibrate.other_texts(backbone, seed=0)
    other = calibrate.score_other_text(backbone, memory.model.memory, texts)
    values = json.loads((learned.out / WORK / "calibration" / "calibration.json").read_text())
    values.pop("perplexity")
    harm = [
        (other.p_base.log() - other.mixed(g, 1.0, asked=False).log()).mean().exp().item()
        for g in (gate, Calibration.from_dict(values).gate)
    ]
    rounded = backbone.model.dtype == torch.bfloat16  # as the memory was not when it was measured
    assert harm[0] == pytest.approx(calibrate.MAX_HARM, abs=1e-3 if rounded else 1e-4)
    assert harm[1] > 2 * calibrate.MAX_HARM - 1


def test_report_manifest_and_work_of_a_self_study(
    studied: Run, study_config: TrainConfig, own_questions: Path
) -> None:
    report, work = studied.report, studied.out / WORK
    assert TrainReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    manifest = load_manifest(studied.out)
    distillation = manifest.figures.pop("distillation")
    assert TrainReport.from_dict(manifest.figures) == report
    assert (distillation["best_epoch"], report.epochs) == (3, 4)
    training_ = manifest.training
    assert (training_["recipe"], training_["encoder"]) == ("self-study", "pooled")
    assert training_["layer"] == report.layer == 2, "earlier than the paper's 3 of 0 to 3"
    assert training_["study"] == asdict(study_config.study)
    questions = load_questions(work / "questions" / "questions.jsonl")
    given = [json.loads(line) for line in own_questions.read_text().splitlines()]
    assert [(q.text, q.answer, q.document) for q in questions] == [
        (row["question"], row["answer"], row["doc_ids"][0]) for row in given
    ]
    answered = [q for q in questions if q.answer in q.source]
    assert len(answered) > len(questions) / 2
    assert {q.source for q in questions} == {
        q.source if q in answered else q.text for q in questions
    }
    assert report.questions == len(given)
    rows = StudyRows.open(work / "study")
    assert report.study_rows == rows.num_rows
    store = Datastore.open(work / "datastore")
    both = np.concatenate([store.next_tokens, rows.next_tokens])
    assert report.vocabulary == len(np.unique(both))
    study = report.study
    assert study is not None
    assert study.questions == len(given)
    assert 0 < study.coverage < 1
    assert report.perplexity is not None
    assert report.perplexity.memory < report.perplexity.base


def test_a_self_study_learns_nothing_of_what_is_held_out_before_it_is_measured(
    tmp_path: Path, source: Path, study_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[list[int]] = []

    def spy(memory: Memory, lesson: Any, rows: Any, *args: Any, **options: Any) -> DistillReport:  # noqa: ANN401
        trainings.append(rows.tolist())
        return distill(memory, lesson, rows, *args, **options)

    monkeypatch.setattr("mlpmem_rag.training.distill", spy)
    out = tmp_path / "memory"
    report = train(source, out=out, config=study_config)
    store, rows = Datastore.open(out / WORK / "datastore"), StudyRows.open(out / WORK / "study")
    split = split_rows(np.asarray(store.documents), held_out=0.1, seed=0)
    first = set(trainings[0])
    times = np.bincount(trainings[1], minlength=report.rows + report.study_rows)
    assert {row for row, count in enumerate(times) if count == 1} == first
    assert {row for row, count in enumerate(times) if count == schedule.CATCHING_UP} == (
        set(range(report.rows + report.study_rows)) - first
    )
    assert {row for row in first if row < report.rows} == set(split.train)
    names = [document.id for document in read_corpus(source).documents]
    held_out = {names[n] for n in np.asarray(store.documents)[[*split.validation, *split.test]]}
    questions = load_questions(out / WORK / "questions" / "questions.jsonl")
    learned = {int(rows.questions[row - report.rows]) for row in first if row >= report.rows}
    assert held_out
    assert not held_out & {questions[number].document for number in learned}
    about_learned = {n for n, q in enumerate(questions) if q.document not in held_out}
    assert calibrate.MIN_QUESTIONS <= len(about_learned - learned) < len(about_learned) / 2


def test_a_self_study_holds_out_no_more_than_it_needs(
    tmp_path: Path, source: Path, study_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_STUDY_HELD_OUT_ROWS", 20)
    out = tmp_path / "memory"
    report = train(source, out=out, config=study_config)
    documents = np.asarray(Datastore.open(out / WORK / "datastore").documents)
    expected = split_rows(documents, held_out=0.1, seed=0, most=20)
    assert len(expected.test) < len(split_rows(documents, held_out=0.1, seed=0).test)
    assert report.perplexity is not None
    assert report.perplexity.tokens == len(expected.test)


@pytest.mark.parametrize("stage", SELF_STUDY[3:])
def test_a_self_study_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path,
    source: Path,
    study_config: TrainConfig,
    studied: Run,
    stage: str,
) -> None:
    out = tmp_path / "memory"
    stop = interrupt_in(stage, halfway=True)
    with pytest.raises(KeyboardInterrupt):
        train(source, out=out, config=study_config, on_progress=stop)
    assert not (out / MANIFEST).exists()
    events: list[ProgressEvent] = []
    report = train(source, out=out, config=study_config, on_progress=events.append)
    assert (out / WEIGHTS).read_bytes() == studied.weights
    assert (out / "config.json").read_bytes() == (studied.out / "config.json").read_bytes()
    assert (report.perplexity, report.study) == (studied.report.perplexity, studied.report.study)
    done = set(KEPT[: KEPT.index(stage)]) - {"distil", "refit"}  # which note that they have ended
    assert not done & set(stages_of(events)), "what is done is not done again"


def test_a_finished_self_study_is_not_done_again(
    tmp_path: Path, source: Path, study_config: TrainConfig, studied: Run
) -> None:
    out = Path(shutil.copytree(studied.out, tmp_path / "memory"))
    assert_not_done_again(out, source, study_config, studied)


def test_other_questions_in_the_same_file_are_studied(
    tmp_path: Path, source: Path, study_config: TrainConfig, studied: Run
) -> None:
    """What a file holds decides, and not its name."""
    out = Path(shutil.copytree(studied.out, tmp_path / "memory"))
    lines = Path(study_config.questions[0]).read_text().splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(lines[:-1]))
    events: list[ProgressEvent] = []
    config = replace(study_config, questions=(str(own),))
    train(source, out=out, config=config, on_progress=events.append)
    kept = [stage for stage in SELF_STUDY if stage not in stages_of(events)]
    assert kept == ["datastore", "neighbors", "targets"]
    own.write_text("\n".join(lines[:-2]))
    report = train(source, out=out, config=config)
    assert report.questions == studied.report.questions - 2


def test_too_few_questions_leave_other_text_unharmed_all_the_same(
    tmp_path: Path, source: Path, study_config: TrainConfig, own_questions: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(own_questions.read_text().splitlines()[:6]))
    out = tmp_path / "memory"
    report = train(source, out=out, config=study_config, questions=(str(own),))
    settings = load_settings(out)
    assert settings.gate is not None
    assert settings.gate.constant_opening == pytest.approx(calibrate.ASKED_OPENING)
    assert (settings.confidence, report.memory_lambda) == (None, 1.0)
    assert report.study is not None
    assert (report.study.questions, report.study.taught) == (report.questions, None)
    memory = MemoryModel.load(out, device="cpu", dtype="float32")
    assert memory.answer("Who?", max_new_tokens=2).confidence is None


@needs_minilm
def test_words_are_compared_from_training_to_answer(
    tmp_path: Path, source: Path, study_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEWEST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(adaptation, name, 2)
    out = tmp_path / "memory"
    config = replace(study_config, encoder=MINILM)
    run = Run(source, out, config)
    assert "words" in stages_of(run.events)
    memory = MemoryModel.load(out, device="cpu", dtype="float32")
    model, asked = memory.model, load_questions(out / WORK / "questions" / "questions.jsonl")
    requests = model.encode_queries([question.text for question in asked])
    assert requests.shape[1] == model.request_size > model.query_size == 384
    found = model.memory.nearest(requests).tolist()
    assert all(asked[n].text == q.text for n, q in zip(found, asked, strict=True))
    other = "And who found it in the harbour, do you know?"
    near = model.encode_queries([other])
    recalled = model.memory.nearest(near)
    taught = model.taught_answers(near)[0].tolist()
    expected = answer_ids(memory.tokenizer, asked[int(recalled)].answer)
    assert taught[: len(expected)] == expected[: len(taught)]
    answer = memory.answer(other, max_new_tokens=8)
    assert answer.confidence is not None
    told_by_hand = []
    batch = answer_batch(model, memory.tokenizer, [q.text for q in asked], requests.numpy())
    for (text, trace), line in zip(batch, requests, strict=True):
        tokens = torch.tensor([answer_ids(memory.tokenizer, text)])
        candidates = model.memory.candidates(line[None])
        told_by_hand += model.memory.support(candidates, tokens) if trace.log_probs else [0.0]
    same = np.isclose([t.support for _, t in batch], told_by_hand, atol=1e-4)
    assert same.mean() > 0.95, "a text in other tokens than were taught has no support"
    assert max(told_by_hand) > 0

    # The same from a merged folder, and of one memory in a stack.
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    merged = MemoryModel.load(tmp_path / "merged", device="cpu", dtype="float32")
    assert merged.answer(other, max_new_tokens=8).text == answer.text
    torch.testing.assert_close(merged.model.encode_queries([other]), near)
    stack = MemoryStack.load({"one": out}, device="cpu", dtype="float32")
    prompt = prompt_ids(memory.tokenizer, [{"role": "user", "content": other}])
    ids = torch.tensor([prompt])
    told: Any = model
    for options in ({}, {"num_beams": 2}, {"query_text": other}):
        single = told.generate(ids, max_new_tokens=8, **options)
        assert torch.equal(single, stack.generate(ids, max_new_tokens=8, **options))
    bare = near[:, :384].clone()
    assert told.generate(ids, max_new_tokens=2, query_vector=bare).shape[1] <= len(prompt) + 2
    with pytest.raises(ConfigError, match="takes"):
        told.generate(ids, max_new_tokens=2, query_vector=near[:, :385])

    # What a training before words left behind is gone on with.
    weights = load_file(out / WEIGHTS)
    shutil.rmtree(out / WORK / "words")
    (out / MANIFEST).unlink()
    events: list[ProgressEvent] = []
    train(source, out=out, config=config, on_progress=events.append)
    assert "words" in stages_of(events)
    assert not {"encoder", "study", "calibrate"} & set(stages_of(events))
    again = load_file(out / WEIGHTS)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("options", [{"encoder": "none"}, {"held_out": 0.0}])
def test_a_self_study_without_an_encoder_or_held_out_documents(
    tmp_path: Path, source: Path, study_config: TrainConfig, options: dict[str, Any]
) -> None:
    out = tmp_path / "memory"
    report = train(source, out=out, config=study_config, **options)
    settings = load_settings(out)
    assert settings.encoder == options.get("encoder", "pooled")
    assert (report.perplexity is None) == ("held_out" in options)
    assert settings.gate is not None
    assert (settings.confidence is None) >= ("held_out" in options)
    memory = MemoryModel.load(out, device="cpu", dtype="float32")
    assert memory.answer("Who?", max_new_tokens=3).new_tokens <= 3


@pytest.mark.parametrize("family_folder", ["gpt2", "gemma", "opt"], indirect=True)
def test_a_self_study_on_other_families(
    tmp_path: Path, family_folder: Path, source: Path, study_config: TrainConfig
) -> None:
    check_self_study(source, tmp_path / "memory", study_config, family_folder)


def test_a_self_study_with_a_tokenizer_without_special_tokens(
    tmp_path: Path, bare_folder: Path, source: Path, study_config: TrainConfig
) -> None:
    check_self_study(source, tmp_path / "memory", study_config, bare_folder)


def check_self_study(source: Path, out: Path, config: TrainConfig, base_model: Path) -> None:
    quick = replace(config, distill=DistillConfig(epochs=1, batch_rows=512))
    report = train(source, out=out, config=quick, base_model=str(base_model))
    assert report.study is not None
    memory = MemoryModel.load(out, device="cpu", dtype="float32")
    assert memory.answer("Who found wild honey?", max_new_tokens=3).new_tokens <= 3


def test_a_question_that_is_none_is_refused_by_its_line(
    tmp_path: Path, source: Path, study_config: TrainConfig
) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "Who?", "answer": "Ines"}\n{"question": 3}\n')
    config = replace(study_config, questions=(str(tmp_path / "own.jsonl"),))
    with pytest.raises(ConfigError, match=r"own\.jsonl, line 2 is no question"):
        train(source, out=tmp_path / "memory", config=config)
    assert not (tmp_path / "memory" / MANIFEST).exists()


# Refusals.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 3}, "unknown setting.* epochs; allowed are recipe, base_model"),
        ({"recipe": "x"}, "recipe 'x' is not known; choose self-study, paper"),
        ({"size": "huge"}, "size 'huge' is not known; choose small, base, large"),
        ({"tau": 0.0}, "tau = 0.0: allowed"),
        ({"tau": -1.0}, "tau = -1.0: allowed"),
        ({"tau": float("nan")}, "tau = nan: allowed"),
        ({"tau": float("inf")}, "tau = inf: allowed"),
        ({"neighbors": 0}, "neighbors = 0: allowed are 1 to 1024"),
        ({"neighbors": 1025}, "neighbors = 1025: allowed are 1 to 1024"),
        ({"window": 8}, "window = 8: allowed"),
        ({"held_out": 0.3}, "held_out = 0.3: allowed"),
        ({"held_out": -0.1}, "held_out = -0.1: allowed"),
        ({"seed": -1}, "seed"),
        ({"layer": 4}, "layer 4 does not exist"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
    ],
)
def test_settings_outside_what_is_allowed_are_refused_before_the_work(
    tmp_path: Path, source: Path, config: TrainConfig, options: dict[str, Any], said: str
) -> None:
    events: list[ProgressEvent] = []
    with pytest.raises(ConfigError, match=said):
        train(source, out=tmp_path / "m", config=config, on_progress=events.append, **options)
    assert "datastore" not in stages_of(events)


def test_an_optimisation_can_be_given_as_a_setting(
    tmp_path: Path, source: Path, config: TrainConfig
) -> None:
    train(source, out=tmp_path / "memory", config=config, distill=DistillConfig(epochs=1), seed=4)
    training = load_manifest(tmp_path / "memory").training
    assert (training["distill"]["epochs"], training["distill"]["seed"]) == (1, 4)


def test_a_missing_corpus_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        train(tmp_path / "nowhere", out=tmp_path / "memory", config=config)


def test_one_sentence_is_refused_with_the_numbers(tmp_path: Path, config: TrainConfig) -> None:
    corpus = corpus_of(["The ledger of 1887 was sold."])
    with pytest.raises(CorpusError, match=rf"has \d+ tokens .* 1 document.* at least {MIN_ROWS}"):
        train(corpus, out=tmp_path / "memory", config=config)
    with pytest.raises(CorpusError, match="has 0 tokens"):
        train(corpus_of([]), out=tmp_path / "memory", config=config)


def test_a_skipped_file_is_reported_or_refused(
    tmp_path: Path, source: Path, config: TrainConfig
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "empty.txt").touch()
    with pytest.raises(CorpusError, match=r"empty\.txt"):
        train(folder, out=tmp_path / "memory", config=config, strict=True)
    report = train(folder, out=tmp_path / "memory", config=config)
    assert report.skipped == (("empty.txt", "empty"),)


def test_an_unknown_base_model_is_refused_and_may_be_corrected(
    tmp_path: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    out = tmp_path / "memory"
    with pytest.raises(BaseModelError, match="'no/such-model' cannot be loaded"):
        train(source, out=out, config=config, base_model="no/such-model")
    train(source, out=out, config=config)
    assert (out / WEIGHTS).read_bytes() == finished.weights


def _file(folder: Path) -> Path:
    (folder / "out").write_text("mine")
    return folder / "out"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "memory"


def _foreign(folder: Path) -> Path:
    (folder / "thesis.tex").write_text("mine")
    return folder


def _with_a_work_folder(folder: Path) -> Path:
    (folder / "README.md").write_text("mine")
    (folder / "work" / "important").mkdir(parents=True)
    (folder / "work" / "important" / "thesis.tex").write_text("mine")
    return folder


def _model(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_file, "is a file"),
        (_below_a_file, "cannot be written"),
        (_foreign, "is not empty and holds no memory"),
        (_with_a_work_folder, "is not empty and holds no memory"),
        (_model, "is not empty and holds no memory"),
    ],
)
def test_an_output_that_is_someone_elses_is_refused_and_left(
    tmp_path: Path,
    source: Path,
    config: TrainConfig,
    make: Callable[[Path], Path],
    said: str,
    fresh: bool,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    out = make(folder)
    before = snapshot(folder)
    with pytest.raises(OutputError, match=said):
        train(source, out=out, config=config, fresh=fresh)
    assert snapshot(folder) == before


def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, source: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, **_: object) -> None:  # root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", closed)
    with pytest.raises(OutputError, match=r"memory cannot be written \(Permission denied\)"):
        train(source, out=tmp_path / "memory", config=config)


def test_an_output_in_use_is_refused(
    trained: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    with FileLock(trained / WORK / ".lock"), pytest.raises(OutputError, match="another run"):
        train(source, out=trained, config=config, seed=5)
    assert (trained / WEIGHTS).read_bytes() == finished.weights
    train(source, out=trained, config=config)


def test_a_memory_may_be_written_into_the_folder_of_its_documents(
    tmp_path: Path, source: Path, config: TrainConfig, finished: Run
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    train(folder, out=folder / "memory", config=config)
    report = train(folder, out=folder / "memory", config=config)
    assert report.documents == finished.report.documents
    assert (folder / "memory" / WEIGHTS).read_bytes() == finished.weights


def test_a_small_disk_is_refused_before_the_work(
    tmp_path: Path, source: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    events: list[ProgressEvent] = []
    plans: list[Plan] = []
    with pytest.raises(ResourceError, match=r"needs 0\.00 GiB of disk, 0\.00 GiB are free"):
        train(
            source,
            out=tmp_path / "memory",
            config=config,
            on_progress=events.append,
            on_plan=plans.append,
        )
    assert stages_of(events) == ["corpus", "base model", "tokenize"]
    assert plans[0].free_disk_bytes == 1000


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*_: object) -> None:
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    ("writer", "failure", "kept"),
    [
        ("datastore.allocate_array", no_space, ()),
        ("neighbors.allocate_array", no_space, ("datastore",)),
        ("targets.allocate_array", no_space, ("datastore", "neighbors")),
        ("heldout.allocate_array", no_space, ("datastore", "neighbors", "targets")),
        ("distill.save_file", no_space_for_tensors, STAGES[3:7]),
        ("artifact.save_file", no_space_for_tensors, STAGES[3:7]),
    ],
)
def test_a_disk_that_fills_keeps_what_is_done(
    tmp_path: Path,
    source: Path,
    config: TrainConfig,
    finished: Run,
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
    failure: Callable[..., None],
    kept: tuple[str, ...],
) -> None:
    out = tmp_path / "memory"
    with monkeypatch.context() as patch:
        patch.setattr(f"mlpmem_rag.{writer}", failure)
        with pytest.raises(ResourceError, match=rf"{out} is full; .* kept in {out / WORK}"):
            train(source, out=out, config=config)
    assert not (out / MANIFEST).exists()
    events: list[ProgressEvent] = []
    train(source, out=out, config=config, on_progress=events.append)
    assert not set(kept) & set(stages_of(events))
    assert (out / WEIGHTS).read_bytes() == finished.weights


def test_missing_faiss_is_named_before_the_work(
    tmp_path: Path, source: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    events: list[ProgressEvent] = []
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlpmem-rag\[cpu\]'"):
        train(source, out=tmp_path / "memory", config=config, on_progress=events.append)
    assert not events
    assert not (tmp_path / "memory").exists()
