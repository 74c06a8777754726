"""The nearest of some keys to each query, by torch, on any device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
"""Columns that are looked at together on a GPU, where selecting costs more than multiplying."""

Places = npt.NDArray[np.int64]


def squared_distances(
    queries: Tensor, keys: Tensor, key_squares: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """|q - x|^2 from one matrix product; may be negative by rounding.

    *Shapes:* queries (R, D), keys (N, D), key_squares (N,) -> (R, N).
    """
    distances = torch.addmm(key_squares, queries, keys.T, alpha=-2, out=out)
    return distances.add_(queries.square().sum(1, keepdim=True))


def smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending, and their columns. *Shape:* (R, N) -> 2 x (R, k)."""
    on_cpu = distances.device.type == "cpu"
    return partitioned_smallest(distances, k) if on_cpu else selected_smallest(distances, k)


def selected_smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `smallest`, by torch's `topk`, of all columns or of few; for a GPU."""
    if distances.shape[1] < 4 * GROUP * k:
        values, places = distances.topk(k, largest=False)
        return values, places
    return grouped_smallest(distances, k)


def partitioned_smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `smallest`, by numpy, whose partition is several times as fast as torch's `topk` on a CPU.

    Rows are shared out among as many threads as torch has; numpy lets go of the interpreter's lock.
    """

    def part(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], Places]:
        found = np.argpartition(rows, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(rows, found, 1)
        order = values.argsort(axis=1)
        return np.take_along_axis(values, order, 1), np.take_along_axis(found, order, 1)

    threads = torch.get_num_threads()
    parts = np.array_split(distances.numpy(), min(threads, len(distances)))
    with ThreadPoolExecutor(threads) as pool:
        values, places = zip(*pool.map(part, parts), strict=True)
    return torch.from_numpy(np.concatenate(values)), torch.from_numpy(np.concatenate(places))


def grouped_smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `smallest`, in two steps, for N at least k * GROUP. Exact.

    The k smallest numbers lie in the k groups of columns with the smallest minima, so that most
    columns are read once and selected from never. *Shape:* (R, N) -> 2 x (R, k).
    """
    columns = distances.shape[1]
    whole = columns - columns % GROUP
    grouped = distances[:, :whole].unflatten(1, (-1, GROUP))
    groups = grouped.amin(2).topk(k, largest=False, sorted=False).indices
    chosen = groups[..., None].expand(-1, -1, GROUP)
    candidates = grouped.gather(1, chosen).flatten(1)
    if whole < columns:  # a few columns are left over: as one more group, which is not full
        candidates = torch.cat([candidates, distances[:, whole:]], 1)
        groups = F.pad(groups, (0, 1), value=whole // GROUP)
    values, within = candidates.topk(k, largest=False)
    return values, groups.gather(1, within // GROUP) * GROUP + within % GROUP
