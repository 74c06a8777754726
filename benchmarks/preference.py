"""Is the right answer preferred to a hallucinated one? By probability a token (HaluEval).

    python -m benchmarks.preference CORPUS QUESTIONS --memory DIR

QUESTIONS is jsonl: `question`, `answers`, `hallucinated_answer`. Arms: base model closed-book,
RAG (the nearest document in the prompt), memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.answers import Retriever, interval
from mlpmem_rag.corpus import read_corpus
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.reading import answer_log_probs


def run(
    corpus: Path,
    questions: Path,
    memory: Annotated[Path, typer.Option(help="A memory of the corpus.")],
    device: str = "auto",
) -> None:
    """Print the share of questions whose right answer is more probable, for each arm."""
    model = MemoryModel.load(memory, device=device)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    asked = [str(row["question"]).strip() for row in rows]
    pairs = [(str(row["answers"][0]), str(row["hallucinated_answer"])) for row in rows]
    found = Retriever(model, read_corpus(corpus).documents, 0).find(asked, 1)
    vectors = model.encoder.encode(asked) if model.encoder else None
    bare = [_prompt(model, question) for question in asked]
    with_passage = [
        _prompt(model, f"{passage[0]}\n\n{question}")
        for passage, question in zip(found, asked, strict=True)
    ]
    arms: dict[str, tuple[list[list[int]], float | None]] = {
        "base": (bare, 0.0),
        "RAG": (with_passage, 0.0),
        "memory": (bare, None),
    }
    for name, (prompts, lambda_) in arms.items():
        means = [
            _mean_log_probs(model, prompts, [p[n] for p in pairs], vectors, lambda_) for n in (0, 1)
        ]
        right = (means[0] > means[1]).astype(float)
        low, high = interval(right)
        typer.echo(f"{name}: {right.mean():.3f}, 95 % [{low:.3f}, {high:.3f}], n {len(right)}")


def _prompt(model: MemoryModel, text: str) -> list[int]:
    return prompt_ids(model.tokenizer, [{"role": "user", "content": text}])


def _mean_log_probs(
    model: MemoryModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    vectors: Any,  # noqa: ANN401
    lambda_: float | None,
) -> Any:  # noqa: ANN401
    ids = [answer_ids(model.tokenizer, answer) for answer in answers]
    totals = answer_log_probs(model.model, prompts, ids, vectors, lambda_=lambda_)
    return totals / np.array([len(answer) for answer in ids])


if __name__ == "__main__":
    typer.run(run)
