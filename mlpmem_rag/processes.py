"""Several processes that share the work of a stage, one per device.

They are started by torchrun or `accelerate launch` with the same arguments. Knows nothing of the
stages: only who one is, and how to wait for the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
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

    @contextmanager
    def copy_of(self, folder: Path) -> Iterator[Path]:
        """The folder itself for the first process; for others a copy, which they take away."""
        mine = folder if self.first else folder / f"process-{self.index}"
        if not self.first:
            shutil.rmtree(mine, ignore_errors=True)
            others = shutil.ignore_patterns("process-*")
            shutil.copytree(folder, mine, ignore=others)
        self.wait()  # nobody changes it before all have it
        yield mine
        if not self.first:
            shutil.rmtree(mine, ignore_errors=True)


ALONE = Team()


def join_team(device: torch.device) -> Team:
    """The processes that a launcher has started with this one; `ALONE` without a launcher.

    With GPUs each process takes one for its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    return Team(state.process_index, state.num_processes)
