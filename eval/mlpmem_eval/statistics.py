"""Is a difference between two arms more than chance? Everything is paired by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap, permutation_test

Floats = npt.NDArray[np.float64]

RESAMPLES = 4000
FLIPS = 9999
"""Patterns of signs to look at; all, where there are no more."""
CONFIDENCE = 0.95
ALPHA = 0.05
MARGIN = 0.02
"""Share of the smaller mean time below which a difference of times is nobody's business: the
measuring itself is no more exact."""


@dataclass(frozen=True)
class Pair:
    """One metric of two arms on the questions that both answered.

    Attributes:
        a: name of the one arm.
        b: name of the other.
        metric: what is compared.
        n: number of questions.
        difference: mean of a - b.
        interval: its 95 % interval (percentile bootstrap over questions).
        a_only: questions that only a has right; None for metrics that are not yes or no.
        b_only: questions that only b has right.
        test: `mcnemar` (exact) or `permutation` (of the signs of the differences).
        p: two-sided.
        p_adjusted: the same after Holm's correction over all pairs of this metric.
        beyond_margin: whether the whole interval is larger than what counts as no difference.
    """

    a: str
    b: str
    metric: str
    n: int
    difference: float
    interval: tuple[float, float]
    a_only: int | None
    b_only: int | None
    test: str
    p: float
    p_adjusted: float
    beyond_margin: bool

    @property
    def significant(self) -> bool:
        """More than chance, and more than nothing."""
        return self.beyond_margin and self.p_adjusted < ALPHA


def mean_interval(values: Floats, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean; the value itself where there is only one.

    Where all are 0, or all 1, resamples say nothing, and it is Wilson's (1927) for a share.
    """
    if set(np.unique(values).tolist()) in ({0.0}, {1.0}):
        share = binomtest(int(values.sum()), len(values)).proportion_ci(CONFIDENCE, "wilson")
        return float(share.low), float(share.high)
    return _bootstrap(values, seed)


def compare_pair(
    a: str,
    b: str,
    metric: str,
    ours: Floats,
    theirs: Floats,
    *,
    margin: float = 0.0,
    seed: int = 0,
) -> Pair:
    """Two arms on the same questions. *Shapes:* (N,), (N,), N at least 1.

    A difference up to `margin` times the smaller mean counts as none.

    Where every value is 0 or 1, p is McNemar's exact one; else it is that of the permutation test
    which McNemar's is a case of: how often signs by chance would make so large a difference.
    """
    difference = ours - theirs
    interval = _bootstrap(difference, seed)
    binary = set(np.unique(np.concatenate([ours, theirs])).tolist()) <= {0.0, 1.0}
    a_only, b_only = int((difference > 0).sum()), int((difference < 0).sum())
    p = mcnemar(a_only, b_only) if binary else _sign_flips(difference, seed)
    return Pair(
        a,
        b,
        metric,
        len(difference),
        float(difference.mean()),
        interval,
        a_only if binary else None,
        b_only if binary else None,
        "mcnemar" if binary else "permutation",
        p,
        p,
        _beyond(interval, margin * min(ours.mean(), theirs.mean())),
    )


def mcnemar(a_only: int, b_only: int) -> float:
    """Exact two-sided p: could so uneven a split of the disagreements be chance?"""
    total = a_only + b_only
    return float(binomtest(a_only, total).pvalue) if total else 1.0


def holm(pairs: Sequence[Pair]) -> list[Pair]:
    """Correct the p of several pairs for their number (Holm, 1979)."""
    order = sorted(range(len(pairs)), key=lambda number: pairs[number].p)
    adjusted = [0.0] * len(pairs)
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(pairs) - rank) * pairs[number].p))
        adjusted[number] = largest
    return [replace(pair, p_adjusted=p) for pair, p in zip(pairs, adjusted, strict=True)]


def _beyond(interval: tuple[float, float], margin: float) -> bool:
    low, high = interval
    return low > margin or high < -margin


def _bootstrap(values: Floats, seed: int) -> tuple[float, float]:
    """Interval of the mean."""
    if len(values) < 2:
        only = float(values[0])
        return only, only
    low, high = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def _sign_flips(differences: Floats, seed: int) -> float:
    """Two-sided p of a mean difference; a question without one is no sign of anything."""
    told = differences[differences != 0]
    if len(told) < 2:  # either sign is as far from zero
        return 1.0
    found = permutation_test(
        (told,),
        np.mean,
        permutation_type="samples",
        n_resamples=FLIPS,
        batch=max(1, 2_000_000 // len(told)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
