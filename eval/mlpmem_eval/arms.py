"""The arms of the command line, by name: all on one loaded base model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_index.core.llms import LLM

from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_eval.agreed import AgreedAnswerer
from mlpmem_eval.answerers import Answerer, ChatAnswerer, PromptAnswerer, QueryEngineAnswerer
from mlpmem_eval.cost import Setup
from mlpmem_eval.embedding import EncoderEmbedding
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import (
    NATIVE,
    Indexed,
    RagSetting,
    native_engine,
    native_index,
    passage_index,
    tuned_engine,
)
from mlpmem_eval.rows import row_key
from mlpmem_eval.tuning import CANDIDATES, Tried, Tuned, tune
from mlpmem_rag.artifact import CARD, CONFIG, MANIFEST, WEIGHTS, Manifest
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.embedded import MINILM, embedded_model_path
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import OnProgress, ignore_progress
from mlpmem_rag.query import QueryEncoder, SentenceEncoder
from mlpmem_rag.reading import reading_prompt
from mlpmem_rag.storage import write_json

STOP = "\n"


@dataclass(frozen=True)
class Arm:
    """What answers, and what it took before it could."""

    answerer: Answerer
    setup: Setup


@dataclass
class Workbench:
    """What arms are made from; what several of them need is made once.

    Attributes:
        memory: the memory on its base model, loaded.
        folder: it was loaded from.
        manifest: of it.
        work: a folder for indexes and the search.
        corpus: the documents; None: no arm that reads them can be made.
        max_new_tokens: most tokens of an answer, the same for every arm.
        tuning_questions: written questions to choose RAG's setting on, when they are needed.
        encoder: finds passages; None: the memory's own, or MiniLM.
        on_progress: called often.
    """

    memory: MemoryModel
    folder: Path
    manifest: Manifest
    work: Path
    corpus: Corpus | None = None
    max_new_tokens: int = 24
    tuning_questions: Callable[[], Sequence[EvalQuestion]] = field(default=list)
    encoder: QueryEncoder | None = None
    on_progress: OnProgress = ignore_progress
    _indexes: dict[int | None, Indexed] = field(default_factory=dict)

    def chat_llm(self, lambda_: float | None = None) -> LLM:
        """The model, asked with messages in its chat template."""
        return MLPMemLLM.from_model(
            self.memory, lambda_=lambda_, max_new_tokens=self.max_new_tokens
        )

    def plain_llm(self) -> LLM:
        """The base model, continuing a line of text as it stands."""
        return MLPMemLLM.from_model(
            self.memory,
            lambda_=0.0,
            max_new_tokens=self.max_new_tokens,
            is_chat_model=False,
            stop=[STOP],
        )

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

    @cached_property
    def tuned(self) -> tuple[Tuned, float]:
        """RAG's best setting on written questions, and the seconds of the search."""
        questions = list(self.tuning_questions())
        if not questions:
            raise ConfigError(
                "no questions could be written from the corpus to tune RAG on; leave out the "
                "arms that need them, rag-tuned and memory+rag"
            )
        asked = EvalQuestion("tuning", json.dumps([[q.text, *q.answers] for q in questions]), ())
        key = row_key(
            {"candidates": [asdict(c) for c in CANDIDATES], "model": self.model_settings}
            | self.retrieval_settings("rag-tuned"),
            asked,
        )
        path = self.work / "tuning.json"
        if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
            return _tuned_from(found), float(found["seconds"])
        started = time.perf_counter()
        tuned = tune(self._ask, questions, on_progress=self.on_progress)
        seconds = time.perf_counter() - started
        write_json(path, {"key": key, "seconds": seconds, **asdict(tuned)})
        return tuned, seconds

    def _ask(self, setting: RagSetting, question: str) -> str:
        return self.rag_answerer("tuning", setting).answer(question).text

    def rag_answerer(self, name: str, setting: RagSetting) -> QueryEngineAnswerer:
        """RAG of a setting."""
        index = self.index(name, setting.words).index
        engine = tuned_engine(index, setting, self.chat_llm(0.0), self.plain_llm())
        settings = self.model_settings | self.retrieval_settings(name) | asdict(setting)
        return QueryEngineAnswerer(name, engine, settings, first_line=setting.prompt != NATIVE)

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the answers of the base model depend on."""
        base = self.manifest.training
        return {
            "base_model": base.get("base_model"),
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
            "encoder": self.memory.encoder.name if self.memory.encoder else None,
        }

    def retrieval_settings(self, arm: str) -> dict[str, Any]:
        """What the passages found depend on."""
        return {
            "corpus": self.documents(arm).fingerprint[:16],
            "embedding": self.embedding.model_name,
        }

    @property
    def memory_setup(self) -> Setup:
        """The training, from the memory's own manifest."""
        names = (CONFIG, WEIGHTS, MANIFEST, CARD)
        size = sum(p.stat().st_size for name in names if (p := self.folder / name).is_file())
        seconds = float(self.manifest.figures.get("total_seconds", 0.0))
        return Setup({"training": seconds}, fixed={"memory": size}, trained=True)


