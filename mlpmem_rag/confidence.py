"""The probability that an answer is right, from what its decoding shows anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_FEATURES = 8
SHRINKAGE = 4.0
"""`C` of the logistic regression times its number of answers: its features are weighted much alike.
What people ask is unlike what it is fitted on, and weights that tell written questions apart best
say too little about theirs (docs/experiments.md)."""


@dataclass(frozen=True)
class Trace:
    """How sure the memory is of each token of an answer, its end included.

    Attributes:
        log_probs: what it gives the tokens that the mixture has chosen, in nats.
        entropies: of its distributions there, in nats.
        familiarity: how near the request is to a question that was learned, -1 to 1.
        support: share of the questions it may mean that were taught this very answer, 0 to 1.
    """

    log_probs: tuple[float, ...]
    entropies: tuple[float, ...]
    familiarity: float = 0.0
    support: float = 0.0


@dataclass(frozen=True)
class Confidence:
    """A logistic model over `trace_features`; the last weight is the constant's."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the number of weights.

        Raises:
            ValueError: it is not one for each feature and one for the constant.
        """
        if len(self.weights) != NUM_FEATURES + 1:
            raise ValueError(
                f"{len(self.weights)} confidence weights instead of {NUM_FEATURES + 1}"
            )

    def of(self, trace: Trace) -> float:
        """Probability that the answer is right, 0 to 1; an empty answer has 0."""
        if not trace.log_probs:
            return 0.0
        terms = zip(self.weights, (*trace_features(trace), 1.0), strict=True)
        odds = sum(weight * feature for weight, feature in terms)
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, odds))))


def trace_features(trace: Trace) -> tuple[float, ...]:
    """First token and whole answer: how probable, how open; number of tokens; the request."""
    return (
        trace.log_probs[0],
        trace.entropies[0],
        sum(trace.log_probs),
        min(trace.log_probs),
        sum(trace.entropies) / len(trace.entropies),
        float(len(trace.log_probs)),
        trace.familiarity,
        trace.support,
    )


def fit_confidence(traces: Sequence[Trace], right: Sequence[bool]) -> Confidence | None:
    """Logistic regression on written questions; None where all were right, or none was."""
    # Only training needs it, and answering would carry its 40 MB.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(right)) < 2:
        return None
    features = np.array([trace_features(trace) for trace in traces])
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=SHRINKAGE / len(traces), max_iter=1000)
    )
    model.fit(features, np.array(right))
    scaler, logistic = model.steps[0][1], model.steps[1][1]
    weights = logistic.coef_[0] / scaler.scale_
    constant = logistic.intercept_[0] - (weights * scaler.mean_).sum()
    return Confidence((*weights.tolist(), float(constant)))
