"""Mixing of memory and base, and the search for the mixing weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate
from mlpmem_rag.mixing import best_lambda, check_lambda, gated_weight, mix, mixture_nll

CORPUS_TOKENS = torch.tensor([2, 3, 5, 8])
GATE = Gate(asked=(0.9, -0.4, -0.7, 0.3, 0.2, 0.5), plain=(0.1, 0.6, -0.2, -0.3, 0.4, -1.0))


def constant_gate(odds: float) -> Gate:
    weights = (0.0, 0.0, 0.0, 0.0, 0.0, odds)
    return Gate(weights, weights)


def logits(width: int, seed: int) -> Tensor:
    return 3 * torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lambda_", [1e-6, 0.3, 0.5, 0.999, 1.0])
def test_mixture_equals_the_dense_one(lambda_: float) -> None:
    base, memory = logits(10, 0), logits(4, 1)
    p_memory = torch.zeros(2, 5, 10, dtype=torch.float64)
    p_memory[..., CORPUS_TOKENS] = memory.double().softmax(-1)
    expected = lambda_ * p_memory + (1 - lambda_) * base.double().softmax(-1)
    mixed = mix(base, memory.log_softmax(-1), CORPUS_TOKENS, lambda_).exp().double()
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_lambda_zero_returns_the_very_logits() -> None:
    base = logits(10, 0).bfloat16()
    assert mix(base, logits(4, 1).log_softmax(-1), CORPUS_TOKENS, 0.0) is base


def test_a_weight_that_is_a_number_is_not_copied_to_the_device() -> None:
    """With a device that cannot compute, which is one that all machines have."""
    base, memory = logits(10, 0).to("meta"), logits(4, 1).to("meta")
    tokens = CORPUS_TOKENS.to("meta")
    weight = gated_weight(base, memory, tokens, 0.3, None, asked=False)
    assert (weight.device.type, float(weight)) == ("cpu", 0.3)
    mixed = mix(base, memory, tokens, 0.3)
    assert (mixed.device.type, mixed.dtype, mixed.shape) == ("meta", torch.float32, base.shape)


def test_lambda_one_is_the_memory_alone() -> None:
    memory = logits(4, 1).log_softmax(-1)
    mixed = mix(logits(10, 0), memory, CORPUS_TOKENS, 1.0)
    torch.testing.assert_close(mixed[..., CORPUS_TOKENS], memory)
    outside = [token for token in range(10) if token not in CORPUS_TOKENS.tolist()]
    assert torch.all(mixed[..., outside] == -torch.inf)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("lambda_", [1e-6, 0.3, 1.0])
def test_a_gate_weighs_each_position_by_itself(lambda_: float, asked: bool) -> None:
    base, memory = logits(10, 0).double().softmax(-1), logits(4, 1).double().softmax(-1)
    log_probs = logits(4, 1).log_softmax(-1)
    mixed = mix(logits(10, 0), log_probs, CORPUS_TOKENS, lambda_, GATE, asked=asked)
    gate = GATE.asked if asked else GATE.plain
    weights = []
    for b, m in zip(base.flatten(0, 1), memory.flatten(0, 1), strict=True):
        best = int(m.argmax())
        features = [
            m[best].log(),
            -(m * m.log()).sum(),
            b.max().log(),
            -(b * b.log()).sum(),
            b[CORPUS_TOKENS[best]].log(),
        ]
        odds = sum(w * f for w, f in zip(gate, [*features, 1.0], strict=True))
        weights.append(lambda_ / (1 + np.exp(-float(odds))))
        expected = (1 - weights[-1]) * b
        expected[CORPUS_TOKENS] += weights[-1] * m
        found = mixed.flatten(0, 1)[len(weights) - 1].exp().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    assert max(weights) - min(weights) > 0.1 * lambda_
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("lambda_", [0.3, 1.0])
def test_a_gate_that_is_the_same_everywhere_is_a_smaller_lambda(lambda_: float) -> None:
    base, memory = logits(10, 0), logits(4, 1).log_softmax(-1)
    found = mix(base, memory, CORPUS_TOKENS, lambda_, constant_gate(float(np.log(0.7 / 0.3))))
    torch.testing.assert_close(found, mix(base, memory, CORPUS_TOKENS, 0.7 * lambda_))


@pytest.mark.parametrize(("odds", "lambda_"), [(200.0, 1.0), (-200.0, 0.0)])
def test_a_gate_may_be_wide_open_or_shut(odds: float, lambda_: float) -> None:
    base, memory = logits(10, 0), logits(4, 1).log_softmax(-1)
    found = mix(base, memory, CORPUS_TOKENS, 1.0, constant_gate(odds))
    expected = mix(base, memory, CORPUS_TOKENS, lambda_).log_softmax(-1)
    torch.testing.assert_close(found, expected)


def test_lambda_zero_returns_the_very_logits_whatever_the_gate() -> None:
    base = logits(10, 0).bfloat16()
    assert mix(base, logits(4, 1).log_softmax(-1), CORPUS_TOKENS, 0.0, GATE) is base


@pytest.mark.parametrize("lambda_", [0, 0.0, 0.25, 1, 1.0])
def test_lambda_from_end_to_end_is_taken(lambda_: float) -> None:
    taken = check_lambda(lambda_)
    assert (taken, type(taken)) == (lambda_, float)


@pytest.mark.parametrize("lambda_", [-0.01, 1.01, float("nan")])
def test_lambda_outside_is_refused(lambda_: float) -> None:
    with pytest.raises(ConfigError, match=r"allowed are 0 .* to 1"):
        check_lambda(lambda_)


def draw(low: float, high: float, seed: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(low, high, size=200)


@pytest.mark.parametrize(
    ("p_base", "p_memory", "expected"),
    [
        (draw(0, 1, 0), draw(0, 1, 1), None),
        (draw(0, 1, 0) ** 4, draw(0, 1, 1), None),
        (draw(0, 1, 0), draw(0, 1, 1) ** 3, None),
        (draw(0.5, 1, 0), draw(0, 0.4, 1), 0.0),
        (draw(0, 0.4, 0), draw(0.5, 1, 1), 0.999),
        (np.zeros(200), draw(0.5, 1, 1), 0.999),
        (draw(0.5, 1, 0), np.zeros(200), 0.0),
    ],
)
def test_best_lambda_equals_a_fine_grid(
    p_base: npt.NDArray[np.float64],
    p_memory: npt.NDArray[np.float64],
    expected: float | None,
) -> None:
    grid = np.linspace(0, 0.999, 1000)
    with np.errstate(divide="ignore"):
        losses = [-np.log(g * p_memory + (1 - g) * p_base).mean() for g in grid]
    found = best_lambda(p_base, p_memory)
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=1e-3)
    assert mixture_nll(p_base, p_memory, found) <= min(losses) + 1e-9
    if expected is None:
        assert 0.01 < found < 0.99
    else:
        assert found == pytest.approx(expected)
