"""What arms are made from: one loaded base model, indexes, and the searches for settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_index.indices.managed.mlpmem import MLPMemIndex
from llama_index.indices.managed.mlpmem.query_engine import MemoryQueryEngine
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_eval.answerers import QueryEngineAnswerer
from mlpmem_eval.cost import Setup
from mlpmem_eval.embedding import EncoderEmbedding
from mlpmem_eval.environment import versions
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import (
    CANDIDATES,
    NATIVE,
    Indexed,
    RagSetting,
    native_index,
    passage_index,
    tuned_engine,
)
from mlpmem_eval.rows import append_lines, read_lines, row_key
from mlpmem_eval.tuning import Tried, Tuned, tune
from mlpmem_eval.weighing import held_out_answers, weigh
from mlpmem_rag.artifact import CARD, CONFIG, MANIFEST, WEIGHTS, Manifest
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.embedded import MINILM, embedded_model_path
from mlpmem_rag.errors import ConfigError, MissingDependencyError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.query import QueryEncoder, SentenceEncoder, load_encoder
from mlpmem_rag.storage import write_json

STOP = "\n"

S = TypeVar("S", bound=Hashable)


@dataclass
class Workbench:
    """What several arms need is made once.

    Attributes:
        memory: the memory on its base model, loaded.
        folder: it was loaded from.
        manifest: of it.
        work: a folder for indexes and searches.
        corpus: the documents; None: no arm that reads them can be made.
        max_new_tokens: most tokens of an answer, the same for every arm.
        tuning_questions: written questions to choose settings on, when they are needed.
        asked: evaluation questions; no setting is chosen on one of them.
        encoder: finds passages; None: see `sentence_encoder`.
        threshold: confidence below which `memory-first` asks RAG; None: see
            `memory_first_threshold`.
        seed: of everything random.
        on_progress: called often.
    """

    memory: MemoryModel
    folder: Path
    manifest: Manifest
    work: Path
    corpus: Corpus | None = None
    max_new_tokens: int = 24
    tuning_questions: Callable[[], Sequence[EvalQuestion]] = field(default=list)
    asked: frozenset[str] = frozenset()
    encoder: QueryEncoder | None = None
    threshold: float | None = None
    seed: int = 0
    on_progress: OnProgress = ignore_progress
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)
    _indexes: dict[int | None, Indexed] = field(default_factory=dict)

    # Models.

    def chat_llm(self, lambda_: float | None = None) -> MLPMemLLM:
        """The model, asked with messages in its chat template."""
        return MLPMemLLM.from_model(
            self.memory, lambda_=lambda_, max_new_tokens=self.max_new_tokens
        )

    def plain_llm(self) -> MLPMemLLM:
        """The base model, continuing a line of text as it stands."""
        return MLPMemLLM.from_model(
            self.memory,
            lambda_=0.0,
            max_new_tokens=self.max_new_tokens,
            is_chat_model=False,
            stop=[STOP],
        )

    @cached_property
    def memory_engine(self) -> MemoryQueryEngine:
        """The memory as a query engine that gives its answer whole, to be judged first."""
        index = MLPMemIndex.from_memory(self.folder, llm=self.chat_llm())
        return index.as_query_engine(attribution="none")

    # Documents.

    def documents(self, arm: str) -> Corpus:
        """The corpus.

        Raises:
            ConfigError: none was given.
        """
        if self.corpus is None:
            raise ConfigError(f"the arm {arm!r} needs the documents; give them with --corpus")
        return self.corpus

    @cached_property
    def embedding(self) -> EncoderEmbedding:
        """Of passages and questions."""
        return EncoderEmbedding(self.encoder or sentence_encoder(self.memory))

    def index(self, arm: str, words: int | None) -> Indexed:
        """The index of passages of so many words; None: LlamaIndex's own chunks."""
        if words not in self._indexes:
            documents = self.documents(arm).documents
            folder = self.work / f"index-{'native' if words is None else words}"
            self._indexes[words] = (
                native_index(documents, self.embedding, folder)
                if words is None
                else passage_index(documents, self.embedding, words, folder)
            )
        return self._indexes[words]

    # Settings that are searched for.

    @cached_property
    def tuned_rag(self) -> tuple[RagSetting, float]:
        """RAG's best setting on written questions, and the seconds of the search."""

        def ask(setting: RagSetting, question: str) -> str:
            return self.rag_answerer("tuning", setting).answer(question).text

        settings = self.model_settings | self.retrieval_settings("rag-tuned")
        for words in {candidate.words for candidate in CANDIDATES}:
            self.index("rag-tuned", words)  # beforehand: its time is not the search's
        return self.search("rag", CANDIDATES, ask, settings)

    def rag_answerer(self, name: str, setting: RagSetting) -> QueryEngineAnswerer:
        """RAG of a setting."""
        index = self.index(name, setting.words).index
        engine = tuned_engine(index, setting, self.chat_llm(0.0), self.plain_llm())
        settings = self.model_settings | self.retrieval_settings(name) | asdict(setting)
        return QueryEngineAnswerer(name, engine, settings, first_line=setting.prompt != NATIVE)

    def search(
        self,
        name: str,
        candidates: Sequence[S],
        ask: Callable[[S, str], str],
        settings: dict[str, Any],
    ) -> tuple[S, float]:
        """The best of some settings on the written questions, and the seconds of the search.

        A search that was done before in this folder is not done again.

        Raises:
            ConfigError: no questions can be written.
        """
        questions = self._written(name)
        found = self._kept(
            name,
            [_plain(candidates), settings, ["f1", "em"]],
            questions,
            lambda: self._searched(name, candidates, ask, questions, settings),
        )
        return candidates[found["best"]], float(found["seconds"])

    @cached_property
    def memory_first_threshold(self) -> tuple[float, float]:
        """`threshold`, or the best one on held-out questions; and the seconds that took.

        Training asked the memory questions that it had not learned yet; RAG is asked the same
        ones. (What the memory says to them now tells nothing, since it has learned them, too.)
        Where training left none, RAG is asked when the memory is less sure than RAG was right on
        written questions.

        Raises:
            ConfigError: no questions can be written.
        """
        if self.threshold is not None:
            return self.threshold, 0.0
        setting, _ = self.tuned_rag
        held_out = [h for h in held_out_answers(self.folder) if h[0].text not in self.asked]
        np.random.default_rng(self.seed).shuffle(held_out)
        held_out = held_out[: len(self._written("memory-first"))]
        if not held_out:
            best, *_ = self.searches["rag"]["tried"]
            return float(best["em"]), 0.0
        rag = self.rag_answerer("memory-first", setting)
        questions = [question for question, _ in held_out]
        judged = [[answer.confidence, answer.right] for _, answer in held_out]
        content = [rag.settings, self.memory_settings, judged]
        found = self._kept("memory-first", content, questions, lambda: weigh(held_out, rag))
        return float(found["threshold"]), float(found["seconds"])

    def _written(self, name: str) -> list[EvalQuestion]:
        questions = list(self.tuning_questions())
        if not questions:
            raise ConfigError(
                f"no questions could be written from the corpus to tune {name} on; leave out the "
                "arms that need them"
            )
        return questions

    def _kept(
        self,
        name: str,
        content: list[Any],
        questions: Sequence[EvalQuestion],
        make: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """What an earlier run found on the same questions and settings, or what `make` finds."""
        asked = [[q.text, *q.answers] for q in questions]
        searched = {"search": [content, asked], "versions": versions()}
        key = row_key(searched, EvalQuestion(name, name, ()))
        path = self.work / f"tuning-{name}.json"
        found: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )
        if found.get("key") != key:
            found = make() | {"key": key}
            write_json(path, found)
        self.searches[name] = found
        return found

    def _searched(
        self,
        name: str,
        candidates: Sequence[S],
        ask: Callable[[S, str], str],
        questions: Sequence[EvalQuestion],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """A search that goes on where an earlier one was interrupted."""
        path = self.work / f"tuning-{name}.jsonl"
        known = {entry["key"]: entry for entry in read_lines(path)}
        used: dict[str, float] = {}
        common = {"versions": versions(), **settings}

        def asked(setting: S, question: str) -> str:
            content = {"setting": _plain([setting]), **common}
            key = row_key(content, EvalQuestion(name, question, ()))
            if key not in known:
                started = time.perf_counter()
                text = ask(setting, question)
                seconds = time.perf_counter() - started
                known[key] = {"key": key, "text": text, "seconds": seconds}
                append_lines(path, [known[key]])
            used[key] = known[key]["seconds"]
            return str(known[key]["text"])

        tuned = tune(
            asked, questions, candidates, stage=f"tune {name}", on_progress=self.on_progress
        )
        best = candidates.index(tuned.best)
        return {"seconds": sum(used.values()), "best": best, "tried": _told(tuned)}

    # What answers depend on, and what was done before.

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the answers of the base model depend on."""
        return {
            "base_model": self.memory.model.backbone.reference.weights[:16],
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.memory.model.base.dtype),
            "device": str(self.memory.model.device),
        }

    @property
    def memory_settings(self) -> dict[str, Any]:
        """What the answers of the memory depend on."""
        return self.model_settings | {
            "memory": self.manifest.files[WEIGHTS]["sha256"][:16],
            "lambda": self.memory.model.memory_lambda,
            "encoder": self.memory.model.config.encoder if self.memory.encoder else None,
        }

    def retrieval_settings(self, arm: str) -> dict[str, Any]:
        """What the passages found depend on."""
        return {
            "corpus": self.documents(arm).fingerprint[:16],
            "embedding": self.embedding.model_name,
        }

    @property
    def memory_setup(self) -> Setup:
        """The training, from the memory's own manifest; one that does not tell has no steps."""
        names = (CONFIG, WEIGHTS, MANIFEST, CARD, *self.manifest.encoder_files)
        size = sum(p.stat().st_size for name in names if (p := self.folder / name).is_file())
        seconds = self.manifest.figures.get("total_seconds")
        steps = {} if seconds is None else {"training": float(seconds)}
        return Setup(steps, fixed={"memory": size}, trained=bool(steps))


def sentence_encoder(memory: MemoryModel) -> QueryEncoder:
    """What finds passages: the encoder that the memory's began as, or MiniLM.

    What that has become finds questions better, but the documents of whole passages worse
    (docs/experiments.md).
    """
    own, first = memory.encoder, memory.model.config.encoder
    if isinstance(own, SentenceEncoder):
        if own.name == first:
            return own
        try:
            return load_encoder(first, memory.model.backbone) or own
        except (ConfigError, MissingDependencyError):
            return own  # where it began is a folder, or a package, that has gone
    from sentence_transformers import SentenceTransformer

    path = str(embedded_model_path(MINILM))
    return SentenceEncoder(MINILM, SentenceTransformer(path, device=str(memory.model.device)))


def _plain(settings: Sequence[Any]) -> list[Any]:
    return [asdict(s) if is_dataclass(s) and not isinstance(s, type) else s for s in settings]


def _told(tuned: Tuned[S]) -> list[dict[str, Any]]:
    def told(tried: Tried[S]) -> dict[str, Any]:
        figures = {"f1": tried.f1, "em": tried.em, "n": tried.n}
        return {"setting": _plain([tried.setting])[0], **figures}

    return [told(tried) for tried in tuned.tried]
