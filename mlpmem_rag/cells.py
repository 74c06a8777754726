"""Approximate search for every row of a large store at once.

K-means cuts the database into cells. Rows of one cell have their neighbours in much the same
cells, so they are searched together: all of them against all rows of the cells that are nearest to
most of them, in one matrix product. That is exact within these cells, needs no codes, no second
ordering and no index in memory, and reads each cell from a copy of the keys in the cells' order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlpmem_rag.datastore import Datastore
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.index import Floats, Rows, stretches
from mlpmem_rag.nearest import smallest, squared_distances
from mlpmem_rag.storage import allocate_array
from mlpmem_rag.torch_index import free_bytes

PROBES = 96
"""Cells that a group of queries is compared with."""
VOTES = 64
"""Nearest cells that a query votes for."""
GROUP_ROWS = 512
SAMPLED = 40
"""Rows of each cell that k-means sees."""
BLOCK_ROWS = 1024
"""Of a product on a CPU, whose caches then hold them in float32 from the conversion on."""
ROUNDS = 6
SCRATCH = "cells.npy"
"""The keys in the cells' order; of no use when the search is done."""


def num_cells(rows: int) -> int:
    """4 * sqrt(N): ranking the cells then costs about as much as comparing with their rows."""
    return max(1, int(min(4 * np.sqrt(rows), rows / 40)))


