"""Intervals and p beside scipy's and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, chi2, norm, permutation_test, ttest_rel

from mlpmem_eval.statistics import compare_pair, holm, mcnemar, mean_interval


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = rng().normal(3.0, 2.0, 500)
    half = norm.ppf(0.975) * values.std(ddof=0) / np.sqrt(500)
    low, high = mean_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_one_value_is_its_own_interval() -> None:
    assert mean_interval(np.array([0.5])) == (0.5, 0.5)


@pytest.mark.parametrize("n", [1, 5, 100])
def test_all_right_and_all_wrong_are_less_than_certain(n: int) -> None:
    # Wilson by hand: z**2 / (n + z**2) is the far end.
    far = norm.ppf(0.975) ** 2 / (n + norm.ppf(0.975) ** 2)
    assert mean_interval(np.zeros(n)) == pytest.approx((0.0, far))
    assert mean_interval(np.ones(n)) == pytest.approx((1 - far, 1.0))


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 0), (5, 0), (9, 3), (4, 4), (1, 14)])
def test_mcnemar_is_the_permutation_test_over_all_signs(a_only: int, b_only: int) -> None:
    # Under no difference every disagreement falls to either side like a coin.
    differences = np.array([1.0] * a_only + [-1.0] * b_only)
    if not len(differences):
        assert mcnemar(0, 0) == 1.0
        return
    exact = permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert mcnemar(a_only, b_only) == pytest.approx(exact)


def test_yes_and_no_are_compared_by_mcnemar() -> None:
    a = np.array([1.0, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    b = np.array([0.0, 0, 0, 1, 0, 0, 0, 0, 1, 0])
    pair = compare_pair("a", "b", "em", a, b)
    assert (pair.test, pair.a_only, pair.b_only) == ("mcnemar", 7, 1)
    assert pair.difference == pytest.approx(0.6)
    assert pair.p == pytest.approx(2 * (1 + 8) / 2**8)  # two sides of 0 or 1 heads in 8


def test_other_values_are_compared_by_signs_by_chance() -> None:
    b = rng().normal(0.0, 1.0, 200)
    pair = compare_pair("a", "b", "f1", b + rng().normal(0.3, 0.5, 200), b)
    low, high = pair.interval
    assert pair.test == "permutation"
    assert pair.a_only is None
    assert 0 < low < pair.difference < high  # pairing takes the common part off
    assert pair.p < 0.001


def test_half_of_all_noise_is_on_either_side() -> None:
    ps = []
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(size=(2, 60))
        ps.append(compare_pair("a", "b", "f1", noise[0], noise[1], seed=seed).p)
    assert 0.35 < np.mean(np.array(ps) < 0.5) < 0.65
    assert np.mean(np.array(ps) < 0.05) <= 0.15


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.5, 0.3], 2 / 4),
        ([0.5, 0.3, -0.1], 4 / 8),  # as large a sum: only where both larger ones agree
        ([0.25] * 6 + [0.0] * 94, 2 / 2**6),
        ([0.25] * 9 + [-0.25] + [0.0] * 3, 2 * 11 / 2**10),
    ],
)
def test_few_differences_are_compared_exactly(differences: list[float], expected: float) -> None:
    a = np.array(differences) + 0.25
    pair = compare_pair("a", "b", "f1", a, np.full(len(a), 0.25))
    assert pair.test == "permutation"
    assert pair.p == pytest.approx(expected)


def test_no_difference_is_no_significance() -> None:
    values = rng().random(50)
    pair = compare_pair("a", "b", "f1", values, values.copy())
    assert (pair.difference, pair.interval, pair.p, pair.significant) == (0, (0, 0), 1, False)


def test_one_question_proves_nothing() -> None:
    pair = compare_pair("a", "b", "total_ms", np.array([9.0]), np.array([1.0]))
    assert (pair.n, pair.interval, pair.significant) == (1, (8.0, 8.0), False)


def test_holm_by_hand() -> None:
    made = [compare_pair("a", "b", "em", np.ones(n), np.zeros(n)) for n in (6, 7, 9)]
    ps = [pair.p for pair in made]
    assert ps == pytest.approx([2 / 64, 2 / 128, 2 / 512])
    adjusted = [pair.p_adjusted for pair in holm(made)]
    assert adjusted == pytest.approx([2 / 64, 2 * 2 / 128, 3 * 2 / 512])
    # A p that is larger by itself is never smaller after the correction.
    assert [p.significant for p in holm([*made, made[0]])] == [False, True, True, False]


def test_the_interval_of_a_difference_is_near_the_paired_t_tests() -> None:
    b = rng().normal(0.4, 0.3, 300)
    a = b + rng().normal(0.05, 0.2, 300)
    pair = compare_pair("a", "b", "f1", a, b)
    expected = ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert pair.interval == pytest.approx((interval.low, interval.high), abs=0.003)
    assert pair.p == pytest.approx(expected.pvalue, abs=0.005)


def test_the_bootstrap_is_scipys() -> None:
    values = rng().exponential(2.0, 80)
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert mean_interval(values) == pytest.approx((expected.low, expected.high), abs=0.03)


@pytest.mark.parametrize(("a_only", "b_only"), [(5, 0), (9, 3), (30, 52)])
def test_mcnemar_is_near_its_chi_square(a_only: int, b_only: int) -> None:
    # With Edwards' correction the approximation of the exact test (McNemar, 1947).
    statistic = (abs(a_only - b_only) - 1) ** 2 / (a_only + b_only)
    assert mcnemar(a_only, b_only) == pytest.approx(chi2.sf(statistic, 1), abs=0.02)
