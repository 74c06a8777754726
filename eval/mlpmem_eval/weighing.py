"""The memory against RAG on questions that it had not learned, to find who is asked when."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_index.indices.managed.mlpmem.hybrid import best_threshold
from mlpmem_eval.answerers import Answerer
from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.taught import taught_questions
from mlpmem_rag.artifact import WORK
from mlpmem_rag.calibrate import Calibration, HeldOutAnswer
from mlpmem_rag.questions import accepted_answers
from mlpmem_rag.scoring import exact_match


def held_out_answers(folder: Path) -> list[tuple[EvalQuestion, HeldOutAnswer]]:
    """What the training of a memory kept of its calibration, in the order of the documents.

    Nothing where `work/` is gone or of another training.
    """
    kept = folder / WORK / "calibration" / "calibration.json"
    questions = taught_questions(folder)
    if questions is None or not kept.is_file():
        return []
    answers = Calibration.from_dict(json.loads(kept.read_text(encoding="utf-8"))).answers
    accepted = accepted_answers(questions)
    numbers = [answer.question for answer in answers]
    asked = [EvalQuestion(str(n), questions[n].text, tuple(accepted[n])) for n in numbers]
    return list(zip(asked, answers, strict=True))


def weigh(held_out: Sequence[tuple[EvalQuestion, HeldOutAnswer]], rag: Answerer) -> dict[str, Any]:
    """The threshold with the most right answers, by exact match, and what it gives."""
    started = time.perf_counter()
    read = [float(exact_match(rag.answer(q.text).text, q.answers)) for q, _ in held_out]
    fit = best_threshold(
        [answer.confidence for _, answer in held_out],
        [float(answer.right) for _, answer in held_out],
        read,
    )
    return {"seconds": time.perf_counter() - started, **asdict(fit), "n": len(held_out)}
