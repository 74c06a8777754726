"""The probability that an answer is right, compared with scikit-learn's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlpmem_rag.confidence import (
    NUM_FEATURES,
    Confidence,
    Trace,
    fit_confidence,
    trace_features,
)


def traces_and_right(*, separable: bool = False) -> tuple[list[Trace], list[bool]]:
    """A hundred answers of one to eight tokens; surer ones are right more often."""
    rng = np.random.default_rng(0)
    traces, right = [], []
    for _ in range(100):
        length, sure = int(rng.integers(1, 9)), rng.uniform()
        log_probs = -rng.exponential(2.5 - 2 * sure, size=length)
        entropies = rng.exponential(3 - 2.5 * sure, size=length)
        familiarity = float(rng.uniform(0.2, 1) * sure)
        support = float(rng.uniform(0, 1) * sure)
        sureness = tuple(log_probs.tolist()), tuple(entropies.tolist())
        traces.append(Trace(*sureness, familiarity, support))
        right.append(bool(log_probs[0] > -1 if separable else rng.uniform() < sure))
    return traces, right


def test_features_by_hand() -> None:
    trace = Trace((-0.5, -2.0, -0.25), (0.3, 0.9, 0.6), 0.8, 0.4)
    assert trace_features(trace) == pytest.approx((-0.5, 0.3, -2.75, -2.0, 0.6, 3.0, 0.8, 0.4))


@pytest.mark.parametrize("separable", [False, True])
def test_the_probability_is_scikit_learns_on_the_raw_features(separable: bool) -> None:
    traces, right = traces_and_right(separable=separable)
    raw = np.array(
        [
            (
                t.log_probs[0],
                t.entropies[0],
                np.sum(t.log_probs),
                np.min(t.log_probs),
                np.mean(t.entropies),
                len(t.log_probs),
                t.familiarity,
                t.support,
            )
            for t in traces
        ]
    )
    known = make_pipeline(StandardScaler(), LogisticRegression(C=4 / 100, max_iter=1000)).fit(
        raw, right
    )
    confidence = fit_confidence(traces, right)
    assert confidence is not None
    found = [confidence.of(trace) for trace in traces]
    np.testing.assert_allclose(found, known.predict_proba(raw)[:, 1], rtol=1e-6)
    sure = np.array(found)[np.array(right)].mean()
    assert sure > np.array(found)[~np.array(right)].mean() + 0.1


def test_the_probability_by_hand() -> None:
    confidence = Confidence((1.0, 0.0, 0.0, 0.0, -2.0, 0.1, 4.0, -3.0, 0.5))
    odds = -0.5 - 2 * 0.6 + 0.1 * 3 + 4 * 0.7 - 3 * 0.2 + 0.5
    expected = 1 / (1 + math.exp(-odds))
    trace = Trace((-0.5, -2.0, -0.25), (0.3, 0.9, 0.6), 0.7, 0.2)
    assert confidence.of(trace) == pytest.approx(expected)


@pytest.mark.parametrize(("constant", "expected"), [(1e9, 1.0), (-1e9, 0.0)])
def test_odds_beyond_all_numbers_are_a_probability(constant: float, expected: float) -> None:
    confidence = Confidence((0.0,) * NUM_FEATURES + (constant,))
    found = confidence.of(Trace((-1.0,), (1.0,)))
    assert found == pytest.approx(expected)
    assert 0 <= found <= 1


def test_an_empty_answer_is_never_right() -> None:
    assert Confidence((0.0,) * NUM_FEATURES + (9.0,)).of(Trace((), ())) == 0.0


@pytest.mark.parametrize("outcome", [False, True])
def test_nothing_is_fitted_where_all_were_alike(outcome: bool) -> None:
    traces, _ = traces_and_right()
    assert fit_confidence(traces, [outcome] * len(traces)) is None
    assert fit_confidence([], []) is None


def test_a_feature_that_never_changes_does_no_harm() -> None:
    """Answers of one token: three of the features say the same, one says nothing."""
    traces, right = traces_and_right()
    short = [Trace(t.log_probs[:1], t.entropies[:1]) for t in traces]
    confidence = fit_confidence(short, right)
    assert confidence is not None
    assert all(map(math.isfinite, confidence.weights))


@pytest.mark.parametrize("count", [0, NUM_FEATURES, NUM_FEATURES + 2])
def test_another_number_of_weights_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} confidence weights instead of"):
        Confidence((0.5,) * count)
