"""RAG's best setting, chosen on written questions, never on those that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlpmem_eval.questions import EvalQuestion
from mlpmem_eval.rag import FEW_SHOT, NATIVE, QUOTED, RagSetting
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.scoring import token_f1

CANDIDATES = (
    RagSetting(1, 25, FEW_SHOT),
    RagSetting(1, 50, FEW_SHOT),
    RagSetting(1, 100, FEW_SHOT),
    RagSetting(1, 0, FEW_SHOT),
    RagSetting(2, 25, FEW_SHOT),
    RagSetting(2, 50, FEW_SHOT),
    RagSetting(3, 25, FEW_SHOT),
    RagSetting(3, 50, FEW_SHOT),
    RagSetting(1, 50, QUOTED),
    RagSetting(1, 50, NATIVE),
    RagSetting(2, 100, NATIVE),
    RagSetting(3, 50, NATIVE),
)
QUESTIONS = 48
"""How many are written for the search."""

FIRST_SHARE = 6
"""All candidates are tried on one question in so many; the better half on the next, and so on."""

AskSetting = Callable[[RagSetting, str], str]


@dataclass(frozen=True)
class Tried:
    """A candidate with the mean F1 it reached, and on how many questions."""

    setting: RagSetting
    f1: float
    n: int


@dataclass(frozen=True)
class Tuned:
    """The best setting, and all that were tried (best first)."""

    best: RagSetting
    tried: tuple[Tried, ...]


def tune(
    ask: AskSetting,
    questions: Sequence[EvalQuestion],
    candidates: Sequence[RagSetting] = CANDIDATES,
    *,
    on_progress: OnProgress = ignore_progress,
) -> Tuned:
    """Successive halving: after every round the worse half is left out.

    Args:
        ask: answers a question with a setting.
        questions: written ones.
        candidates: settings to try, of which an earlier one wins a tie.
        on_progress: called after every answer.
    """
    rounds = max(1, math.ceil(math.log2(len(candidates))))
    first = max(1, len(questions) // FIRST_SHARE)
    ends = [min(len(questions), first * 2**n) for n in range(rounds)]
    alive = list(candidates)
    total = _planned(len(alive), ends)
    scores: dict[RagSetting, list[float]] = {setting: [] for setting in alive}
    done = 0
    for end in ends:
        for setting in alive:
            for question in questions[len(scores[setting]) : end]:
                answer = ask(setting, question.text)
                scores[setting].append(token_f1(answer, question.answers))
                done += 1
                on_progress(ProgressEvent("tune rag", done, total, "answers"))
        alive = sorted(alive, key=lambda s: -_mean(scores[s]))[: -(-len(alive) // 2)]
    tried = [Tried(setting, _mean(f1), len(f1)) for setting, f1 in scores.items()]
    # A candidate of a later round was better in all rounds before, whatever its mean is now.
    order = sorted(tried, key=lambda t: (t.setting != alive[0], -t.n, -t.f1))
    return Tuned(alive[0], tuple(order))


def _planned(candidates: int, ends: Sequence[int]) -> int:
    total, before = 0, 0
    for end in ends:
        total += candidates * (end - before)
        candidates, before = -(-candidates // 2), end
    return total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
