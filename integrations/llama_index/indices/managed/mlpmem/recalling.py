"""What a memory recalls, as a retriever: the sentences that taught it what is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from llama_index.indices.managed.mlpmem.attribution import LABEL, labelled, text_node
from llama_index.indices.managed.mlpmem.refused import check_question
from llama_index.indices.managed.mlpmem.rows import Rows
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.late_interaction import CANDIDATES
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.provenance import Recalled
from mlpmem_rag.questions import Question

RECALLED = "recalled"
MEANT = "mlpmem_recalled"
"""Key of a node's metadata: the learned question that its sentence answers, and its answer."""


class RecallRetriever(BaseRetriever):
    """Finds the sentences behind the learned questions that a question is recalled as.

    A question is compared with learned questions rather than with passages, so that the sentence
    with the answer is found where the words are others. Nothing is found in documents that have
    changed since, and nothing once the rows of the training are gone.

    Args:
        model: the memory.
        rows: gives what the last training kept.
        stale: gives the documents that are not as the memory learned them.
        similarity_top_k: sentences, at most; a small base model reads one best.
        callback_manager: LlamaIndex's callbacks.

    Raises:
        ConfigError: the memory was taught no questions, nothing of its training was kept, or less
            than one sentence is asked for.
    """

    def __init__(
        self,
        model: MemoryModel,
        rows: Callable[[], Rows | None],
        stale: Callable[[], Mapping[str, str]] = dict,
        *,
        similarity_top_k: int = 1,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if similarity_top_k < 1:
            raise ConfigError(f"similarity_top_k = {similarity_top_k}: allowed are 1 or more")
        if not model.model.memory.config.num_questions:
            raise ConfigError(
                "this memory was taught no questions, so that it recalls none; train it with the "
                "recipe self-study"
            )
        if rows() is None:
            raise ConfigError(
                "the sentences that taught this memory were not kept: its work/ folder is gone, "
                "or of another training. Train again, or give passages of your own"
            )
        self._model = model
        self._rows = rows
        self._stale = stale
        self.similarity_top_k = similarity_top_k
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        check_question(query_bundle.query_str)
        rows = self._rows()
        if rows is None:
            return []
        stale = self._stale()
        found = self._model.recalled(query_bundle.query_str, rows.provenance, top_k=CANDIDATES)
        nodes = [
            NodeWithScore(
                node=labelled(
                    text_node(rows.document(one.question), one.question.source),
                    {
                        LABEL: RECALLED,
                        MEANT: {"question": one.question.text, "answer": one.question.answer},
                    },
                ),
                score=one.score,
            )
            for one in found
            if rows.document(one.question) not in stale
        ]
        return nodes[: self.similarity_top_k]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def recalled_of(found: NodeWithScore) -> Recalled:
    """What a node of a `RecallRetriever` was made of.

    Raises:
        ConfigError: it is another retriever's.
    """
    node = found.node
    meant = node.metadata.get(MEANT)
    if meant is None:
        raise ConfigError(
            "a node that no memory has recalled; allowed are those of a RecallRetriever. For "
            "other passages take MemoryRAGQueryEngine"
        )
    text = node.get_content(MetadataMode.NONE)
    question = Question(meant["question"], meant["answer"], text, node.ref_doc_id or "")
    return Recalled(question, found.get_score())
