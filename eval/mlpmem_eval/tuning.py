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
    """Successive halving: after every round the worse half is left out.

    Args:
        ask: answers a question with a setting.
        questions: written ones.
        candidates: settings to try, of which an earlier one wins a tie.
        stage: name of the progress.
        on_progress: called after every answer.
    """
    rounds = max(1, math.ceil(math.log2(len(candidates))))
    first = max(1, len(questions) // FIRST_SHARE)
    ends = [min(len(questions), first * 2**n) for n in range(rounds)]
    alive = list(candidates)
    total = _planned(len(alive), ends)
    scores: dict[S, list[float]] = {setting: [] for setting in alive}
    right: dict[S, list[float]] = {setting: [] for setting in alive}
    done = 0
    for end in ends:
        for setting in alive:
            for question in questions[len(scores[setting]) : end]:
                answer = ask(setting, question.text)
                scores[setting].append(token_f1(answer, question.answers))
                right[setting].append(float(exact_match(answer, question.answers)))
                done += 1
                on_progress(ProgressEvent(stage, done, total, "answers"))
        alive = sorted(alive, key=lambda s: -_mean(scores[s]))[: -(-len(alive) // 2)]
    tried = [Tried(s, _mean(f1), _mean(right[s]), len(f1)) for s, f1 in scores.items()]
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
