"""Accuracy of answers on a set of questions: base model, RAG and memory, with the same LM.

    python -m benchmarks.answers CORPUS QUESTIONS --memory DIR --arms base,rag,memory

QUESTIONS is jsonl: `question`, `answers`, `doc_ids`, and `answerable` (true where it is missing).
All arms: greedy, at most 24 new tokens, the same prompt budget, intervals by bootstrap over
questions. RAG is searched for its best setting on the very questions it is measured on, which
favours it; the memory has been chosen on nothing of them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from mlpmem_rag.answering import answer_batch
from mlpmem_rag.corpus import Document, read_corpus
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.passages import passages
from mlpmem_rag.reading import EXAMPLES, agreed_answers, read_batch, reading_prompt
from mlpmem_rag.scoring import exact_match, token_f1

NEW_TOKENS = 24
LLAMA_INDEX = (
    "Context information is below.\n---------------------\n{context}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\n"
    "Query: {question}\nAnswer: "
)
"""The default text-QA prompt of LlamaIndex."""


@dataclass(frozen=True)
class RagSetting:
    """Passages in the prompt, words in a passage (0: whole documents), form of the prompt."""

    k: int
    words: int
    prompt: str


SEARCHED = (
    *(
        RagSetting(k, w, "few-shot")
        for k, w in ((1, 0), (1, 50), (1, 25), (2, 50), (2, 25), (3, 25))
    ),
    RagSetting(1, 50, "quoted"),
    RagSetting(1, 25, "quoted"),
    RagSetting(2, 0, "llama-index"),
)


@dataclass(frozen=True)
class Item:
    """One question of the set."""

    question: str
    answers: tuple[str, ...]
    answerable: bool


@dataclass(frozen=True)
class Figures:
    """What an arm reached; intervals are 95 %."""

    n: int
    em: float
    em_interval: tuple[float, float]
    f1: float
    f1_interval: tuple[float, float]
    seconds_per_question: float


def load_items(path: Path, hops: int | None = None) -> list[Item]:
    """Read a question file; with `hops`, only the rows of so many reasoning steps."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    kinds = {"job", "hobby", "dob", "mother", "father", "wife", "husband"}
    if hops is not None:
        rows = [row for row in rows if row.get("hops") == hops and row.get("type") in kinds]
    return [Item(r["question"], tuple(r["answers"]), r.get("answerable", True)) for r in rows]


