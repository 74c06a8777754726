"""The arms of the command line, by name: all on one loaded base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.indices.managed.mlpmem import (
    MemoryFirstQueryEngine,
    MemoryRAGQueryEngine,
    MLPMemIndex,
    RecallQueryEngine,
)
from llama_index.llms.mlpmem import MLPMemLLM
from mlpmem_eval.answerers import Answerer, ChatAnswerer, PromptAnswerer, QueryEngineAnswerer
from mlpmem_eval.cost import TUNING, Setup
from mlpmem_eval.knn import LAMBDAS, open_teacher
from mlpmem_eval.lora import LoraSettings, fine_tuned
from mlpmem_eval.rag import FEW_SHOT, NATIVE, Indexed, native_engine
from mlpmem_eval.taught import taught_questions
from mlpmem_eval.twin import sharing_base, with_own_base
from mlpmem_eval.workbench import Workbench
from mlpmem_rag.artifact import WORK
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.questions import Question
from mlpmem_rag.reading import reading_prompt
from mlpmem_rag.storage import folder_bytes
from mlpmem_rag.writers import write_questions


@dataclass(frozen=True)
class Arm:
    """What answers, and what it took before it could."""

    answerer: Answerer
    setup: Setup = field(default_factory=Setup)


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
    return Arm(PromptAnswerer("base", bench.plain_llm(), lambda q: reading_prompt(q, []), settings))


def _rag(bench: Workbench) -> Arm:
    indexed = bench.index("rag", None)
    engine = native_engine(indexed.index, bench.chat_llm(0.0))
    settings = bench.model_settings | bench.retrieval_settings("rag") | {"prompt": NATIVE}
    return Arm(QueryEngineAnswerer("rag", engine, settings), _index_setup(indexed))


def _rag_tuned(bench: Workbench) -> Arm:
    name = "rag-tuned"
    bench.documents(name)
    setting, seconds = bench.tuned_rag
    indexed = bench.index(name, setting.words)
    return Arm(bench.rag_answerer(name, setting), _index_setup(indexed, {TUNING: seconds}))


def _memory(bench: Workbench) -> Arm:
    return Arm(ChatAnswerer("memory", bench.chat_llm(), bench.memory_settings), bench.memory_setup)


def _memory_and_rag(bench: Workbench) -> Arm:
    name = "memory+rag"
    bench.documents(name)
    setting, seconds = bench.tuned_rag
    indexed = bench.index(name, setting.words)
    retriever = indexed.index.as_retriever(similarity_top_k=setting.k)
    settings = (
        bench.memory_settings
        | bench.retrieval_settings(name)
        | {"k": setting.k, "words": setting.words, "prompt": FEW_SHOT}
    )
    engine = MemoryRAGQueryEngine(bench.chat_llm(), retriever)
    return Arm(
        QueryEngineAnswerer(name, engine, settings),
        _together(bench.memory_setup, _index_setup(indexed, {TUNING: seconds})),
    )


def _recall(bench: Workbench) -> Arm:
    index = MLPMemIndex.from_memory(bench.folder, llm=bench.chat_llm())
    engine = RecallQueryEngine(bench.chat_llm(), index.as_recall_retriever())
    settings = bench.memory_settings | {"recalled_sentences": 1, "prompt": FEW_SHOT}
    return Arm(QueryEngineAnswerer("recall", engine, settings), bench.memory_setup)


def _memory_first(bench: Workbench) -> Arm:
    name = "memory-first"
    bench.documents(name)
    setting, seconds = bench.tuned_rag
    rag = bench.rag_answerer(name, setting)
    threshold, fitting = bench.memory_first_threshold
    engine = MemoryFirstQueryEngine(bench.memory_engine, rag.engine, threshold)
    settings = bench.memory_settings | rag.settings | {"threshold": threshold}
    indexed = bench.index(name, setting.words)
    return Arm(
        QueryEngineAnswerer(name, engine, settings),
        _together(bench.memory_setup, _index_setup(indexed, {TUNING: seconds + fitting})),
    )


def _knn(bench: Workbench) -> Arm:
    name = "knn"
    bench.documents(name)  # questions to choose lambda on are written from them
    teacher = open_teacher(bench.folder, bench.manifest, bench.memory.model.memory)
    twin = sharing_base(bench.memory, teacher, LAMBDAS[0])

    def answerer(weight: float, settings: dict[str, Any]) -> ChatAnswerer:
        llm = MLPMemLLM.from_model(twin, lambda_=weight, max_new_tokens=bench.max_new_tokens)
        return ChatAnswerer(name, llm, settings | {"lambda": weight})

    settings = bench.memory_settings | {"tau": teacher.tau, "k": teacher.k}
    weight, seconds = bench.search(
        name, LAMBDAS, lambda w, question: answerer(w, {}).answer(question).text, settings
    )
    stages = bench.manifest.figures.get("seconds", {})
    done = {"datastore": float(stages.get("datastore", 0.0)), TUNING: seconds}
    stored = folder_bytes(bench.folder / WORK / "datastore")
    return Arm(answerer(weight, settings), Setup(done, grows={"datastore": stored}))


def _lora(bench: Workbench) -> Arm:
    name = "lora"
    corpus = bench.documents(name)
    budget = bench.memory_setup.total_seconds
    if not budget:
        raise ConfigError(
            f"the arm {name!r} gets as long as the memory's training took, which {bench.folder} "
            "does not tell; leave it out, or train the memory with mlpmem-rag train"
        )
    twin = with_own_base(bench.memory)
    tuned = fine_tuned(
        twin.model.base,
        twin.tokenizer,
        corpus,
        _taught(bench),
        LoraSettings(seed=bench.seed),
        bench.work / "lora",
        budget_seconds=budget,
        on_progress=bench.on_progress,
    )
    llm = MLPMemLLM.from_model(twin, lambda_=0.0, max_new_tokens=bench.max_new_tokens)
    settings = bench.model_settings | tuned.settings
    setup = Setup({"training": tuned.seconds}, fixed={"adapter": tuned.num_bytes}, trained=True)
    return Arm(ChatAnswerer(name, llm, settings), setup)


def _taught(bench: Workbench) -> list[Question]:
    """What the memory was taught; where training left nothing, what the same rules write.

    Then without the evaluation questions, which may have been written by these rules as well.
    """
    if bench.manifest.training.get("recipe") == "paper":
        return []
    taught = taught_questions(bench.folder)
    if taught is not None:
        return taught
    written = write_questions(["rules"], bench.documents("lora").documents, None)
    return [question for question in written if question.text not in bench.asked]


def _index_setup(indexed: Indexed, more: dict[str, float] | None = None) -> Setup:
    return Setup({"index": indexed.seconds, **(more or {})}, grows={"index": indexed.num_bytes})


def _together(memory: Setup, rag: Setup) -> Setup:
    return Setup({**memory.seconds, **rag.seconds}, rag.grows, memory.fixed, trained=True)


ARMS: dict[str, Callable[[Workbench], Arm]] = {
    "base": _base,
    "rag": _rag,
    "rag-tuned": _rag_tuned,
    "memory": _memory,
    "recall": _recall,
    "memory+rag": _memory_and_rag,
    "memory-first": _memory_first,
    "knn": _knn,
    "lora": _lora,
}
