"""The targets stage beside the plain way: row by row, the votes of equal tokens by `np.unique`."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import roofline
from benchmarks.figures import Figure
from benchmarks.rounds import interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.neighbors import Neighbors
from mlpmem_rag.targets import MAX_TOKENS, MIN_PROBABILITY, Tokens, build_targets, derive_tau


def run(setup: Setup) -> list[Figure]:
    """Rows a second of both; the stage also writes its targets to the disk."""
    found, next_tokens = setup.neighbors, np.asarray(setup.datastore.next_tokens)
    num_rows, k = found.ids.shape
    tau = derive_tau(found, next_tokens, np.arange(num_rows))
    with tempfile.TemporaryDirectory(dir=setup.work) as folder:
        empty = (Path(folder) / str(number) for number in itertools.count())
        device = torch.device(setup.device)
        took = interleaved(
            {
                "stage": lambda: build_targets(
                    found, next_tokens, next(empty), tau=tau, device=device
                ),
                "plain": lambda: row_by_row(found, next_tokens, tau),
            },
            setup.rounds,
            device=setup.device,
        )
    rate = num_rows / min(took["stage"])
    return [
        Figure(
            f"targets, votes of {k:,} neighbours",
            "rows/s",
            rate,
            "np.unique, row by row",
            num_rows / min(took["plain"]),
            median_ratio(took["plain"], took["stage"]),
            per_second=rate,
            needs=roofline.vote_needs(k, min(MAX_TOKENS, k)),
            details={"rows": num_rows},
        )
    ]


def row_by_row(
    neighbors: Neighbors, next_tokens: Tokens, tau: float
) -> tuple[Tokens, npt.NDArray[np.float16]]:
    """What the stage stores: tokens, -1 where unused, and probabilities. *Shapes:* (N, M)."""
    num_rows, k = neighbors.ids.shape
    token_ids = np.full((num_rows, min(MAX_TOKENS, k)), -1, dtype=np.int32)
    probs = np.zeros(token_ids.shape, dtype=np.float16)
    for row in range(num_rows):
        there = neighbors.ids[row] >= 0
        distances = neighbors.distances[row][there]
        weights = np.exp((distances[:1] - distances) / tau)
        tokens, place = np.unique(next_tokens[neighbors.ids[row][there]], return_inverse=True)
        sums = np.bincount(place, weights / weights.sum())
        best = np.argsort(-sums, kind="stable")[: token_ids.shape[1]]
        best = best[sums[best] > MIN_PROBABILITY]
        token_ids[row, : len(best)] = tokens[best]
        probs[row, : len(best)] = sums[best] / sums[best].sum()
    return token_ids, probs
