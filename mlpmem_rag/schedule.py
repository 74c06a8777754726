"""How long a self-study goes on, which follows from the number of its rows."""

from __future__ import annotations

import math
from dataclasses import replace

from mlpmem_rag.distill import DistillConfig

MIN_STEPS = 600
"""Fewer leave even a small memory unfinished."""
ENOUGH_STEPS = 2000
"""With fewer, twice the epochs: facts that look alike take long to be told apart."""
FINISHING = 0.25
"""Epochs that end a self-study with what had been held out, as a share of all epochs."""


def long_enough(config: DistillConfig, num_rows: int) -> DistillConfig:
    """With more epochs where a small corpus would otherwise get too few steps."""
    steps = math.ceil(num_rows / config.batch_rows)
    more = min(2 * config.epochs, math.ceil(ENOUGH_STEPS / steps))
    epochs = max(config.epochs, more, math.ceil(MIN_STEPS / steps))
    return replace(config, epochs=epochs, patience=epochs)


def finishing(config: DistillConfig, num_rows: int) -> DistillConfig:
    """What comes after `long_enough`: all rows for a short while, at half the rate."""
    config = long_enough(config, num_rows)
    epochs = max(1, round(FINISHING * config.epochs))
    return replace(config, epochs=epochs, learning_rate=config.learning_rate / 2)
