"""Is the right answer preferred to a hallucinated one? By mean log-probability a token (HaluEval).

Li et al., arXiv 2305.11747. Nothing is generated: both answers are given, and their tokens scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mlpmem_eval.questions import question_rows
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import Prompt, answer_ids, prompt_ids
from mlpmem_rag.reading import answer_log_probs

Floats = npt.NDArray[np.float64]
HALLUCINATED = "hallucinated_answer"


@dataclass(frozen=True)
class Choice:
    """A question with its right answer and a made-up one."""

    question: str
    right: str
    hallucinated: str


def load_choices(path: Path) -> list[Choice]:
    """Rows of a file of questions that have a `hallucinated_answer` beside their answers.

    Raises:
        ConfigError: the file cannot be read.
    """
    choices = []
    for row in question_rows(path):
        question, wrong = row.get("question"), row.get(HALLUCINATED)
        given = row.get("answers") or row.get("answer")
        answer = given[0] if isinstance(given, list) else given
        answer = str(answer) if isinstance(answer, int | float) else answer
        texts = [text.strip() for text in (question, answer, wrong) if isinstance(text, str)]
        if len(texts) == 3 and all(texts):
            choices.append(Choice(*texts))
    return choices


def prefers_right(
    memory: MemoryModel,
    choices: Sequence[Choice],
    passages: Sequence[str] | None = None,
    *,
    on_progress: OnProgress = ignore_progress,
) -> Mapping[str, Floats]:
    """1 where the right answer is the more probable one, for each arm. *Shape:* (N,) each.

    Args:
        memory: with its base model.
        choices: what there is to choose from.
        passages: for each question the text that RAG puts before it; None: no arm `rag`.
        on_progress: called after every question and arm.
    """
    asked = [choice.question for choice in choices]
    arms: dict[str, tuple[list[str], float | None]] = {
        "base": (asked, 0.0),
        "memory": (asked, None),
    }
    if passages is not None:
        read = [f"{text}\n\n{question}" for text, question in zip(passages, asked, strict=True)]
        arms = {"base": arms["base"], "rag": (read, 0.0), "memory": arms["memory"]}
    out = {name: np.zeros(len(choices)) for name in arms}
    for number, choice in enumerate(choices):
        for place, (name, (prompts, lambda_)) in enumerate(arms.items()):
            vector = memory.query_vector(choice.question)
            right, wrong = (
                _mean_log_prob(memory, prompts[number], answer, vector, lambda_)
                for answer in (choice.right, choice.hallucinated)
            )
            out[name][number] = right > wrong
            done = number * len(arms) + place + 1
            on_progress(ProgressEvent("preference", done, len(choices) * len(arms), "questions"))
    return out


def _mean_log_prob(
    memory: MemoryModel,
    prompt: str,
    answer: str,
    vector: Tensor | None,
    lambda_: float | None,
) -> float:
    tokens = answer_ids(memory.tokenizer, answer)
    messages = [{"role": "user", "content": prompt}]
    room = memory.room_for_prompt(len(tokens))
    asked = Prompt(prompt_ids(memory.tokenizer, messages)).within(room)
    return float(answer_log_probs(memory.model, asked, tokens, vector, lambda_=lambda_).mean())
