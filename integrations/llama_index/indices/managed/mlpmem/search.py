"""An index's nodes: read from their store once, and found by their likeness to a text."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.core.storage.docstore.types import BaseDocumentStore
from sklearn.feature_extraction.text import TfidfVectorizer

from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.query import QueryEncoder

_WORD = re.compile(r"\w+")

Scores = np.ndarray[Any, Any]


def node_text(node: BaseNode) -> str:
    """What a node says, without its metadata."""
    return node.get_content(metadata_mode=MetadataMode.NONE)


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


class StoredNodes:
    """Nodes as a document store has them; each is parsed once as long as its hash is the same."""

    def __init__(self, store: BaseDocumentStore) -> None:
        self._store = store
        self._read: dict[str, tuple[str, BaseNode]] = {}
        self._last: list[BaseNode] = []
        self._lock = threading.Lock()

    def get(self, names: Sequence[str]) -> list[BaseNode]:
        """The nodes of these ids that are there; the same list as before if nothing changed."""
        with self._lock:
            found = [node for name in names if (node := self._node(name)) is not None]
            if list(map(id, found)) != list(map(id, self._last)):
                self._last = found
                self._read = {name: self._read[name] for name in names if name in self._read}
            return self._last

    def forget(self, names: Sequence[str]) -> None:
        """Parse these again: what a hash does not cover may have changed."""
        with self._lock:
            for name in names:
                self._read.pop(name, None)

    def _node(self, name: str) -> BaseNode | None:
        digest = self._store.get_document_hash(name)
        known = self._read.get(name)
        if known is not None and known[0] == digest:
            return known[1]
        node = self._store.get_node(name, raise_error=False)
        if node is not None and digest is not None:
            self._read[name] = digest, node
        return node


class NodeSearch:
    """Nodes by their likeness to a text: by the memory's own encoder, else by shared words.

    What was made of a node is kept as long as it is the same object (see `StoredNodes`), and the
    memory has the same encoder.
    """

    def __init__(self, model: MemoryModel) -> None:
        self._model = model
        self._encoder: QueryEncoder | None = None
        self._vectors: dict[str, tuple[BaseNode, Scores]] = {}
        self._nodes: Sequence[BaseNode] | None = None  # those that the matrix is of
        self._matrix: Any = None
        self._words: Any = None
        self._lock = threading.Lock()

    def search(self, nodes: Sequence[BaseNode], text: str, top_k: int) -> list[NodeWithScore]:
        """The most similar nodes with their cosine, best first."""
        if not nodes:
            return []
        with self._lock:
            if self._encoder is not self._model.encoder:  # another training's
                self._encoder, self._vectors, self._nodes = self._model.encoder, {}, None
            scores = (
                self._by_words(nodes, text)
                if self._encoder is None
                else self._by_vectors(self._encoder, nodes, text)
            )
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [NodeWithScore(node=nodes[n], score=float(scores[n])) for n in best]

    def likeness(self, texts: Sequence[str], text: str) -> list[float]:
        """Cosines of texts that are no nodes; of nothing where words are compared."""
        encoder = self._model.encoder
        if encoder is None or not texts:
            return []
        one, *others = encoder.encode([text, *texts])
        return [float(other @ one) for other in others]

    def _by_vectors(self, encoder: QueryEncoder, nodes: Sequence[BaseNode], text: str) -> Scores:
        if nodes is not self._nodes:
            self._nodes, self._matrix = nodes, self._encoded(encoder, nodes)
        scores: Scores = self._matrix @ encoder.encode([text])[0]
        return scores

    def _encoded(self, encoder: QueryEncoder, nodes: Sequence[BaseNode]) -> Scores:
        known = {n.node_id: v for n in nodes if (v := self._vectors.get(n.node_id)) and v[0] is n}
        if missing := [node for node in nodes if node.node_id not in known]:
            vectors = encoder.encode([node_text(node) for node in missing])
            known |= {n.node_id: (n, v) for n, v in zip(missing, vectors, strict=True)}
        self._vectors = known
        return np.stack([known[node.node_id][1] for node in nodes])

    def _by_words(self, nodes: Sequence[BaseNode], text: str) -> Scores:
        if nodes is not self._nodes:
            self._words = TfidfVectorizer(analyzer=lambda t: words(t) or [""])  # never no words
            self._matrix = self._words.fit_transform(map(node_text, nodes))
            self._nodes = nodes
        scores: Scores = (self._matrix @ self._words.transform([text]).T).toarray()[:, 0]
        return scores
