"""Neighbours vote for the next token: the distributions the memory learns to imitate.

p_kNN(w) is proportional to the sum of exp(-d / tau) over neighbours whose next token is w
(paper, section 3; d is the squared L2 distance). Kept sparse: at most M tokens a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.index import CPU, Rows
from mlpmem_rag.neighbors import Neighbors
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import allocate_array, write_json

MAX_TOKENS = 128
MIN_PROBABILITY = 1e-6
"""Below this a float16 holds no digits worth keeping."""
ROW_BATCH = 2048
PLACE_BITS = 11
"""Of a place among the neighbours, of which there are 1,024 at most."""
TAU_FACTORS = (0.0125, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.8)
TAU_SAMPLE = 4096

Tokens = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Targets:
    """Sparse next-token distributions of N rows.

    Attributes:
        token_ids: token ids, -1 where unused. *Shape:* (N, M).
        probs: their probabilities, summing to 1 a row. *Shape:* (N, M), float16.
        tau: temperature of the votes.
        kept_mass: mean share of the votes that the kept tokens had before renormalising.
    """

    token_ids: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float16]
    tau: float
    kept_mass: float

    @classmethod
    def open(cls, folder: Path) -> Targets:
        """Map stored targets into memory."""
        return cls(
            np.load(folder / "token_ids.npy", mmap_mode="r"),
            np.load(folder / "probs.npy", mmap_mode="r"),
            **json.loads((folder / "targets.json").read_text()),
        )


def derive_tau(
    neighbors: Neighbors,
    next_tokens: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    *,
    seed: int = 0,
) -> float:
    """The tau under which the neighbours predict the given rows best.

    Distances differ in scale by a factor of a hundred between layers and models, so tau is
    searched among multiples of the mean distance to the ten nearest. Judged on a sample of
    rows, each without itself, by the log-likelihood of half teacher, half unigram: the
    unigram keeps one token that no neighbour names from deciding alone.
    """
    sample = np.random.default_rng(seed).permutation(rows)[:TAU_SAMPLE]
    unigram = np.bincount(next_tokens[rows], minlength=int(next_tokens.max()) + 1) / len(rows)
    scale = mean_distance(neighbors)
    best = (-np.inf, scale)
    for factor in TAU_FACTORS:
        p_teacher = teacher_probability(neighbors, next_tokens, sample, factor * scale)
        fit = float(np.log(0.5 * p_teacher + 0.5 * unigram[next_tokens[sample]]).mean())
        best = max(best, (fit, factor * scale))
    return best[1]


def check_tau(tau: float) -> None:
    """Refuse a temperature that is none.

    Raises:
        ConfigError: not a finite number above 0.
    """
    if not (np.isfinite(tau) and tau > 0):
        raise ConfigError(f"tau = {tau}: allowed is a number above 0")


def mean_distance(neighbors: Neighbors, nearest: int = 10) -> float:
    """Mean squared distance to the `nearest` neighbours over all rows: the scale of the keys."""
    distances = neighbors.distances[:, :nearest]
    finite = distances[np.isfinite(distances)].astype(np.float64)
    # Where all contexts are equal every distance is 0; any tau then gives equal votes.
    return float(finite.mean()) if finite.any() else 1.0


def neighbor_weights(distances: npt.NDArray[np.float32], tau: float) -> npt.NDArray[np.float32]:
    """Softmax of -d / tau over the neighbours. *Shape:* (R, K) -> (R, K)."""
    there = np.isfinite(distances)
    nearest = np.where(there[:, :1], distances[:, :1], 0.0)  # taken off, so that exp stays in range
    with np.errstate(over="ignore"):  # infinitely far for so small a tau: no weight
        weights = np.exp((nearest - distances.astype(np.float64)) / tau)
    weights[~there] = 0.0
    total = np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    normalised: npt.NDArray[np.float32] = (weights / total).astype(np.float32)
    return normalised


def teacher_probability(
    neighbors: Neighbors,
    next_tokens: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    tau: float,
) -> npt.NDArray[np.float32]:
    """What kNN-LM gives the true next token of each of `rows`. *Shape:* (R,)."""
    out = np.empty(len(rows), dtype=np.float32)
    for first in range(0, len(rows), ROW_BATCH):
        here = rows[first : first + ROW_BATCH]
        weights = neighbor_weights(neighbors.distances[here], tau)
        agree = next_tokens[neighbors.ids[here]] == next_tokens[here][:, None]
        out[first : first + len(here)] = (weights * agree).sum(1)
    return out


def build_targets(
    neighbors: Neighbors,
    next_tokens: npt.NDArray[np.int32],
    folder: Path,
    *,
    tau: float,
    max_tokens: int = MAX_TOKENS,
    device: torch.device = CPU,
    on_progress: OnProgress = ignore_progress,
) -> Targets:
    """Turn neighbours into sparse distributions, stored in `folder`.

    Votes are counted on the device: by numpy in torch's number of threads, or by torch on a GPU.

    Raises:
        ConfigError: tau is not a positive number.
    """
    check_tau(tau)
    folder.mkdir(parents=True, exist_ok=True)
    num_rows, k = neighbors.ids.shape
    shape = (num_rows, min(max_tokens, k))
    token_ids = allocate_array(folder / "token_ids.npy", np.int32, shape)
    probs = allocate_array(folder / "probs.npy", np.float16, shape)
    kept = 0.0
    count = vote if device.type == "cpu" else partial(vote_on, device)

    def counted(rows: Rows) -> tuple[Tokens, Weights]:
        weights = neighbor_weights(neighbors.distances[rows], tau)
        votes = np.where(neighbors.ids[rows] >= 0, next_tokens[neighbors.ids[rows]], -1)
        return count(votes, weights, shape[1])

    for first in range(0, num_rows, ROW_BATCH):
        rows = slice(first, first + ROW_BATCH)
        token_ids[rows], sums = _in_threads(counted, rows, num_rows)
        kept += float(sums.sum())
        probs[rows] = sums / np.maximum(sums.sum(1, keepdims=True), MIN_PROBABILITY)
        on_progress(ProgressEvent("targets", min(first + ROW_BATCH, num_rows), num_rows, "rows"))
    token_ids.flush()
    probs.flush()
    write_json(folder / "targets.json", {"tau": tau, "kept_mass": kept / num_rows})
    return Targets.open(folder)


def _in_threads(
    count: Callable[[Rows], tuple[Tokens, Weights]], rows: slice, num_rows: int
) -> tuple[Tokens, Weights]:
    """Rows shared out among as many threads as torch has; numpy lets go of the interpreter's lock.

    *Shapes:* (R, M), (R, M).
    """
    here = np.arange(*rows.indices(num_rows))
    threads = min(torch.get_num_threads(), len(here))
    with ThreadPoolExecutor(threads) as pool:
        tokens, sums = zip(*pool.map(count, np.array_split(here, threads)), strict=True)
    return np.concatenate(tokens), np.concatenate(sums)


def vote(tokens: Tokens, weights: Weights, max_tokens: int) -> tuple[Tokens, Weights]:
    """Sum the weights of equal tokens and keep the heaviest, heaviest first.

    Sorted are single numbers that say all that decides the order, and the place last: several times
    as fast as sorting places by several keys.
    *Shapes:* (R, K), (R, K) -> (R, M), (R, M); unused places hold -1 and 0.
    """
    num_rows, k = tokens.shape
    order = (tokens.astype(np.int64) + 1 << PLACE_BITS) + np.arange(k)
    order.sort(axis=1)
    order &= (1 << PLACE_BITS) - 1
    tokens = np.take_along_axis(tokens, order, 1)
    weights = np.take_along_axis(weights, order, 1)
    new = np.ones((num_rows, k), dtype=bool)
    new[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    starts = np.flatnonzero(new)  # a row's first place is always a start: runs never span rows
    sums = np.add.reduceat(weights.reshape(-1), starts)
    rows, names = starts // k, tokens.reshape(-1)[starts]
    sums[names < 0] = 0.0
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # of each row
    rank = np.arange(len(rows)) - first[rows]
    falling = np.iinfo(np.int32).max - sums.view(np.int32)  # no weight is below 0
    by_weight = ((rows << 31) + falling << PLACE_BITS) + rank
    by_weight.sort()
    by_weight = (by_weight & (1 << PLACE_BITS) - 1) + first[rows]
    names, sums = names[by_weight], sums[by_weight]
    keep = (rank < max_tokens) & (sums > MIN_PROBABILITY)
    out_tokens = np.full((num_rows, max_tokens), -1, dtype=np.int32)
    out_sums = np.zeros((num_rows, max_tokens), dtype=np.float32)
    out_tokens[rows[keep], rank[keep]] = names[keep]
    out_sums[rows[keep], rank[keep]] = sums[keep]
    return out_tokens, out_sums


def vote_on(
    device: torch.device, tokens: Tokens, weights: Weights, max_tokens: int
) -> tuple[Tokens, Weights]:
    """As `vote`, by torch; sums may differ in their last digit. *Shapes:* as there."""
    names, order = torch.from_numpy(tokens).to(device).sort(dim=1, stable=True)
    given = torch.from_numpy(weights).to(device).gather(1, order)
    new = torch.ones_like(names, dtype=torch.bool)
    new[:, 1:] = names[:, 1:] != names[:, :-1]
    run = new.cumsum(1) - 1
    names = torch.full_like(names, -1).scatter_(1, run, names)
    # In double precision, so that the order in which threads add does not show.
    sums = torch.zeros_like(given, dtype=torch.float64).scatter_add_(1, run, given.double()).float()
    sums[names < 0] = 0.0
    sums, place = sums.sort(dim=1, descending=True, stable=True)  # of equal ones the first token
    names = names.gather(1, place)
    missing = max_tokens - tokens.shape[1]  # below 0 it is what is cut off
    sums, names = F.pad(sums, (0, missing)), F.pad(names, (0, missing), value=-1)
    light = sums <= MIN_PROBABILITY
    return (
        names.masked_fill_(light, -1).cpu().numpy(),
        sums.masked_fill(light, 0.0).cpu().numpy(),
    )
