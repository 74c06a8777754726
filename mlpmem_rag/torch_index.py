"""Exact search by torch, for a GPU.

The products that choose are in half precision with sums in float32, several times as fast as
float32 on a GPU. Some more than k are chosen, and ordered by their distance in float32. Reading and
writing the distances takes longer than the products, so these give the distances as they are
compared: the squares are further columns of the factors rather than added in a pass of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag.errors import MLPMemError
from mlpmem_rag.nearest import GROUP, smallest

SPARE = 32
"""Chosen beyond k: what rounding may have put in the wrong order."""
COLUMNS = 1 << 18
"""Keys that are compared with at one time: enough to keep a GPU busy."""
ROOM = 1 << 33
"""Bytes for the distances that exist at one time, where a quarter of the free ones is more."""
CPU_ROOM = 1 << 28
ALIGNED = 8
"""Half-precision products are fast where the factors' width is a multiple of this."""
LARGEST, SMALLEST = 65_504.0, 2.0**-14
"""In half precision, with all its digits."""
FLOAT = 4

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Factor:
    """Keys as one side of the product that ranks them.

    Attributes:
        keys: in half precision, behind them half their squares in two columns, in units of
            `unit`: what the first leaves over is in the second. *Shape:* (N, D').
        unit: what the queries have in these two columns.
    """

    keys: Tensor
    unit: float


class TorchIndex:
    """Keys on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._keys: list[Tensor] = []
        self._factors: list[Factor] = []

    def add(self, keys: Floats) -> None:
        """Take a block of keys. *Shape:* (R, D).

        Raises:
            MLPMemError: a key is longer than half precision can hold.
        """
        block = torch.from_numpy(keys).to(self._device)
        self._keys.append(block)
        self._factors.append(key_factor(block))

    def search(self, queries: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Squared distances and numbers of the k nearest, nearest first.

        -1 and infinity stand where there are fewer. *Shapes:* (R, D) -> (R, k), (R, k).
        """
        room = room_for_work(self._device)
        rows, columns = shares(room, len(queries), k + SPARE)
        parts = [
            self._nearest(part, k, columns, room)
            for part in torch.from_numpy(queries).to(self._device).split(rows)
        ]
        distances, found = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        return distances, found

    def _nearest(self, asked: Tensor, k: int, columns: int, room: int) -> tuple[Tensor, Tensor]:
        """*Shape:* (R, D) -> (R, k), (R, k)."""
        chosen = self._chosen(asked, k + SPARE, columns)
        keys = self._all_keys()
        rows = max(1, room // (FLOAT * chosen.shape[1] * keys.shape[1]))
        pairs = zip(asked.split(rows), chosen.split(rows), strict=True)
        distances = torch.cat([exact_distances(keys, q, rows) for q, rows in pairs])
        values, order = distances.topk(k, largest=False)
        return values, chosen.gather(1, order)

    def _chosen(self, asked: Tensor, count: int, columns: int) -> Tensor:
        """Some keys after the other; what is nearest so far goes on. *Shape:* (R, D) -> (R, C)."""
        queries = query_factor(asked)
        best = torch.full((len(asked), count), torch.inf, device=self._device)
        found = torch.full((len(asked), count), -1, device=self._device)
        first = 0
        for factor in self._factors:
            queries[:, asked.shape[1] : asked.shape[1] + 2] = factor.unit
            for keys in factor.keys.split(columns):
                values, places = smallest(products(queries, keys), min(count, len(keys)))
                best, order = torch.cat([best, values], 1).topk(count, largest=False)
                found = torch.cat([found, places + first], 1).gather(1, order)
                first += len(keys)
        return found

    def _all_keys(self) -> Tensor:
        """In one piece. *Shape:* (N, D)."""
        if len(self._keys) > 1:
            self._keys = [torch.cat(self._keys)]
        return self._keys[0]


def key_factor(keys: Tensor) -> Factor:
    """The keys' side. *Shape:* (N, D).

    Raises:
        MLPMemError: a key is longer than half precision can hold.
    """
    squares = keys.square().sum(1)
    longest = math.sqrt(float(squares.max()))
    if not longest <= LARGEST:
        raise MLPMemError(
            f"a key has length {longest:,.0f}: the search on a GPU takes up to {LARGEST:,.0f}; "
            "choose another layer with --layer, or --device cpu"
        )
    unit = 2.0 ** math.ceil(math.log2(max(longest**2 / 2 / LARGEST, SMALLEST)))
    halves = squares / (2 * unit)
    high = halves.half()
    columns = torch.stack([high, (halves - high.float()).half()], 1)
    return Factor(_aligned(torch.cat([keys.half(), columns], 1)), unit)


def query_factor(queries: Tensor) -> Tensor:
    """The queries' side, yet without a unit. *Shape:* (R, D) -> (R, D')."""
    return _aligned(F.pad(-queries.half(), (0, 2)))


def _aligned(factor: Tensor) -> Tensor:
    """With columns of zeros up to a width that is fast. *Shape:* (N, W) -> (N, D')."""
    return F.pad(factor, (0, -factor.shape[1] % ALIGNED)).contiguous()


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Half-precision factors, float32 sums. *Shapes:* (R, D'), (N, D') -> (R, N)."""
    if queries.device.type == "cuda":
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries.float() @ keys.float().T


def exact_distances(keys: Tensor, asked: Tensor, chosen: Tensor) -> Tensor:
    """Squared distances to the chosen keys, infinite where there is none (-1).

    From differences, by a function that reads each chosen key once. *Shapes:* keys (N, D), asked
    (R, D), chosen (R, C) -> (R, C).
    """
    there = keys.index_select(0, chosen.clamp_min(0).flatten()).view(*chosen.shape, -1)
    far = torch.cdist(asked[:, None], there, compute_mode="donot_use_mm_for_euclid_dist")
    return far.squeeze(1).square_().masked_fill_(chosen < 0, torch.inf)


def shares(room: int, rows: int, count: int) -> tuple[int, int]:
    """Of how many rows and columns the distances are computed at one time, in so many bytes.

    Rather of fewer rows than of so few columns that choosing among them costs more than it must.
    """
    least = 4 * GROUP * count
    rows = max(1, min(rows, room // (FLOAT * least)))
    return rows, max(1, min(COLUMNS, room // (FLOAT * rows)))


def room_for_work(device: torch.device) -> int:
    """Bytes for distances; choosing among them takes about half as much again."""
    return min(ROOM, free_bytes(device) // 4) if device.type == "cuda" else CPU_ROOM


def free_bytes(device: torch.device) -> int:
    """What a GPU has left, and what torch keeps there without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept
