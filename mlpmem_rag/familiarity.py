"""What is familiar: a few vectors that stand for all questions a memory has learned.

A request that is far from all of them is one that the memory was not taught to answer. Their
number is limited, so that a request costs the same whatever the size of the corpus.
"""

from __future__ import annotations

import numpy as np

from mlpmem_rag.index import import_faiss
from mlpmem_rag.query import Vectors

QUESTIONS_EACH = 4
MAX_PROTOTYPES = 8192
MAX_SAMPLE = 64
"""Vectors for each prototype beyond which more of them change little."""
ROUNDS = 3


def num_prototypes(vectors: Vectors) -> int:
    """M for the vectors of so many questions; 0 where there is no encoder. *Shape:* (G, Q)."""
    questions, width = vectors.shape
    return min(MAX_PROTOTYPES, questions // QUESTIONS_EACH) if width else 0


def find_prototypes(vectors: Vectors, count: int, *, seed: int) -> Vectors:
    """Centres of spherical k-means; of fewer vectors than M, some more than once.

    *Shape:* (G, Q), length 1 -> (M, Q), length 1; zeros, which nothing is near to, of no vectors.
    """
    found = min(count, len(vectors))
    if not found:
        return np.zeros((count, vectors.shape[1]), dtype=np.float32)
    kmeans = import_faiss().Kmeans(
        vectors.shape[1],
        found,
        niter=ROUNDS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=MAX_SAMPLE,
    )
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    centres: Vectors = kmeans.centroids
    return np.resize(centres, (count, centres.shape[1]))