def interval(values: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def scored(items: Sequence[Item], answers: Sequence[str]) -> tuple[Any, Any]:
    """Exact match and F1 of every answer. *Shapes:* (N,), (N,)."""
    pairs = list(zip(items, answers, strict=True))
    em = np.array([exact_match(answer, item.answers) for item, answer in pairs], dtype=float)
    f1 = np.array([token_f1(answer, item.answers) for item, answer in pairs])
    return em, f1


def figures(items: Sequence[Item], answers: Sequence[str], seconds: float) -> Figures:
    """An arm's answers in figures."""
    em, f1 = scored(items, answers)
    return Figures(
        len(items),
        float(em.mean()),
        interval(em),
        float(f1.mean()),
        interval(f1),
        seconds / len(items),
    )


def quoted(question: str, found: Sequence[str]) -> str:
    """The examples in another form."""
    shots = "".join(f"{c}\n\nQ: {q}\nA: {a}\n\n###\n\n" for c, q, a in EXAMPLES)
    context = "\n".join(found)
    return f"{shots}{context}\n\nQ: {question}\nA:"


def llama_index(memory: MemoryModel, question: str, found: Sequence[str]) -> str:
    """LlamaIndex's default prompt in the model's chat template."""
    text = LLAMA_INDEX.format(context="\n\n".join(found), question=question)
    message = [{"role": "user", "content": text}]
    tokenizer: Any = memory.tokenizer
    return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


class Retriever:
    """Passages of a corpus by cosine similarity of sentence embeddings."""

    def __init__(self, memory: MemoryModel, documents: Sequence[Document], words: int) -> None:
        if memory.encoder is None:
            raise typer.BadParameter("the memory has no sentence encoder to retrieve with")
        self._encoder = memory.encoder
        self.texts = [
            passage
            for document in documents
            for passage in (passages(document.text, words) if words else [document.text])
        ]
        self._vectors = self._encoder.encode(self.texts)

    def find(self, questions: Sequence[str], k: int) -> list[list[str]]:
        """The k nearest passages of each question."""
        similarity = self._encoder.encode(questions) @ self._vectors.T
        order = np.argsort(-similarity, axis=1)[:, :k]
        return [[self.texts[n] for n in row] for row in order]


def rag_prompt(memory: MemoryModel, setting: RagSetting, question: str, found: list[str]) -> str:
    """The prompt of one question."""
    if setting.prompt == "llama-index":
        return llama_index(memory, question, found)
    form = {"few-shot": reading_prompt, "quoted": quoted}[setting.prompt]
    return form(question, found)


def run(
    corpus: Path,
    questions: Path,
    memory: Annotated[Path, typer.Option(help="A trained memory; base model and encoder are its.")],
    arms: str = "base,rag,memory",
    hops: int | None = None,
    device: str = "auto",
    base_model: str | None = None,
    out: Annotated[Path | None, typer.Option(help="Write all figures and answers as JSON.")] = None,
) -> None:
    """Measure the arms and print a table."""
    model = MemoryModel.load(memory, device=device, base_model=base_model)
    documents = read_corpus(corpus).documents
    everything = load_items(questions, hops)
    items = [item for item in everything if item.answerable]
    asked = [item.question for item in items]
    wanted = arms.split(",")
    results: dict[str, Figures] = {}
    answers: dict[str, list[str]] = {}
    notes: dict[str, Any] = {"hardware": str(model.model.device), "memory": str(memory)}

    if "base" in wanted:
        started = time.perf_counter()
        prompts = [reading_prompt(question, []) for question in asked]
        answers["base"] = read_batch(model.model, model.tokenizer, prompts)
        results["base"] = figures(items, answers["base"], time.perf_counter() - started)
    best: tuple[RagSetting, list[str]] | None = None
    if "rag" in wanted:
        searched = {}
        for setting in SEARCHED:
            retriever = Retriever(model, documents, setting.words)
            started = time.perf_counter()
            near = retriever.find(asked, setting.k)
            prompts = [
                rag_prompt(model, setting, question, found)
                for question, found in zip(asked, near, strict=True)
            ]
            texts = read_batch(model.model, model.tokenizer, prompts)
            reached = figures(items, texts, time.perf_counter() - started)
            searched[str(asdict(setting))] = asdict(reached)
            if best is None or reached.f1 > results["rag"].f1:
                best, results["rag"], answers["rag"] = (setting, prompts), reached, texts
        notes["rag"] = {"best": asdict(best[0]) if best else None, "searched": searched}
    vectors = (
        model.encoder.encode([item.question for item in everything]) if model.encoder else None
    )
    if "memory" in wanted:
        started = time.perf_counter()
        replies = answer_batch(
            model.model,
            model.tokenizer,
            [item.question for item in everything],
            vectors,
            max_new_tokens=NEW_TOKENS,
        )
        seconds = (time.perf_counter() - started) * len(items) / len(everything)
        chosen = [r for r, item in zip(replies, everything, strict=True) if item.answerable]
        answers["memory"] = [text for text, _ in chosen]
        results["memory"] = figures(items, answers["memory"], seconds)
        notes["auroc"] = confidence_figures(model, everything, replies)
    if "memory+rag" in wanted and best is not None and vectors is not None:
        started = time.perf_counter()
        own = vectors[[n for n, item in enumerate(everything) if item.answerable]]
        answers["memory+rag"] = agreed_answers(
            model.model,
            model.tokenizer,
            asked,
            own,
            best[1],
            answers["memory"],
            answers["rag"],
        )
        seconds = time.perf_counter() - started
        results["memory+rag"] = figures(items, answers["memory+rag"], seconds)
    show(results, notes)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "arms": {name: asdict(result) for name, result in results.items()},
            "notes": notes,
            "answers": answers,
        }
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def confidence_figures(
    model: MemoryModel, items: Sequence[Item], replies: Sequence[Any]
) -> dict[str, float]:
    """AUROC of the confidence: right against wrong, answerable against unanswerable."""
    from sklearn.metrics import roc_auc_score

    if model.confidence is None:
        return {}
    sure = np.array([model.confidence.of(trace) for _, trace in replies])
    answerable = np.array([item.answerable for item in items])
    right = np.array(
        [exact_match(text, i.answers) for i, (text, _) in zip(items, replies, strict=True)]
    )
    out = {}
    if len(set(right[answerable])) > 1:
        out["right"] = float(roc_auc_score(right[answerable], sure[answerable]))
    if len(set(answerable)) > 1:
        out["answerable"] = float(roc_auc_score(answerable, sure))
    return out


def show(results: dict[str, Figures], notes: dict[str, Any]) -> None:
    """Print the figures."""
    table = Table("arm", "n", "EM", "95 %", "F1", "95 %", "s/question")
    for name, f in results.items():
        em, f1 = (f"{a:.3f}–{b:.3f}" for a, b in (f.em_interval, f.f1_interval))
        speed = f"{f.seconds_per_question:.3f}"
        table.add_row(name, str(f.n), f"{f.em:.3f}", em, f"{f.f1:.3f}", f1, speed)
    console = Console()
    console.print(table)
    console.print(re.sub(r"'searched': \{.*\}\}", "", str(notes)), highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(run)
