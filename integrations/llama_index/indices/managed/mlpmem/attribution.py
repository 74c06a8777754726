"""Sources of an answer: the training rows behind it, or else nodes that are like it.

A memory reads nothing at answer time, so that no source is known beforehand. Where training kept
its rows, an answer is traced to them. Otherwise the nodes most similar to question and answer are
given, and labelled as found after the fact.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from sklearn.feature_extraction.text import TfidfVectorizer

from llama_index.indices.managed.mlpmem.documents import document_id
from llama_index.indices.managed.mlpmem.refused import check_question
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.provenance import Origin, Provenance
from mlpmem_rag.query import QueryEncoder

TRACED = "training rows"
SIMILAR = "post-hoc similarity"
LABEL = "mlpmem_attribution"
TAUGHT = "mlpmem_taught"
"""Key of a source's metadata: what the rows were, by token."""

_WORD = re.compile(r"\w+")


@dataclass
class AnsweredQuery(QueryBundle):
    """A question with the answer whose sources are looked for."""

    answer: str = ""


class LazyNodes(Sequence[NodeWithScore]):
    """Sources that are looked for when somebody wants to see them."""

    def __init__(self, find: Callable[[], list[NodeWithScore]]) -> None:
        self._find = find
        self._found: list[NodeWithScore] | None = None
        self._lock = threading.Lock()

    def _nodes(self) -> list[NodeWithScore]:
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def __len__(self) -> int:
        """Number of sources."""
        return len(self._nodes())

    def __iter__(self) -> Iterator[NodeWithScore]:
        """Each source."""
        return iter(self._nodes())

    @overload
    def __getitem__(self, place: int) -> NodeWithScore: ...
    @overload
    def __getitem__(self, place: slice) -> list[NodeWithScore]: ...
    def __getitem__(self, place: int | slice) -> NodeWithScore | list[NodeWithScore]:
        """One source or several."""
        return self._nodes()[place]

    def __add__(self, other: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        """These sources and others."""
        return [*self._nodes(), *other]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy holds the sources themselves."""
        return list, (self._nodes(),)


class NodeSearch:
    """Nodes by their likeness to a text: by the memory's own encoder, else by shared words."""

    def __init__(self, model: MemoryModel) -> None:
        self._model = model
        self._vectors: dict[str, np.ndarray[Any, Any]] = {}  # node hash -> vector
        self._lock = threading.Lock()

    def search(self, nodes: Sequence[BaseNode], text: str, top_k: int) -> list[NodeWithScore]:
        """The most similar nodes with their cosine, best first."""
        if not nodes:
            return []
        with self._lock:
            scores = (
                self._by_words(nodes, text)
                if self._model.encoder is None
                else self._by_vectors(self._model.encoder, nodes, text)
            )
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [NodeWithScore(node=nodes[n], score=float(scores[n])) for n in best]

    def _by_vectors(
        self, encoder: QueryEncoder, nodes: Sequence[BaseNode], text: str
    ) -> np.ndarray[Any, Any]:
        if missing := [node for node in nodes if node.hash not in self._vectors]:
            vectors = encoder.encode([_text(node) for node in missing])
            self._vectors |= {n.hash: v for n, v in zip(missing, vectors, strict=True)}
        known = np.stack([self._vectors[node.hash] for node in nodes])
        scores: np.ndarray[Any, Any] = known @ encoder.encode([text])[0]
        return scores

    def _by_words(self, nodes: Sequence[BaseNode], text: str) -> np.ndarray[Any, Any]:
        vectorizer = TfidfVectorizer()
        matrix = vectorizer.fit_transform([*map(_text, nodes), text])
        scores: np.ndarray[Any, Any] = (matrix[:-1] @ matrix[-1].T).toarray()[:, 0]
        return scores


@dataclass(frozen=True)
class Rows:
    """The rows of a training.

    Attributes:
        provenance: where each of them comes from.
        names: their documents' ids -> those of the index, where they differ.
    """

    provenance: Provenance
    names: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, names: Mapping[str, str]) -> Rows | None:
        """Those that were kept with a memory; None: they were deleted, or not copied with it."""
        try:
            return cls(Provenance.open(folder), names)
        except ArtifactError:
            return None

    def document(self, origin: Origin) -> str:
        """The document of the index that a row comes from."""
        return self.names.get(origin.document, origin.document)

    def text(self, origin: Origin, model: MemoryModel) -> str:
        """What a row was taught with."""
        if origin.question is not None:
            return origin.source
        ids = self.provenance.passage(origin.document, origin.position)
        return str(model.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Attribution:
    """Finds sources among the nodes of an index.

    Attributes:
        model: the memory that answers.
        nodes: gives the index's nodes as they are now.
        search: finds similar ones.
        rows: gives the rows of the last training; None: they were not kept.
    """

    model: MemoryModel
    nodes: Callable[[], list[BaseNode]]
    search: NodeSearch
    rows: Callable[[], Rows | None]

    @property
    def label(self) -> str:
        """How sources of answers are found."""
        return SIMILAR if self.rows() is None else TRACED

    def similar(self, question: str, answer: str, top_k: int) -> list[NodeWithScore]:
        """Nodes like question and answer together."""
        found = self.search.search(self.nodes(), f"{question} {answer}".strip(), top_k)
        return [
            NodeWithScore(node=_labelled(item.node, {LABEL: SIMILAR}), score=item.score)
            for item in found
        ]

    def documents(self, question: str, answer: str) -> set[str]:
        """Documents that the rows behind an answer come from."""
        if (rows := self.rows()) is None:
            return set()
        origins = self.model.origins(question, answer, rows.provenance)
        return {rows.document(origin) for _, origin in origins if origin is not None}

    def sources(self, question: str, answer: str, top_k: int) -> list[NodeWithScore]:
        """The nodes that taught an answer, scored by the share of its tokens that they hold."""
        if (rows := self.rows()) is None:
            return self.similar(question, answer, top_k)
        origins = self.model.origins(question, answer, rows.provenance)
        nodes: dict[str, BaseNode] = {}
        taught: dict[str, list[dict[str, str | None]]] = {}
        here = self.nodes()
        for token, origin in origins:
            if origin is not None:
                node = _node(here, rows.document(origin), rows.text(origin, self.model))
                nodes[node.node_id] = node
                told = {"token": token, "question": origin.question}
                taught.setdefault(node.node_id, []).append(told)
        counts = Counter({name: len(tokens) for name, tokens in taught.items()})
        return [
            NodeWithScore(
                node=_labelled(nodes[name], {LABEL: TRACED, TAUGHT: taught[name]}),
                score=count / len(origins),
            )
            for name, count in counts.most_common(top_k)
        ]

    def staleness(
        self, stale: dict[str, str], question: str, answer: str, top_k: int
    ) -> dict[str, Any]:
        """Which documents are stale, and which of them an answer has to do with.

        New text is found by its likeness to question and answer; text that is gone by the rows
        it left. Where these were not kept, an answer may come from any deleted document.
        """
        if not stale:
            return {"stale_documents": {}, "touched_stale": []}
        touched = self.documents(question, answer)
        touched |= {document_id(found.node) for found in self.similar(question, answer, top_k)}
        if self.rows() is None:
            touched |= {name for name, why in stale.items() if why == "deleted"}
        return {"stale_documents": stale, "touched_stale": sorted(touched & set(stale))}


class AttributionRetriever(BaseRetriever):
    """Sources of an answered query; for a bare question, the nodes most similar to it."""

    def __init__(
        self,
        attribution: Attribution,
        *,
        similarity_top_k: int = 2,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self.attribution = attribution
        self.similarity_top_k = similarity_top_k
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        question, top_k = query_bundle.query_str, self.similarity_top_k
        check_question(question)
        if isinstance(query_bundle, AnsweredQuery) and query_bundle.answer.strip():
            return self.attribution.sources(question, query_bundle.answer, top_k)
        return self.attribution.similar(question, "", top_k)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(nodes: Sequence[BaseNode], document: str, text: str) -> BaseNode:
    """The node of a document in which a text stands; without one, the text itself."""
    words = set(_WORD.findall(text.lower()))
    here = [node for node in nodes if document_id(node) == document]
    if here:
        return max(here, key=lambda n: len(words & set(_WORD.findall(_text(n).lower()))))
    return TextNode(
        id_=f"{document}#{text}",
        text=text,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)},
    )


def _text(node: BaseNode) -> str:
    return node.get_content(metadata_mode=MetadataMode.NONE)


def _labelled(node: BaseNode, labels: dict[str, Any]) -> BaseNode:
    """A copy that says how it was found, to people and not to models."""
    copy = node.model_copy(deep=True)
    copy.metadata.update(labels)
    for excluded in (copy.excluded_llm_metadata_keys, copy.excluded_embed_metadata_keys):
        excluded.extend(label for label in labels if label not in excluded)
    return copy
