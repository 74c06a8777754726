"""Several processes that share the work of a stage, one per device.

They are started by torchrun or `accelerate launch` with the same arguments. Knows nothing of the
stages: only who one is, and how to wait for the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState

PATIENCE = timedelta(days=7)
"""How long one process waits for another: a stage that only the first does may take hours."""


@dataclass(frozen=True)
class Team:
    """One process among `count`.

    Attributes:
        index: from 0; the first decides and writes what is written once.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process does what only one must do."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Team()


def join_team(device: str) -> Team:
    """The processes that a launcher has started with this one; `ALONE` without a launcher.

    With GPUs each process takes one for its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Team(state.process_index, state.num_processes)
