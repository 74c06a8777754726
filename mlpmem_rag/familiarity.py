"""What is familiar: a few vectors that stand for all questions a memory has learned.

A request that is far from all of them is one that the memory was not taught to answer. Their
number is limited, so that a request costs the same whatever the size of the corpus.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag.index import CPU, import_faiss
from mlpmem_rag.query import Vectors

QUESTIONS_EACH = 4
MAX_PROTOTYPES = 8192
MAX_SAMPLE = 64
"""Vectors for each prototype beyond which more of them change little."""
ROUNDS = 3
BLOCK = 8192
"""Vectors that are compared with all centres at one time, on a GPU."""


def num_prototypes(vectors: Vectors) -> int:
    """M for the vectors of so many questions; 0 where there is no encoder. *Shape:* (G, Q)."""
    questions, width = vectors.shape
    return min(MAX_PROTOTYPES, questions // QUESTIONS_EACH) if width else 0


def find_prototypes(
    vectors: Vectors, count: int, *, seed: int, device: torch.device = CPU
) -> Vectors:
    """Centres of spherical k-means; of fewer vectors than M, some more than once.

    By FAISS on a CPU, by torch on a GPU.

    *Shape:* (G, Q), length 1 -> (M, Q), length 1; zeros, which nothing is near to, of no vectors.
    """
    found = min(count, len(vectors))
    if not found:
        return np.zeros((count, vectors.shape[1]), dtype=np.float32)
    centres = (
        centres_by_torch(vectors, found, seed, device)
        if device.type == "cuda"
        else centres_by_faiss(vectors, found, seed)
    )
    return np.resize(centres, (count, centres.shape[1]))


def centres_by_faiss(vectors: Vectors, count: int, seed: int) -> Vectors:
    """*Shape:* (G, Q) -> (M, Q)."""
    kmeans = import_faiss().Kmeans(
        vectors.shape[1],
        count,
        niter=ROUNDS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_SAMPLE,
    )
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    centres: Vectors = kmeans.centroids
    return centres


def centres_by_torch(vectors: Vectors, count: int, seed: int, device: torch.device) -> Vectors:
    """*Shape:* (G, Q) -> (M, Q)."""
    generator = np.random.default_rng(seed)
    size = min(len(vectors), MAX_SAMPLE * count)
    sample = np.sort(generator.choice(len(vectors), size=size, replace=False))
    points = torch.from_numpy(np.asarray(vectors[sample], dtype=np.float32)).to(device)

    def some_points() -> Tensor:
        return points[torch.from_numpy(generator.choice(size, size=count, replace=False))]

    centres = some_points()
    for _ in range(ROUNDS):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in points.split(BLOCK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        # A centre that lost all its vectors starts again at one of them.
        lost = torch.bincount(nearest, minlength=count) == 0
        centres = F.normalize(torch.where(lost[:, None], some_points(), sums), dim=1)
    found: Vectors = centres.cpu().numpy()
    return found
