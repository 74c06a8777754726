"""The stages of a training run, each with its own folder: done once, or read from there."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mlpmem_rag.adaptation import write_adapted
from mlpmem_rag.artifact import MemorySettings
from mlpmem_rag.backbone import mlp_shape, output_embedding
from mlpmem_rag.calibrate import (
    ASKED_OPENING,
    Calibration,
    HeldOutRows,
    QuestionSplit,
    StudyFigures,
    answer_coverage,
    calibrate,
    other_texts,
    score_other_text,
    score_text,
    split_questions,
    unharming,
)
from mlpmem_rag.confidence import NUM_FEATURES, SHRINKAGE
from mlpmem_rag.config import TrainConfig, optimisation
from mlpmem_rag.contexts import Contexts, encode_contexts
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.distill import DistillConfig, DistillReport, Lesson, Rows, distill
from mlpmem_rag.gate import Gate, constant_weights
from mlpmem_rag.heldout import (
    TEMPERATURES,
    Perplexities,
    Probabilities,
    measure,
    score_base,
    tune,
)
from mlpmem_rag.late_interaction import WORDS_WEIGHTS, WordRows
from mlpmem_rag.learned_text import about_held_out, cut_documents
from mlpmem_rag.lessons import Columns, Curriculum, StudyLesson, TextLesson
from mlpmem_rag.memory import Memory, derive_config, new_memory
from mlpmem_rag.mixing import best_lambda, mixture_nll
from mlpmem_rag.model import attach_memory
from mlpmem_rag.neighbors import Neighbors, find_neighbors
from mlpmem_rag.preparation import (
    Prepared,
    asking_key,
    datastore_key,
    encoder_key,
    question_sources,
)
from mlpmem_rag.processes import ALONE, Team
from mlpmem_rag.progress import OnProgress
from mlpmem_rag.query import QueryEncoder, SentenceEncoder, load_encoder
from mlpmem_rag.questions import (
    Question,
    load_questions,
    save_questions,
)
from mlpmem_rag.recall import (
    MAX_QUESTIONS,
    answer_drafts,
    longest_draft,
    question_keys,
)
from mlpmem_rag.recollection import SHARE
from mlpmem_rag.schedule import CATCHING_UP, catching_up, long_enough, look_alike
from mlpmem_rag.shared_lesson import shared_out
from mlpmem_rag.split import Split
from mlpmem_rag.stages import enter_stage, leave_stage, stage_key, stage_seconds
from mlpmem_rag.storage import write_json
from mlpmem_rag.study import StudyRows, study_rows
from mlpmem_rag.targets import Targets, build_targets, teacher_probability
from mlpmem_rag.windows import TokenArray
from mlpmem_rag.words import WORDS_KEY, open_words, save_words, word_rows
from mlpmem_rag.writers import write_questions

STAGES = (
    "datastore",
    "neighbors",
    "targets",
    "base",
    "questions",
    "encoder",
    "words",
    "study",
    "distil",
    "calibration",
    "refit",
    "gate",
)
ADAPTED = "adapted"
DEFAULT_LAMBDA = 0.25
"""Where nothing could be held out to choose it (paper, WikiText)."""
UNVALIDATED_EPOCHS = 3
MEMORY_LAMBDA = 1.0
"""Of a memory with a gate, which lowers it token by token."""


@dataclass(frozen=True)
class Tuned:
    """Settings chosen on the validation rows, and what they give on the test rows."""

    lambda_: float = DEFAULT_LAMBDA
    temperature: float = 1.0
    perplexity: Perplexities | None = None


@dataclass(frozen=True)
class Studied:
    """Written questions with their rows, and the corpus text as their encoder sees it."""

    questions: list[Question]
    rows: StudyRows
    contexts: Contexts
    words: WordRows | None = None

    @cached_property
    def alike(self) -> bool:
        """See `look_alike`."""
        return look_alike(self.questions, self.rows)


class Stages:
    """Each stage once: done in its own folder, or read from there when nothing has changed."""

    def __init__(
        self,
        prepared: Prepared,
        encoder: QueryEncoder | None,
        config: TrainConfig,
        work: Path,
        on_progress: OnProgress,
        *,
        keys_in_memory: bool = True,
        writing_processes: int | None = None,
        team: Team = ALONE,
    ) -> None:
        self._team = team
        self._keys_in_memory = keys_in_memory
        self._writing_processes = writing_processes
        self._prepared = prepared
        self._encoder = encoder
        self._config = config
        self._work = work
        self._on_progress = on_progress
        self._keys = {"datastore": datastore_key(prepared, config)}

    def datastore(self) -> Datastore:
        """(hidden state -> next token) for every token of the corpus."""
        with self._stage("datastore", self._keys["datastore"], shared=True) as (folder, done):
            if done:
                return Datastore.open(folder)
            return build_datastore(
                self._prepared.backbone,
                self._prepared.windows,
                folder,
                team=self._team,
                on_progress=self._on_progress,
            )

    def neighbors(self, datastore: Datastore, split: Split) -> Neighbors:
        """The nearest training rows of every row."""
        config = self._config
        key = self._after("datastore", config.neighbors, split.key)
        with self._stage("neighbors", key) as (folder, done):
            if done:
                return Neighbors.open(folder)
            return find_neighbors(
                datastore,
                split.train,
                folder,
                k=config.neighbors,
                device=self._prepared.backbone.device,
                in_memory=self._keys_in_memory,
                on_progress=self._on_progress,
            )

    def targets(self, neighbors: Neighbors, next_tokens: TokenArray, tau: float) -> Targets:
        """The neighbours' votes."""
        with self._stage("targets", self._after("neighbors", tau)) as (folder, done):
            if done:
                return Targets.open(folder)
            return build_targets(
                neighbors,
                next_tokens,
                folder,
                tau=tau,
                device=self._prepared.backbone.device,
                on_progress=self._on_progress,
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
        lesson = self._text_lesson(datastore, targets, memory)
        validated = len(split.validation) > 0

        def validation_loss(memory: Memory) -> float:
            p_memory = lesson.true_token_probabilities(memory, split.validation)
            return mixture_nll(p_base[0], p_memory, best_lambda(p_base[0], p_memory))

        key = self._after("targets", asdict(optimisation(config)), config.alpha, config.size)
        report = self._distil(
            "distil",
            key,
            memory,
            lesson,
            split.train,
            optimisation(config),
            validate=validation_loss if validated else None,
            stop_epoch=None if validated else UNVALIDATED_EPOCHS,
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
        lesson = self._text_lesson(datastore, targets, memory)
        lambda_, temperature = tune(
            p_base[0],
            {t: lesson.true_token_probabilities(memory, split.validation, t) for t in TEMPERATURES},
        )
        next_tokens = np.asarray(datastore.next_tokens)
        teacher_validation, teacher_test = (
            teacher_probability(neighbors, next_tokens, rows, tau).astype(np.float64)
            for rows in (split.validation, split.test)
        )
        perplexity = measure(
            p_base[1],
            teacher_test,
            lesson.true_token_probabilities(memory, split.test, temperature),
            np.asarray(datastore.documents)[split.test],
            teacher_lambda=best_lambda(p_base[0], teacher_validation),
            memory_lambda=lambda_,
        )
        return Tuned(lambda_, temperature, perplexity)

    def refit(self, datastore: Datastore, targets: Targets, epochs: int) -> Memory:
        """The same training with all rows, for as many epochs as were best."""
        memory = self._blank(datastore)
        self._distil(
            "refit",
            self._after("distil", epochs),
            memory,
            self._text_lesson(datastore, targets, memory),
            np.arange(datastore.num_rows),
            optimisation(self._config),
            stop_epoch=epochs,
        )
        return memory

    def questions(self) -> list[Question]:
        """Questions to be taught, which the corpus answers; kept as jsonl for people to read."""
        documents = self._prepared.corpus.documents
        key = stage_key(
            self._prepared.corpus.fingerprint,
            question_sources(self._prepared, self._config),
            MAX_QUESTIONS,
        )
        with self._stage("questions", key) as (folder, done):
            path = folder / "questions.jsonl"
            if not done:
                written = write_questions(
                    self._config.questions,
                    documents,
                    self._prepared.backbone,
                    most_processes=self._writing_processes,
                    on_progress=self._on_progress,
                )
                save_questions(written, path)
            return load_questions(path)

    def encoder(self, questions: list[Question], learned: Rows) -> QueryEncoder | None:
        """The encoder, once it has read the corpus; one that is not of sentences stays as it is."""
        config, encoder = self._config, self._encoder
        key = self._after(
            "questions", encoder_key(config), config.seed, stage_key(learned.tolist())
        )
        with self._stage("encoder", key) as (folder, done):
            if not isinstance(encoder, SentenceEncoder):
                return encoder
            path = folder / ADAPTED
            if not done:
                write_adapted(
                    encoder,
                    questions,
                    learned,
                    path,
                    seed=config.seed,
                    on_progress=self._on_progress,
                )
        return load_encoder(str(path), self._prepared.backbone)

    @property
    def adapted(self) -> Path | None:
        """Folder of an encoder that has read the corpus; None: it stays as it was."""
        path = self._work / "encoder" / ADAPTED
        return path if path.is_dir() else None

    def study(self, questions: list[Question], encoder: QueryEncoder | None) -> Studied:
        """The base model's states along the answers, and the vectors of questions and text."""
        prepared = self._prepared
        words = self._words(questions, encoder)
        key = self._after("encoder", self._keys["datastore"], asking_key(prepared))
        with self._stage("study", key, shared=True) as (folder, done):
            if not done:
                rows = study_rows(
                    prepared.backbone,
                    encoder,
                    questions,
                    words=words,
                    folder=folder,
                    team=self._team,
                    on_progress=self._on_progress,
                )
                if self._team.first:
                    rows.save(folder)
                    tokenizer = prepared.backbone.tokenizer
                    encode_contexts(encoder, tokenizer, prepared.windows).save(folder)
                self._team.wait()
            rows, contexts = StudyRows.open(folder), Contexts.open(folder)
        return Studied(questions, rows, contexts, words)

    def _words(self, questions: list[Question], encoder: QueryEncoder | None) -> WordRows | None:
        """Vectors of the questions, of what answers them, and of all their words.

        None for an encoder that shows no words.
        """
        with self._stage("words", self._after("encoder", WORDS_KEY)) as (folder, done):
            if not done:
                rows = word_rows(encoder, questions, on_progress=self._on_progress)
                save_words(rows, folder)
            return open_words(folder)

    def split_questions(
        self, questions: list[Question], datastore: Datastore, split: Split
    ) -> QuestionSplit:
        """Which questions are learned, which are held out with which text."""
        cuts = cut_documents(self._prepared, datastore, split)
        return split_questions(
            questions,
            about_held_out(questions, cuts),
            validated=len(split.validation) > 0,
            seed=self._config.seed,
        )

    def schedule(self, datastore: Datastore, studied: Studied) -> DistillConfig:
        """How long a memory of everything is trained."""
        num_rows = datastore.num_rows + studied.rows.num_rows
        return long_enough(optimisation(self._config), num_rows, alike=studied.alike)

    def learn(
        self,
        datastore: Datastore,
        targets: Targets,
        studied: Studied,
        text_rows: Rows,
        questions: Rows,
        schedule: DistillConfig,
    ) -> tuple[Memory, DistillReport]:
        """A query-aware memory of the given corpus rows and questions."""
        config = self._config
        memory = self._blank(datastore, studied)
        rows = curriculum_rows(datastore, studied, text_rows, questions)
        shape = memory.config.learned
        settings = (asdict(schedule), asdict(config.study), config.alpha, shape)
        key = self._after("targets", self._keys["study"], settings, len(text_rows))
        self._familiarise(memory, studied, questions)
        report = self._distil(
            "distil",
            key,
            memory,
            self._curriculum(datastore, targets, studied, memory),
            rows,
            schedule,
        )
        return memory, report

    def calibrate(
        self,
        memory: Memory,
        datastore: Datastore,
        neighbors: Neighbors,
        studied: Studied,
        split: Split,
        held_out: QuestionSplit,
        encoder: QueryEncoder | None,
        tau: float,
    ) -> tuple[Calibration, Perplexities]:
        """Gate and confidence from what was held out, figures from the test documents."""
        prepared = self._prepared
        key = self._after(
            "distil", self._keys["words"], WORDS_WEIGHTS, SHARE, SHRINKAGE, NUM_FEATURES
        )
        with self._stage("calibration", key) as (folder, done):
            path = folder / "calibration.json"
            if not done:
                backbone, windows = prepared.backbone, prepared.windows
                validation, test = (
                    score_text(backbone, memory, windows, rows, on_progress=self._on_progress)
                    for rows in (split.validation, split.test)
                )
                calibration = calibrate(
                    attach_memory(backbone, copy.deepcopy(memory), self._settings(memory)),
                    backbone,
                    studied.questions,
                    studied.rows,
                    held_out,
                    validation,
                    self._other_texts,
                    answer_coverage(studied.questions, prepared.corpus.documents),
                    encoder=encoder,
                    seed=self._config.seed,
                )
                perplexity = _perplexity(
                    calibration.gate, validation, test, datastore, neighbors, split, tau
                )
                write_json(path, {**asdict(calibration), "perplexity": asdict(perplexity)})
            values = json.loads(path.read_text())
        perplexity = Perplexities(**values.pop("perplexity"))
        return Calibration.from_dict(values), perplexity

    def finish(
        self,
        memory: Memory,
        datastore: Datastore,
        targets: Targets,
        studied: Studied,
        text_rows: Rows,
        questions: Rows,
        schedule: DistillConfig,
    ) -> Memory:
        """Go on from a memory of these corpus rows and questions with everything there is."""
        learned = curriculum_rows(datastore, studied, text_rows, questions)
        self._familiarise(memory, studied, np.arange(len(studied.questions)))
        self._distil(
            "refit",
            self._after("distil", asdict(schedule), CATCHING_UP),
            memory,
            self._curriculum(datastore, targets, studied, memory),
            catching_up(datastore.num_rows + studied.rows.num_rows, learned),
            schedule,
        )
        return memory

    def uncalibrated(self, questions: list[Question]) -> Calibration:
        """What there is where nothing could be held out: one weight for all tokens."""
        weights = constant_weights(ASKED_OPENING)
        coverage = answer_coverage(questions, self._prepared.corpus.documents)
        figures = StudyFigures(len(questions), len({q.source for q in questions}), coverage)
        return Calibration(Gate(asked=weights, plain=weights), None, figures)

    def unharming(
        self, memory: Memory, calibration: Calibration, *, after: str = "refit"
    ) -> Calibration:
        """With a gate that does other text no harm, now that the memory has learned everything."""
        with self._stage("gate", self._after(after, calibration.gate.plain)) as (folder, done):
            path = folder / "gate.json"
            if not done:
                other = score_other_text(
                    self._prepared.backbone,
                    memory,
                    self._other_texts,
                    on_progress=self._on_progress,
                )
                write_json(path, {"plain": unharming(calibration.gate.plain, other)})
            plain = tuple(json.loads(path.read_text())["plain"])
        return replace(calibration, gate=replace(calibration.gate, plain=plain))

    @cached_property
    def _other_texts(self) -> list[list[int]]:
        """Of the base model, written once."""
        return other_texts(self._prepared.backbone, seed=self._config.seed)

    def seconds(self) -> dict[str, float]:
        """Time of each stage, also of those that an earlier run has done."""
        return {name: stage_seconds(self._work / name) for name in self._keys}

    def _distil(
        self,
        stage: str,
        key: str,
        memory: Memory,
        lesson: Lesson,
        rows: Rows,
        config: DistillConfig,
        *,
        validate: Callable[[Memory], float] | None = None,
        stop_epoch: int | None = None,
    ) -> DistillReport:
        """One training of a memory, in the folder of its stage."""
        with (
            self._stage(stage, key, shared=True) as (folder, _),
            self._team.copy_of(folder) as mine,
            shared_out(lesson, memory, self._team) as part,
        ):
            return distill(
                memory,
                part,
                rows,
                config,
                mine,
                validate=validate,
                stop_epoch=stop_epoch,
                stage=stage,
                on_progress=self._on_progress,
            )

    def _settings(self, memory: Memory) -> MemorySettings:
        """As it will be asked; its gate for other text is not known yet."""
        backbone, weights = self._prepared.backbone, constant_weights(ASKED_OPENING)
        return MemorySettings(
            backbone.reference,
            backbone.layer,
            memory.config,
            MEMORY_LAMBDA,
            1.0,
            gate=Gate(asked=weights, plain=weights),
        )

    def _blank(self, datastore: Datastore, studied: Studied | None = None) -> Memory:
        backbone, config = self._prepared.backbone, self._config
        seen = [datastore.next_tokens] + ([studied.rows.next_tokens] if studied else [])
        tokens = torch.from_numpy(np.unique(np.concatenate(seen)).astype(np.int64))
        recalls = isinstance(self._encoder, SentenceEncoder)
        memory_config = derive_config(
            mlp_shape(backbone.model, backbone.layer),
            backbone.num_layers,
            len(tokens),
            config.size,
            query_size=studied.rows.query_vectors.shape[1] if studied else 0,
            hidden_scale=root_mean_square(studied.rows.keys) if studied else 1.0,
            num_questions=len(studied.questions) if studied and self._encoder else 0,
            recalls=bool(studied and recalls),
            draft_size=longest_draft(studied.rows) if studied and recalls else 0,
            words=studied.words.shape if studied and studied.words else None,
        )
        head = output_embedding(backbone.model, tokens)
        return new_memory(memory_config, tokens, head, seed=config.seed).to(backbone.device)

    def _familiarise(self, memory: Memory, studied: Studied, questions: Rows) -> None:
        """Keys and words of the questions that the memory is going to learn, if they have rows."""
        if not memory.config.num_questions:
            return
        taught = questions[np.isin(questions, studied.rows.questions)]
        keys = question_keys(studied.rows, taught)
        memory.questions.zero_()
        memory.questions[: len(keys)] = torch.from_numpy(keys)
        drafts = answer_drafts(studied.rows, taught, memory.config.draft_size)
        memory.drafts.fill_(-1)
        memory.drafts[: len(drafts)] = torch.from_numpy(drafts)
        if memory.words is not None and studied.words is not None:
            memory.words.know(studied.words, taught, studied.rows.sources)

    def _columns(self, memory: Memory) -> Columns:
        return Columns(memory, self._prepared.backbone.reference.vocab_size)

    def _text_lesson(
        self,
        datastore: Datastore,
        targets: Targets,
        memory: Memory,
        contexts: Contexts | None = None,
    ) -> TextLesson:
        columns = self._columns(memory)
        return TextLesson(datastore, targets, columns, alpha=self._config.alpha, contexts=contexts)

    def _curriculum(
        self, datastore: Datastore, targets: Targets, studied: Studied, memory: Memory
    ) -> Curriculum:
        text = self._text_lesson(datastore, targets, memory, studied.contexts)
        study = StudyLesson(studied.rows, self._columns(memory), self._config.study)
        return Curriculum([(text, datastore.num_rows), (study, studied.rows.num_rows)])

    def _after(self, earlier: str, *settings: object) -> str:
        return stage_key(self._keys[earlier], *settings)

    @contextmanager
    def _stage(self, name: str, key: str, *, shared: bool = False) -> Iterator[tuple[Path, bool]]:
        """The folder of a stage and whether it is finished; marks it so at the end.

        In a team the first process does the stage and the others find it finished, unless its work
        is shared.
        """
        self._keys[name] = key
        folder, team = self._work / name, self._team
        if not team.first:
            team.wait()
            yield folder, enter_stage(folder, key)
            if shared:
                team.wait()
            return
        done = enter_stage(folder, key)
        started = time.perf_counter()
        try:
            if shared:
                team.wait()
            yield folder, done
            if shared:
                team.wait()
        except BaseException:
            if not done:
                with suppress(OSError):  # what stopped the run is the error to tell
                    leave_stage(folder, key, time.perf_counter() - started, finished=False)
            raise
        if not done:
            leave_stage(folder, key, time.perf_counter() - started, finished=True)
        if not shared:
            team.wait()


def _perplexity(
    gate: Gate,
    validation: HeldOutRows,
    test: HeldOutRows,
    datastore: Datastore,
    neighbors: Neighbors,
    split: Split,
    tau: float,
) -> Perplexities:
    """Of the test documents, which nobody asks about here."""
    next_tokens = np.asarray(datastore.next_tokens)
    teacher_validation, teacher_test = (
        teacher_probability(neighbors, next_tokens, rows, tau).astype(np.float64)
        for rows in (split.validation, split.test)
    )
    return measure(
        test.p_base.double().numpy(),
        teacher_test,
        test.mixed(gate, MEMORY_LAMBDA, asked=False).double().numpy(),
        np.asarray(datastore.documents)[split.test],
        teacher_lambda=best_lambda(validation.p_base.double().numpy(), teacher_validation),
        memory_lambda=1.0,
    )


def curriculum_rows(
    datastore: Datastore, studied: Studied, text_rows: Rows, questions: Rows
) -> Rows:
    """Corpus rows, and all rows of the given questions behind them, as a `Curriculum` counts."""
    asked = np.isin(studied.rows.questions, questions)
    return np.concatenate([text_rows, datastore.num_rows + np.flatnonzero(asked)])


def root_mean_square(keys: npt.NDArray[np.float16], sample: int = 20_000) -> float:
    """Of a sample of rows. *Shape:* (N, D) -> ()."""
    step = max(1, len(keys) // sample)
    return float(np.sqrt(np.square(keys[::step].astype(np.float32)).mean()))
