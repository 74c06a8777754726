"""Settings of an arm, chosen on written questions, never on those that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlpmem_eval.questions import EvalQuestion
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.scoring import exact_match, token_f1

QUESTIONS = 48
"""How many are written for a search."""

FIRST_SHARE = 6
"""All candidates are tried on one question in so many; the better half on the next, and so on."""

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Tried(Generic[S]):
    """A candidate: its mean F1, how often it was right, and on how many questions."""

    setting: S
    f1: float
    em: float
    n: int


@dataclass(frozen=True)
class Tuned(Generic[S]):
    """The best setting, and all that were tried (best first)."""

    best: S
    tried: tuple[Tried[S], ...]


def tune(
    ask: Callable[[S, str], str],
    questions: Sequence[EvalQuestion],
    candidates: Sequence[S],
    *,
    stage: str = "tuning",
    on_progress: OnProgress = ignore_progress,
) -> Tuned[S]:
    """Successive halving of all but the first candidate, which the best of them has to beat.

    After every round the worse half is left out, by the sum of F1 and exact match. Few questions
    tell settings apart only roughly, so the first candidate, one that is good elsewhere, is asked
    all of them.

    Args:
        ask: answers a question with a setting.
        questions: written ones.
        candidates: settings to try, the one to keep in doubt first.
        stage: name of the progress.
        on_progress: called after every answer.
    """
    favourite, *rivals = candidates
    rounds = max(1, math.ceil(math.log2(len(candidates))))
    first = max(1, len(questions) // FIRST_SHARE)
    ends = [min(len(questions), first * 2**n) for n in range(rounds - 1)] + [len(questions)]
    total = _planned(len(rivals), ends)
    scores: dict[S, list[float]] = {setting: [] for setting in candidates}
    right: dict[S, list[float]] = {setting: [] for setting in candidates}
    done = 0

    def score(setting: S) -> float:
        return _mean(scores[setting]) + _mean(right[setting])

    for end in ends:
        for setting in (favourite, *rivals):
            for question in questions[len(scores[setting]) : end]:
                answer = ask(setting, question.text)
                scores[setting].append(token_f1(answer, question.answers))
                right[setting].append(float(exact_match(answer, question.answers)))
                done += 1
                on_progress(ProgressEvent(stage, done, total, "answers"))
        rivals = sorted(rivals, key=lambda s: -score(s))[: -(-len(rivals) // 2)]
    best = max((favourite, *rivals), key=score)
    tried = [Tried(s, _mean(f1), _mean(right[s]), len(f1)) for s, f1 in scores.items()]
    # A candidate of a later round was better in all rounds before, whatever its mean is now.
    order = sorted(tried, key=lambda t: (t.setting != best, -t.n, -t.f1))
    return Tuned(best, tuple(order))


def _planned(rivals: int, ends: Sequence[int]) -> int:
    total, before = 0, 0
    for end in ends:
        total += (1 + rivals) * (end - before)
        rivals, before = -(-rivals // 2), end
    return total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