def sentence_encoder(memory: MemoryModel) -> QueryEncoder:
    """The memory's own encoder where it is one of sentences, else MiniLM."""
    if isinstance(memory.encoder, SentenceEncoder):
        return memory.encoder
    from sentence_transformers import SentenceTransformer

    path = str(embedded_model_path(MINILM))
    return SentenceEncoder(MINILM, SentenceTransformer(path, device=str(memory.model.device)))


def make_arms(names: Sequence[str], bench: Workbench) -> list[Arm]:
    """The arms of these names, in this order.

    Raises:
        ConfigError: a name that is not known or given twice, or the documents are missing.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown or len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"arms {', '.join(names) or 'none'}: allowed are {', '.join(ARMS)}, each once"
        )
    return [ARMS[name](bench) for name in names]


def _base(bench: Workbench) -> Arm:
    settings = bench.model_settings | {"prompt": "few-shot, closed-book"}
    return Arm(
        PromptAnswerer("base", bench.plain_llm(), lambda q: reading_prompt(q, []), settings),
        Setup(),
    )


def _rag(bench: Workbench) -> Arm:
    indexed = bench.index("rag", None)
    engine = native_engine(indexed.index, bench.chat_llm(0.0))
    settings = bench.model_settings | bench.retrieval_settings("rag") | {"prompt": NATIVE}
    return Arm(QueryEngineAnswerer("rag", engine, settings), _index_setup(indexed))


def _rag_tuned(bench: Workbench) -> Arm:
    bench.documents("rag-tuned")
    tuned, seconds = bench.tuned
    answerer = bench.rag_answerer("rag-tuned", tuned.best)
    indexed = bench.index("rag-tuned", tuned.best.words)
    return Arm(answerer, _index_setup(indexed, {"tuning": seconds}))


def _memory(bench: Workbench) -> Arm:
    return Arm(ChatAnswerer("memory", bench.chat_llm(), bench.memory_settings), bench.memory_setup)


def _memory_and_rag(bench: Workbench) -> Arm:
    name = "memory+rag"
    bench.documents(name)
    setting = bench.tuned[0].best
    indexed = bench.index(name, setting.words)
    settings = (
        bench.memory_settings
        | bench.retrieval_settings(name)
        | {"k": setting.k, "words": setting.words, "prompt": "few-shot"}
    )
    retriever = indexed.index.as_retriever(similarity_top_k=setting.k)
    mine, its = bench.memory_setup, _index_setup(indexed, {"tuning": bench.tuned[1]})
    return Arm(
        AgreedAnswerer(name, bench.memory, retriever, bench.max_new_tokens, settings),
        Setup({**mine.seconds, **its.seconds}, its.grows, mine.fixed, trained=True),
    )


def _index_setup(indexed: Indexed, more: dict[str, float] | None = None) -> Setup:
    return Setup({"index": indexed.seconds, **(more or {})}, grows={"index": indexed.num_bytes})


def _tuned_from(found: dict[str, Any]) -> Tuned:
    tried = [Tried(RagSetting(**t["setting"]), t["f1"], t["n"]) for t in found["tried"]]
    return Tuned(RagSetting(**found["best"]), tuple(tried))


ARMS: dict[str, Callable[[Workbench], Arm]] = {
    "base": _base,
    "rag": _rag,
    "rag-tuned": _rag_tuned,
    "memory": _memory,
    "memory+rag": _memory_and_rag,
}
