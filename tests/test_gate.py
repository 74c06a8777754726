"""The gate: its features by hand, and a fit that knows when the memory is to be trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlpmem_rag.gate import NUM_FEATURES, Gate, fit_gate, gate_features

CORPUS_TOKENS = torch.tensor([1, 3, 4])


def test_features_by_hand() -> None:
    memory = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]).log()
    base = torch.tensor([[0.4, 0.3, 0.1, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    found = gate_features(memory, base, CORPUS_TOKENS)
    nats = [
        -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)),
        -(0.4 * math.log(0.4) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
        - (0.15 * math.log(0.15) + 0.05 * math.log(0.05)),
    ]
    expected = [
        [math.log(0.7), nats[0], math.log(0.4), nats[1], math.log(0.3)],  # token 1 at column 0
        [math.log(0.5), 1.5 * math.log(2), math.log(0.2), math.log(5), math.log(0.2)],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_features_of_any_leading_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(2, 7, 3, generator=generator).log_softmax(-1)
    base = torch.randn(2, 7, 9, generator=generator).log_softmax(-1)
    found = gate_features(memory, base, CORPUS_TOKENS)
    assert found.shape == (2, 7, NUM_FEATURES)
    alone = gate_features(memory[1, 4], base[1, 4], CORPUS_TOKENS)
    torch.testing.assert_close(found[1, 4], alone)


def test_features_of_a_certain_distribution_are_finite() -> None:
    """Underflow: a probability of 0 adds nothing to the entropy."""
    sure = torch.tensor([300.0, 0.0, 0.0]).log_softmax(-1)
    base = torch.tensor([0.0, 400.0, 0.0, 0.0, 0.0]).log_softmax(-1)
    found = gate_features(sure, base, CORPUS_TOKENS)
    torch.testing.assert_close(found, torch.zeros(NUM_FEATURES))


def test_its_opening_by_hand() -> None:
    gate = Gate(asked=(1.0, -2.0, 0.5, 0.0, 3.0, 0.25), plain=(0.0, 0.5, 0.0, 0.0, 0.0, -3.0))
    features = torch.tensor([[1.0, 2.0, 0.0, 4.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for asked, odds in ((True, (-1.25, 0.25)), (False, (-2.0, -3.0))):
        expected = torch.tensor([1 / (1 + math.exp(-o)) for o in odds])
        torch.testing.assert_close(gate.opening(features, asked=asked), expected)


class Made(TorchDispatchMode):
    """Notes tensors that are made from numbers."""

    def __init__(self, noted: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = noted

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if func is torch.ops.aten.lift_fresh.default:
            self.noted += args
        return func(*args, **(kwargs or {}))


def test_its_weights_are_made_once_and_serve_gradients_too() -> None:
    gate = Gate(asked=(1.0, -2.0, 0.5, 0.0, 3.0, 0.25), plain=(0.0, 0.5, 0.0, 0.0, 0.0, -3.0))
    features, asks = torch.randn(3, NUM_FEATURES), torch.tensor([True, False, True])
    made: list[Tensor] = []
    with torch.inference_mode(), Made(made):
        first = gate.opening(features, asked=asks)
        assert len(made) == 1
        assert torch.equal(first, gate.opening(features, asked=asks))
        assert torch.equal(first[1:2], gate.opening(features[1:2], asked=False))
        assert len(made) == 1
    features.requires_grad_()
    gate.opening(features, asked=True).sum().backward()
    assert features.grad is not None
    doubled = gate.opening(features.double(), asked=asks)
    torch.testing.assert_close(doubled.float(), first)
    assert gate == Gate(gate.asked, gate.plain)


@pytest.mark.parametrize("count", [0, NUM_FEATURES, NUM_FEATURES + 2])
def test_another_number_of_weights_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} gate weights instead of {NUM_FEATURES + 1}"):
        Gate((0.5,) * count, (0.5,) * (NUM_FEATURES + 1))
    with pytest.raises(ValueError, match=rf"{count} gate weights instead of {NUM_FEATURES + 1}"):
        Gate((0.5,) * (NUM_FEATURES + 1), (0.5,) * count)


def opening(weights: tuple[float, ...], features: Tensor) -> Tensor:
    return Gate(weights, (0.0,) * len(weights)).opening(features, asked=True)


class Rows:
    """Held-out rows of two kinds, told apart by the features but for some noise."""

    def __init__(self, *, noise: float, count: int = 600) -> None:
        rng = np.random.default_rng(0)
        knows = rng.random(count) < 0.4
        features = rng.normal(size=(count, NUM_FEATURES)) * (3, 0.1, 1, 1, 20) + (0, 5, 0, 0, -9)
        features[:, 0] += 4 * np.where(knows, 1, -1) / max(noise, 0.01)
        good, bad = rng.uniform(0.6, 0.99, count), rng.uniform(1e-6, 0.05, count)
        self.knows = torch.from_numpy(knows)
        self.features = torch.from_numpy(features).float()
        self.p_memory = torch.from_numpy(np.where(knows, good, bad)).float()
        self.p_base = torch.from_numpy(np.where(knows, bad, good)).float()
        self.weights = torch.ones(count)

    def fit(self, **options: float) -> tuple[float, ...]:
        return fit_gate(self.features, self.p_memory, self.p_base, self.weights, **options)

    def nll(self, lambda_: Tensor) -> float:
        return -(lambda_ * self.p_memory + (1 - lambda_) * self.p_base).log().mean().item()


def test_lambda_is_high_where_the_memory_is_right_and_low_elsewhere() -> None:
    rows = Rows(noise=0.5)
    lambda_ = opening(rows.fit(), rows.features)
    assert lambda_[rows.knows].mean() > 0.95
    assert lambda_[~rows.knows].mean() < 0.05


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
def test_it_is_better_than_any_constant(noise: float) -> None:
    rows = Rows(noise=noise)
    fitted = rows.nll(opening(rows.fit(), rows.features))
    constants = [rows.nll(torch.tensor(value)) for value in np.linspace(0.01, 0.99, 99)]
    assert fitted < min(constants) - 0.01


def test_where_one_of_the_two_is_certain_it_is_logistic_regression() -> None:
    """p is 1 or 0, so that the likelihood is that of the kind of the row."""
    rows = Rows(noise=2.0)
    rows.p_memory, rows.p_base = rows.knows.float(), (~rows.knows).float()
    odds = opening(rows.fit(ridge=0.0), rows.features).logit()
    centre, spread = rows.features.mean(0), rows.features.std(0)
    scaled = ((rows.features - centre) / spread).double().numpy()
    known = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(scaled, rows.knows.numpy())
    np.testing.assert_allclose(odds, known.decision_function(scaled), atol=0.02)


def test_no_other_weights_are_better() -> None:
    rows = Rows(noise=4.0)
    fitted = rows.fit(ridge=0.0)
    best = rows.nll(opening(fitted, rows.features))
    spreads = [*rows.features.std(0).tolist(), 1.0]
    for place, spread in enumerate(spreads):
        for step in (-0.05, 0.05):
            weights = list(fitted)
            weights[place] += step / spread
            assert rows.nll(opening(tuple(weights), rows.features)) > best


def test_weights_count_rows_as_often() -> None:
    rows, twice = Rows(noise=4.0), Rows(noise=4.0)
    rows.weights[:200] = 3.0
    for name in ("features", "p_memory", "p_base", "weights"):
        tensor = getattr(twice, name)
        setattr(twice, name, torch.cat([tensor, tensor[:200], tensor[:200]]))
    expected = opening(twice.fit(ridge=0.0), rows.features)
    found = opening(rows.fit(ridge=0.0), rows.features)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.02)
    assert not torch.allclose(found, opening(Rows(noise=4.0).fit(ridge=0.0), rows.features))


def test_rows_that_a_feature_separates_have_finite_weights() -> None:
    rows = Rows(noise=0.01)
    rows.p_memory, rows.p_base = rows.knows.float(), (~rows.knows).float()
    fitted = rows.fit()
    assert all(map(math.isfinite, fitted))
    assert max(abs(w) * s for w, s in zip(fitted, rows.features.std(0), strict=False)) < 100
    lambda_ = opening(fitted, rows.features)
    assert lambda_[rows.knows].min() > 0.9
    assert lambda_[~rows.knows].max() < 0.1


def test_a_feature_that_never_changes_does_no_harm() -> None:
    rows = Rows(noise=2.0)
    rows.features[:, 3] = 1.5
    fitted = rows.fit()
    assert all(map(math.isfinite, fitted))
    assert rows.nll(opening(fitted, rows.features)) < rows.nll(torch.tensor(0.4))


def test_a_memory_that_is_always_better_is_always_trusted() -> None:
    rows = Rows(noise=8.0)
    rows.p_memory, rows.p_base = torch.full((600,), 0.9), torch.full((600,), 0.1)
    assert opening(rows.fit(), rows.features).min() > 0.99
