"""How tokens are chosen: draws follow the distribution and depend on their seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlpmem_rag.decoding import Decoding, GumbelNoise
from mlpmem_rag.errors import ConfigError

IDS: Any = torch.zeros(1, 1, dtype=torch.long)
PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])
LOGITS = PROBABILITIES.log()[None]


def draws(decoding: Decoding, count: int) -> torch.Tensor:
    """Shares of the four tokens among so many choices."""
    chosen = decoding.choosers()(IDS, LOGITS.repeat(count, 1)).argmax(-1)
    return torch.bincount(chosen, minlength=4) / count


def test_greedy_changes_nothing() -> None:
    assert len(Decoding().choosers()) == 0


def test_draws_follow_the_distribution() -> None:
    torch.testing.assert_close(
        draws(Decoding(temperature=1.0, seed=0), 20_000), PROBABILITIES, atol=0.015, rtol=0
    )


def test_temperature_sharpens_and_top_p_cuts() -> None:
    sharper = PROBABILITIES.square() / PROBABILITIES.square().sum()
    found = draws(Decoding(temperature=0.5, seed=0), 20_000)
    torch.testing.assert_close(found, sharper, atol=0.015, rtol=0)
    cut = draws(Decoding(temperature=1.0, top_p=0.7, seed=0), 20_000)
    torch.testing.assert_close(cut, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015, rtol=0)


def test_a_seed_gives_the_same_draws_whatever_others_draw() -> None:
    def chosen(seed: int | None) -> list[int]:
        steps = Decoding(temperature=1.0, seed=seed).choosers()
        torch.rand(3)  # the global state has no part in it
        return [int(steps(IDS, torch.zeros(1, 1000)).argmax()) for _ in range(8)]

    assert chosen(7) == chosen(7) != chosen(8)
    assert chosen(None) != chosen(None)


def test_noise_keeps_what_is_impossible_impossible() -> None:
    scores = torch.tensor([[0.0, -torch.inf]])
    noise = GumbelNoise(0)
    assert not any(int(noise(IDS, scores).argmax()) for _ in range(100))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: allowed is 1 or more"),
        ({"lambda_": 1.5}, "lambda = 1.5: allowed are 0"),
        ({"temperature": -0.1}, "temperature = -0.1: allowed are 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0: allowed are values above 0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"stop": ("\n", "")}, "empty stop string"),
    ],
)
def test_settings_outside_what_is_allowed_are_refused(
    setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**setting)
