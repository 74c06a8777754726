"""Sources of an answer: the training rows behind it, or else nodes that are like it.

A memory reads nothing at answer time, so that no source is known beforehand. Where training kept
its rows, an answer is traced to them. Otherwise the nodes most similar to question and answer are
given, and labelled as found after the fact.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import (
    BaseNode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from llama_index.indices.managed.mlpmem.documents import document_id
from llama_index.indices.managed.mlpmem.refused import check_question
from llama_index.indices.managed.mlpmem.rows import Rows
from llama_index.indices.managed.mlpmem.search import NodeSearch, node_text, words
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.prompts import Message
from mlpmem_rag.provenance import Origin

TRACED = "training rows"
SIMILAR = "post-hoc similarity"
LABEL = "mlpmem_attribution"
TAUGHT = "mlpmem_taught"
"""Key of a source's metadata: what the rows were, by token."""


@dataclass
class AnsweredQuery(QueryBundle):
    """A question with the answer whose sources are looked for.

    Attributes:
        answer: the text.
        messages: what the model read before it; without them, the question alone.
    """

    answer: str = ""
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Attribution:
    """Finds sources among the nodes of an index.

    Attributes:
        model: the memory that answers.
        nodes: gives the index's nodes as they are now.
        search: finds similar ones.
        rows: gives the rows of the last training; None: they were not kept.
        stale: gives the documents that are not as the memory learned them.
    """

    model: MemoryModel
    nodes: Callable[[], list[BaseNode]]
    search: NodeSearch
    rows: Callable[[], Rows | None]
    stale: Callable[[], Mapping[str, str]]

    def label(self, asked: AnsweredQuery) -> str:
        """How the sources of an answer are found."""
        return SIMILAR if self._rows_for(asked) is None else TRACED

    def similar(self, question: str, answer: str, top_k: int) -> list[NodeWithScore]:
        """Nodes like question and answer together."""
        found = self.search.search(self.nodes(), f"{question} {answer}".strip(), top_k)
        return [
            NodeWithScore(node=labelled(item.node, {LABEL: SIMILAR}), score=item.score)
            for item in found
        ]

    def sources(self, asked: AnsweredQuery, top_k: int) -> list[NodeWithScore]:
        """The nodes that taught an answer, scored by the share of its tokens that they hold."""
        if (rows := self._rows_for(asked)) is None:
            return self.similar(asked.query_str, asked.answer, top_k)
        origins = self._origins(asked, rows)
        nodes: dict[str, BaseNode] = {}
        taught: dict[str, list[dict[str, str | None]]] = {}
        learned = self._learned()
        for token, origin in origins:
            if origin is not None:
                document = rows.document(origin)
                node = _node(learned.get(document, ()), document, rows.text(origin, self.model))
                nodes[node.node_id] = node
                told = {"token": token, "question": origin.question}
                taught.setdefault(node.node_id, []).append(told)
        counts = Counter({name: len(tokens) for name, tokens in taught.items()})
        return [
            NodeWithScore(
                node=labelled(nodes[name], {LABEL: TRACED, TAUGHT: taught[name]}),
                score=count / len(origins),
            )
            for name, count in counts.most_common(top_k)
        ]

    def staleness(self, asked: AnsweredQuery, top_k: int) -> dict[str, Any]:
        """Which documents are stale, and which of them an answer has to do with.

        New text is found by its likeness to question and answer: half as like as the nearest text
        that was learned, or more. Text that is gone is found by the rows it left. Where these were
        not kept, an answer may come from any deleted document.
        """
        stale = dict(self.stale())
        if not stale:
            return {"stale_documents": {}, "touched_stale": []}
        text = f"{asked.query_str} {asked.answer}".strip()
        similar = self.similar(asked.query_str, asked.answer, top_k)
        like = [found.get_score() for found in similar if document_id(found.node) not in stale]
        touched: set[str] = set()
        if (rows := self._rows_for(asked)) is not None:
            origins = {origin for _, origin in self._origins(asked, rows) if origin is not None}
            touched = {rows.document(origin) for origin in origins}
            taught = {rows.text(origin, self.model) for origin in origins}
            like += self.search.likeness(sorted(taught), text)
        enough = max([0.0, *like]) / 2
        touched |= {document_id(found.node) for found in similar if found.get_score() >= enough}
        if self.rows() is None:
            touched |= {name for name, why in stale.items() if why == "deleted"}
        return {"stale_documents": stale, "touched_stale": sorted(touched & set(stale))}

    def _rows_for(self, asked: AnsweredQuery) -> Rows | None:
        """The rows that an answer can be traced to; None: there are none, or nothing was said."""
        return self.rows() if asked.answer.strip() else None

    def _origins(self, asked: AnsweredQuery, rows: Rows) -> list[tuple[str, Origin | None]]:
        return self.model.origins(asked.messages or asked.query_str, asked.answer, rows.provenance)

    def _learned(self) -> dict[str, list[BaseNode]]:
        """Nodes by document, of those that are as the memory learned them."""
        stale, found = self.stale(), dict[str, list[BaseNode]]()
        for node in self.nodes():
            if (document := document_id(node)) not in stale:
                found.setdefault(document, []).append(node)
        return found


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
        check_question(query_bundle.query_str)
        if isinstance(query_bundle, AnsweredQuery):
            return self.attribution.sources(query_bundle, self.similarity_top_k)
        return self.attribution.similar(query_bundle.query_str, "", self.similarity_top_k)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(nodes: Sequence[BaseNode], document: str, text: str) -> BaseNode:
    """Of a document's nodes the one in which a text stands; without any, the text itself."""
    if nodes:
        said = set(words(text))
        return max(nodes, key=lambda node: len(said & set(words(node_text(node)))))
    return text_node(document, text)


def text_node(document: str, text: str) -> TextNode:
    """A text of a document, as a node of its own."""
    return TextNode(
        id_=f"{document}#{text}",
        text=text,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)},
    )


def labelled(node: BaseNode, labels: dict[str, Any]) -> BaseNode:
    """A copy that says how it was found, to people and not to models."""
    copy = node.model_copy(deep=True)
    copy.metadata.update(labels)
    for excluded in (copy.excluded_llm_metadata_keys, copy.excluded_embed_metadata_keys):
        excluded.extend(label for label in labels if label not in excluded)
    return copy
