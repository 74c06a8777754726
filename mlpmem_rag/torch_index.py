"""Exact search by torch, for a GPU that FAISS does not know.

The products that choose are in half precision with sums in float32, several times as fast as
float32 on a GPU. Some more than k are chosen, and ordered by their distance in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpmem_rag.nearest import smallest

SPARE = 32
"""Chosen beyond k: what rounding may have put in the wrong order."""
GATHERED = 1 << 28
"""Numbers of chosen keys that are read at one time."""


class TorchIndex:
    """Keys on a device, in blocks as they were added."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._keys: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._halves: list[Tensor] = []

    def add(self, keys: npt.NDArray[np.float32]) -> None:
        """Take a block of keys. *Shape:* (R, D)."""
        block = torch.from_numpy(keys).to(self._device)
        self._keys.append(block)
        self._squares.append(block.square().sum(1))
        self._halves.append(block.to(torch.float16))

    def search(
        self, queries: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Squared distances and numbers of the k nearest, nearest first.

        -1 and infinity stand where there are fewer. *Shapes:* (R, D) -> (R, k), (R, k).
        """
        asked = torch.from_numpy(queries).to(self._device)
        chosen = self._chosen(asked, k + SPARE)
        distances = torch.cat(
            [
                self._exact(asked[rows], chosen[rows])
                for rows in torch.arange(len(asked)).split(
                    max(1, GATHERED // (chosen.shape[1] * asked.shape[1]))
                )
            ]
        )
        values, order = distances.topk(min(k, distances.shape[1]), largest=False)
        return values.cpu().numpy(), chosen.gather(1, order).cpu().numpy()

    def _chosen(self, asked: Tensor, count: int) -> Tensor:
        """Block by block; what is nearest so far goes on. *Shape:* (R, D) -> (R, C)."""
        half = asked.to(torch.float16)
        best = torch.full((len(asked), count), torch.inf, device=self._device)
        found = torch.full((len(asked), count), -1, device=self._device)
        first = 0
        for keys, squares in zip(self._halves, self._squares, strict=True):
            # |q - x|^2 but for |q|^2, which all have in common.
            ranking = torch.add(squares, products(half, keys), alpha=-2)
            values, places = smallest(ranking, min(count, len(keys)))
            best, order = torch.cat([best, values], 1).topk(count, largest=False)
            found = torch.cat([found, places + first], 1).gather(1, order)
            first += len(keys)
        return found

    def _exact(self, asked: Tensor, chosen: Tensor) -> Tensor:
        """*Shapes:* (R, D), (R, C) -> (R, C)."""
        there = torch.empty(*chosen.shape, asked.shape[1], device=self._device)
        first = 0
        for keys in self._keys:
            here = (chosen >= first) & (chosen < first + len(keys))
            there[here] = keys[chosen[here] - first]
            first += len(keys)
        distances = (there - asked[:, None]).square().sum(2)
        return distances.masked_fill(chosen < 0, torch.inf)


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Half-precision factors, float32 sums. *Shapes:* (R, D), (N, D) -> (R, N)."""
    if queries.device.type == "cuda":
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries.float() @ keys.float().T
