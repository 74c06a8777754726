"""Distillation steps beside the formulation that was released with the paper.

That one predicts the base model's whole vocabulary and turns the stored sparse targets into dense
float32 rows, T x vocabulary, before the divergence. Both take the same rows, the same optimiser and
the same number formats. Memory is measured in a process of its own for each, as what its peak adds
to what the process held before the memory was made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.machine import held_bytes
from benchmarks.rounds import Ratio, interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_eval.meters import metered
from mlpmem_rag.backbone import mlp_shape
from mlpmem_rag.config import PAPER_OPTIMISATION, STUDY_OPTIMISATION, TrainConfig
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import Rows
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.lessons import Columns, TextLesson
from mlpmem_rag.memory import Memory, MemoryConfig, derive_config, new_memory
from mlpmem_rag.targets import Targets, build_targets, derive_tau

ALPHA = 0.4
PAPER_ROWS = PAPER_OPTIMISATION.batch_rows
TRAIN_ROWS = STUDY_OPTIMISATION.batch_rows
RELEASED_ROWS = 4096
"""Rows a step: as this library trains by the paper's recipe and by its own, and half of the
released trainer's batch of 8,192 tokens."""
ROUNDS = 6
FASTER = Goal(at_least=5.0)
SMALLER = Goal(at_most=0.1)
ARMS = ("ours", "released")
Loss = Callable[[Rows], Tensor]


class Arm:
    """A memory, its optimiser, and one way to the loss of some rows."""

    def __init__(self, memory: Memory, loss: Loss) -> None:
        self.memory = memory
        self._loss = loss
        self._optimizer = torch.optim.AdamW(memory.parameters(), weight_decay=0.0, fused=True)

    def step(self, rows: Rows) -> float:
        """As `distill` does it."""
        loss = self._loss(rows)
        value = loss.item()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.memory.parameters(), 1.0)
        self._optimizer.step()
        return value


def ours(config: MemoryConfig, store: Datastore, targets: Targets, device: str) -> Arm:
    """The head covers the tokens of the corpus, the divergence the tokens of the targets."""
    tokens = np.unique(np.asarray(store.next_tokens))
    small = replace(config, vocab_size=len(tokens))
    memory = new_memory(small, torch.from_numpy(tokens.astype(np.int64)), None, seed=0).to(device)
    lesson = TextLesson(store, targets, Columns(memory, config.vocab_size), alpha=ALPHA)
    generator = torch.Generator(device)
    return Arm(memory, lambda rows: lesson.loss(memory, rows, generator))


def released(config: MemoryConfig, store: Datastore, targets: Targets, device: str) -> Arm:
    """The whole vocabulary, and dense targets."""
    memory = new_memory(config, torch.arange(config.vocab_size), None, seed=0).to(device)

    def loss(rows: Rows) -> Tensor:
        keys = torch.from_numpy(store.keys(rows)).to(device)
        dense = dense_targets(targets, rows, config.vocab_size, device)
        following = torch.from_numpy(store.next_tokens[rows].astype(np.int64)).to(device)
        return dense_loss(memory, keys, dense, following)

    return Arm(memory, loss)


def dense_targets(targets: Targets, rows: Rows, width: int, device: str) -> Tensor:
    """*Shape:* (R,) -> (R, W), float32."""
    columns = torch.from_numpy(targets.token_ids[rows].astype(np.int64)).to(device)
    probs = torch.from_numpy(targets.probs[rows].astype(np.float32)).to(device)
    dense = torch.zeros(len(rows), width, device=device)
    return dense.scatter_add_(1, columns.clamp_min(0), probs)


def dense_loss(memory: Memory, keys: Tensor, dense: Tensor, following: Tensor) -> Tensor:
    """*Shapes:* keys (R, D), dense (R, W), following (R,) -> ()."""
    device = keys.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        logits = memory(keys)
    log_probs = logits.float().log_softmax(-1)
    divergence = F.kl_div(log_probs, dense, reduction="batchmean")
    return ALPHA * divergence + (1 - ALPHA) * F.nll_loss(log_probs, following)


