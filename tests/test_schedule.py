"""How many epochs a self-study has."""

from __future__ import annotations

import pytest

from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.schedule import finishing, long_enough

CONFIG = DistillConfig(epochs=8, batch_rows=512, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("steps", "epochs"),
    [(1, 600), (5, 120), (38, 16), (42, 16), (125, 16), (126, 16), (222, 10), (249, 9), (1304, 8)],
)
def test_small_corpora_are_learned_for_longer(steps: int, epochs: int) -> None:
    """600 steps at least; up to 2,000 with twice the epochs at most."""
    for rows in (512 * steps, 512 * steps - 511):
        longer = long_enough(CONFIG, rows)
        assert (longer.epochs, longer.patience) == (epochs, epochs)
        assert longer.learning_rate == CONFIG.learning_rate


@pytest.mark.parametrize(("steps", "epochs"), [(1, 150), (42, 4), (222, 2), (1304, 2)])
def test_the_end_takes_a_quarter_as_long_at_half_the_rate(steps: int, epochs: int) -> None:
    end = finishing(CONFIG, 512 * steps)
    assert (end.epochs, end.learning_rate) == (epochs, 5e-4)
