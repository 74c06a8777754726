"""What an arm costs before its first answer, and when that pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlpmem_eval.schema import ArmCost, ArmFigures, BreakEven, Cost, Projection

FACTORS = (10, 100)
TUNING = "tuning"
"""The step that is a search for settings."""
ASSUMPTIONS = (
    "Set-up time and the index on the disk grow in proportion to the corpus; the search for "
    "settings takes as long as here.",
    "A memory of the same --size keeps its size; its head grows with the corpus's vocabulary and "
    "what it recalls with the questions, up to 65,536 of them, which is left out.",
    "Retrieval compares the question's vector with every passage's, so that part of its time grows "
    "in proportion; an approximate index would grow less.",
    "Prompts keep their length, so prefill and decode stay as measured; accuracy is not projected.",
)


@dataclass(frozen=True)
class Setup:
    """What was done and stored before an arm could answer.

    Attributes:
        seconds: of each step.
        grows: bytes on the disk that grow with the corpus.
        fixed: bytes on the disk that do not.
        trained: whether a break-even against arms that are only set up makes sense.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    grows: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    trained: bool = False

    @property
    def total_seconds(self) -> float:
        """Of all steps."""
        return sum(self.seconds.values())


def cost_of(setups: Mapping[str, Setup], figures: Mapping[str, ArmFigures]) -> Cost:
    """Costs of all arms, break-even of the trained ones against the others, projections."""
    return Cost(
        arms={
            name: ArmCost(
                setup_seconds=dict(setup.seconds), disk_bytes={**setup.grows, **setup.fixed}
            )
            for name, setup in setups.items()
        },
        break_even=_break_evens(setups, figures),
        projections=[
            projection
            for name, setup in setups.items()
            for projection in _projections(name, setup, figures[name])
        ],
        assumptions=list(ASSUMPTIONS),
    )


def break_even(extra_setup: float, saved: float) -> float | None:
    """Questions until the extra set-up is won back: 0 where there is none; None: never."""
    if extra_setup <= 0:
        return 0.0
    return extra_setup / saved if saved > 0 else None


def _break_evens(setups: Mapping[str, Setup], figures: Mapping[str, ArmFigures]) -> list[BreakEven]:
    out = []
    for name, setup in setups.items():
        for other, its in setups.items():
            mine, theirs = figures[name].total_ms, figures[other].total_ms
            retrieves = bool(its.grows)
            if not setup.trained or its.trained or not retrieves or mine is None or theirs is None:
                continue
            extra = setup.total_seconds - its.total_seconds
            saved = (theirs.mean - mine.mean) / 1000
            out.append(
                BreakEven(
                    arm=name,
                    against=other,
                    extra_setup_seconds=extra,
                    saved_seconds_per_question=saved,
                    questions=break_even(extra, saved),
                )
            )
    return out


def _projections(name: str, setup: Setup, figures: ArmFigures) -> Sequence[Projection]:
    if figures.total_ms is None or figures.retrieval_ms is None or figures.embedding_ms is None:
        return []
    if setup.grows and not figures.retrieval_ms.mean:
        return []  # searched at every token: what the searches take is not known apart
    search = figures.retrieval_ms.mean - figures.embedding_ms.mean
    return [
        Projection(
            arm=name,
            factor=factor,
            setup_seconds=sum(
                seconds * (1 if step == TUNING else factor)
                for step, seconds in setup.seconds.items()
            ),
            disk_bytes=sum(setup.grows.values()) * factor + sum(setup.fixed.values()),
            total_ms=figures.total_ms.mean + (factor - 1) * search,
        )
        for factor in FACTORS
    ]