def compared_rows(rows: int) -> int:
    """How many of so many rows each is compared with, on average."""
    return min(rows, PROBES * rows // num_cells(rows))


def search_bytes(rows: int, width: int) -> int:
    """Main memory that a search of so many rows takes at most, keys in their file not counted."""
    compared = compared_rows(rows)
    return 5 * (width + GROUP_ROWS) * compared + 8 * GROUP_ROWS * compared + 48 * rows


@dataclass(frozen=True)
class Cells:
    """Rows of a database in the order of their cells.

    Attributes:
        centres: of C cells, less the keys' mean. *Shape:* (C, D).
        starts: where each cell begins among the rows. *Shape:* (C + 1,).
        rows: of the datastore. *Shape:* (N,).
        keys: of these rows, on a GPU or mapped from a file. *Shape:* (N, D), float16.
        squares: of these keys less the mean. *Shape:* (N,).
    """

    centres: Tensor
    starts: Rows
    rows: Rows
    keys: Tensor
    squares: Tensor


class CellSearch:
    """Search within the cells that are nearest to each group of queries."""

    def __init__(
        self,
        datastore: Datastore,
        database: Rows,
        centre: Floats,
        device: torch.device,
        folder: Path,
        *,
        probes: int = PROBES,
    ) -> None:
        self._datastore = datastore
        self._centre = torch.from_numpy(centre).to(device)
        self._probes = probes
        centres = find_centres(datastore, database, self._centre)
        own = nearest_cells(datastore, np.arange(datastore.num_rows), self._centre, centres)
        self._own = own
        self._cells = order_by_cell(
            datastore, database, own[database], self._centre, centres, folder
        )
        self._buffers: dict[str, Tensor] = {}

    def groups(self) -> Iterator[Rows]:
        """All rows of the datastore, those of one cell together."""
        order = np.argsort(self._own, kind="stable")
        starts = np.searchsorted(self._own[order], np.arange(len(self._cells.centres) + 1))
        for first, last in itertools.pairwise(starts):
            yield from stretches(order[first:last], GROUP_ROWS)

    def search(self, rows: Rows, k: int) -> tuple[Rows, Floats]:
        """The k nearest of each row that the cells hold; -1 where there are fewer.

        *Shape:* (R,) -> (R, k), (R, k).
        """
        cells = self._cells
        queries = torch.from_numpy(self._datastore.keys(rows)).to(self._centre.device)
        queries -= self._centre
        spans = self._spans(queries, k)
        numbers = np.concatenate([cells.rows[first:last] for first, last in spans])
        distances = self._distances(queries, spans, len(numbers))
        most = min(k, len(numbers))
        nearest, places = smallest(distances, most)
        found = np.full((len(rows), k), -1, dtype=np.int64)
        out = np.full((len(rows), k), np.inf, dtype=np.float32)
        found[:, :most] = numbers[places.cpu().numpy()]
        out[:, :most] = nearest.cpu().numpy()
        return found, out

    def _spans(self, queries: Tensor, k: int) -> list[tuple[int, int]]:
        """Where the chosen cells begin and end, in their order; enough for k rows."""
        starts = self._cells.starts
        chosen = chosen_cells(queries, self._cells.centres, self._probes)
        sizes = np.cumsum(starts[chosen + 1] - starts[chosen])
        enough = int(np.searchsorted(sizes, min(k, len(self._cells.rows)))) + 1
        probed = np.sort(chosen[: max(self._probes, enough)])
        return [(int(starts[c]), int(starts[c + 1])) for c in probed]

    def _distances(self, queries: Tensor, spans: list[tuple[int, int]], size: int) -> Tensor:
        """To all rows of the spans. *Shape:* (R, D) -> (R, M).

        In memory that is used again: fresh pages would cost more than the products.
        """
        out = self._scratch("distances", len(queries), size, queries.device)
        most = size if queries.is_cuda else BLOCK_ROWS
        done = 0
        for block in blocks(spans, most):
            keys, squares = self._gathered(block)
            here = out[:, done : done + len(keys)]
            squared_distances(queries, keys, squares, out=here)
            done += len(keys)
        return out

    def _gathered(self, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Keys less their mean and the squares of these. *Shapes:* (M, D), (M,)."""
        cells, device = self._cells, self._centre.device
        size = sum(last - first for first, last in spans)
        keys = self._scratch("keys", size, len(self._centre), device)
        squares = self._scratch("squares", 1, size, device)[0]
        done = 0
        for first, last in spans:
            here = slice(done, done + last - first)
            keys[here].copy_(cells.keys[first:last])
            squares[here] = cells.squares[first:last]
            done += last - first
        return keys.sub_(self._centre), squares

    def _scratch(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        numbers = self._buffers.get(name)
        if numbers is None or len(numbers) < rows * columns:
            numbers = torch.empty(rows * columns * 5 // 4, device=device)
            self._buffers[name] = numbers
        return numbers[: rows * columns].view(rows, columns)


def blocks(spans: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Spans, cut where need be, in groups of at most so many rows."""
    block, room = list[tuple[int, int]](), most
    for first, last in spans:
        while first < last:
            end = min(last, first + room)
            block.append((first, end))
            first, room = end, room - (end - first)
            if not room:
                yield block
                block, room = [], most
    if block:
        yield block


def find_centres(datastore: Datastore, database: Rows, centre: Tensor) -> Tensor:
    """K-means on a sample; `centre` is taken off the keys. *Shapes:* (D,) -> (C, D)."""
    count = num_cells(len(database))
    generator = np.random.default_rng(0)
    size = min(len(database), SAMPLED * count)
    sample = np.sort(generator.choice(database, size=size, replace=False))
    keys = torch.from_numpy(datastore.keys(sample)).to(centre.device) - centre
    centres = keys[torch.from_numpy(generator.choice(size, size=count, replace=False))]
    for _ in range(ROUNDS):
        cell = torch.cat([centre_ranking(part, centres).argmin(1) for part in keys.split(8192)])
        sizes = torch.bincount(cell, minlength=count)
        centres = torch.zeros_like(centres).index_add_(0, cell, keys)
        centres /= sizes.clamp_min(1)[:, None]
        # A cell that lost all its rows starts again at one of them.
        again = torch.from_numpy(generator.choice(size, size=count, replace=False))
        centres = torch.where(sizes[:, None] > 0, centres, keys[again])
    return centres


def centre_ranking(queries: Tensor, centres: Tensor) -> Tensor:
    """Squared distance to each cell's centre, but for what all cells have in common.

    In bfloat16 where that is fast: which cells come first is a guess in any case.
    *Shapes:* (R, D), (C, D) -> (R, C).
    """
    dtype = torch.bfloat16 if has_bfloat16(queries.device) else torch.float32
    products = queries.to(dtype) @ centres.to(dtype).T
    return torch.add(centres.square().sum(1), products.float(), alpha=-2)


def nearest_cells(datastore: Datastore, rows: Rows, centre: Tensor, centres: Tensor) -> Rows:
    """The cell of each row. *Shape:* (R,) -> (R,)."""
    found = np.empty(len(rows), dtype=np.int64)
    done = 0
    for here in stretches(rows, 8192):
        keys = torch.from_numpy(datastore.keys(here)).to(centres.device) - centre
        cell = centre_ranking(keys, centres).argmin(1).cpu().numpy()
        found[done : done + len(here)] = cell
        done += len(here)
    return found


def chosen_cells(queries: Tensor, centres: Tensor, probes: int) -> Rows:
    """All cells, those first that most queries have among their nearest. *Shape:* (R, D) -> (C,).

    A query's nearest cell counts 1, its second 1/2, its third 1/3, …
    """
    ranking = centre_ranking(queries, centres)
    votes = min(max(VOTES, probes // 2), len(centres))
    nearest = ranking.topk(votes, largest=False).indices
    weight = 1.0 / torch.arange(1, votes + 1, device=queries.device)
    score = torch.zeros(len(centres), device=queries.device)
    score.index_add_(0, nearest.flatten(), weight.repeat(len(queries)))
    # Cells without a vote come last, the nearer ones first.
    score -= 1e-6 * ranking.mean(0).argsort().argsort() / len(centres)
    order: Rows = score.argsort(descending=True).cpu().numpy()
    return order


def order_by_cell(
    datastore: Datastore, database: Rows, cell: Rows, centre: Tensor, centres: Tensor, folder: Path
) -> Cells:
    """Copy the keys of the database in the order of their cells. *Shapes:* (N,), (N,)."""
    order = np.argsort(cell, kind="stable")
    rows = database[order]
    starts = np.searchsorted(cell[order], np.arange(len(centres) + 1))
    shape = (len(rows), datastore.key_size)
    keys = torch.from_numpy(allocate_array(folder / SCRATCH, np.float16, shape))
    if fits(keys.nbytes, centre.device):
        keys = torch.empty(shape, dtype=torch.float16, device=centre.device)
    squares = torch.empty(len(rows), device=centre.device)
    done = 0
    for here in stretches(rows):
        stored = torch.from_numpy(datastore.stored_keys(here)).to(centre.device)
        keys[done : done + len(here)] = stored
        squares[done : done + len(here)] = (stored.float() - centre).square().sum(1)
        done += len(here)
    return Cells(centres, starts, rows, keys, squares)


def fits(size: int, device: torch.device) -> bool:
    """Whether a GPU has room for so many bytes and as much again for the work on them."""
    return device.type == "cuda" and 2 * size < free_bytes(device)
