"""The query vector travels with the key-value cache: what is asked is said once, at prefill.

It sits in the cache as one more layer, so that transformers' own reordering, repeating, selecting
and resetting of a cache's rows reaches it too.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer


class QueryLayer(DummyLayer):
    """A cache layer without keys and values that holds one vector a row.

    Attributes:
        vectors: what is asked, or the text before. *Shape:* (B, Q).
        asked: whether it is a question.
    """

    def __init__(self, vectors: Tensor, *, asked: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vectors: Tensor | None = vectors
        self.asked = asked

    def reset(self) -> None:
        """Forget the request."""
        self.vectors = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beams ask for. *Shape:* (B',)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows. *Shape:* (B',)."""
        if self.vectors is not None:
            self.vectors = self.vectors.index_select(0, indices.to(self.vectors.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.vectors is not None:
            self.vectors = self.vectors.repeat_interleave(repeats, dim=0)


def cached_query(cache: Cache | None) -> tuple[Tensor | None, bool]:
    """The vectors that an earlier forward pass left in the cache, and whether they are questions.

    *Shape:* (B, Q).
    """
    layer = _query_layer(cache)
    return (None, True) if layer is None else (layer.vectors, layer.asked)


def keep_query(cache: Cache | None, vectors: Tensor, *, asked: bool) -> None:
    """Leave the vectors in a cache that the base model has filled. *Shape:* (B, Q)."""
    if cache is None:
        return
    layer = _query_layer(cache)
    if layer is None:
        cache.layers.append(QueryLayer(vectors, asked=asked))
    else:
        layer.vectors, layer.asked = vectors, asked


def _query_layer(cache: Cache | None) -> QueryLayer | None:
    layers = getattr(cache, "layers", ())
    last = layers[-1] if layers else None
    return last if isinstance(last, QueryLayer) else None