def run(setup: Setup) -> list[Figure]:
    """Rows a second and peak memory, at the same rows a step; and memory as each side trains."""
    config, folder = prepared(setup)
    numbers = (PAPER_ROWS, TRAIN_ROWS, RELEASED_ROWS)
    speeds = [_speed(setup, config, folder, rows) for rows in numbers]
    peaks = {
        (arm, rows): in_own_process(arm, setup, config, folder, rows)
        for rows in numbers
        for arm in ARMS
    }
    pairs = {(rows, rows): Goal() for rows in numbers}
    pairs |= {(RELEASED_ROWS, RELEASED_ROWS): SMALLER, (TRAIN_ROWS, RELEASED_ROWS): Goal()}
    return speeds + [
        _memory(mine, theirs, peaks["ours", mine], peaks["released", theirs], goal)
        for (mine, theirs), goal in pairs.items()
    ]


def prepared(setup: Setup) -> tuple[MemoryConfig, Path]:
    """The shape with the whole vocabulary; the folder gets the neighbours' votes."""
    store, folder = setup.datastore, setup.work
    next_tokens = np.asarray(store.next_tokens)
    tau = derive_tau(setup.neighbors, next_tokens, np.arange(store.num_rows))
    build_targets(setup.neighbors, next_tokens, folder / "targets", tau=tau)
    backbone = setup.backbone
    shape = mlp_shape(backbone.model, backbone.layer)
    width = backbone.reference.vocab_size
    return derive_config(shape, backbone.num_layers, width, TrainConfig().size), folder


def arms(config: MemoryConfig, folder: Path, device: str, names: tuple[str, ...]) -> list[Arm]:
    """Made from the files of a setup."""
    store, targets = Datastore.open(folder / "datastore"), Targets.open(folder / "targets")
    make = {"ours": ours, "released": released}
    return [make[name](config, store, targets, device) for name in names]


def drawn_rows(folder: Path, rows: int) -> Rows:
    """The rows of every step."""
    total = Datastore.open(folder / "datastore").num_rows
    drawn: Rows = np.sort(np.random.default_rng(0).integers(total, size=rows))
    return drawn


def _speed(setup: Setup, config: MemoryConfig, folder: Path, rows: int) -> Figure:
    drawn = drawn_rows(folder, rows)
    mine, theirs = arms(config, folder, setup.device, ARMS)
    took = interleaved(
        {"ours": lambda: mine.step(drawn), "released": lambda: theirs.step(drawn)},
        ROUNDS,
        device=setup.device,
    )
    rate = rows / min(took["ours"])
    dtype = "bfloat16" if has_bfloat16(torch.device(setup.device)) else "float32"
    return Figure(
        f"distillation, {rows:,} rows a step",
        "rows/s",
        rate,
        "released formulation",
        rows / min(took["released"]),
        median_ratio(took["released"], took["ours"]),
        FASTER,
        per_second=rate,
        needs=roofline.step_needs(mine.memory, rows, dtype),
        details={
            "distinct_tokens": mine.memory.config.vocab_size,
            "vocabulary": config.vocab_size,
        },
    )


def _memory(mine: int, theirs: int, ours: float, released: float, goal: Goal) -> Figure:
    share = ours / released
    return Figure(
        f"peak memory of distillation, {mine:,} rows a step",
        "MiB",
        ours / 2**20,
        f"released formulation, {theirs:,} rows a step",
        released / 2**20,
        Ratio(share, share, share),
        goal,
    )


def in_own_process(arm: str, setup: Setup, config: MemoryConfig, folder: Path, rows: int) -> float:
    given = [arm, str(folder), setup.device, str(rows), json.dumps(asdict(config))]
    command = [sys.executable, "-m", "benchmarks.distillation", *given]
    # glibc keeps what is freed below 32 MiB in a heap with gaps; given back at once, the peak is of
    # what either arm holds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(ran.stdout.splitlines()[-1])


def added_peak(arm: str, folder: Path, device: str, rows: int, config: MemoryConfig) -> int:
    """Bytes that three steps need at most, the memory and its optimiser included."""
    drawn = drawn_rows(folder, rows)
    before = held_bytes(device)
    with metered(device) as reading:
        (one,) = arms(config, folder, device, (arm,))
        for _ in range(3):
            one.step(drawn)
    assert reading.peak_bytes is not None, "this system does not tell the peak"
    return reading.peak_bytes - before


def main() -> None:
    """One arm's peak, for the process that measures both."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("arm", "folder", "device", "rows", "config"):
        parser.add_argument(name)
    given = parser.parse_args()
    config = MemoryConfig(**json.loads(given.config))
    print(added_peak(given.arm, Path(given.folder), given.device, int(given.rows), config))


if __name__ == "__main__":
    main()
