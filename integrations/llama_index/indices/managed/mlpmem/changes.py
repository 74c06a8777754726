"""Documents that come, go and change, and what the memory does not know of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, Document

from llama_index.indices.managed.mlpmem.asking import AskedIndex
from llama_index.indices.managed.mlpmem.documents import document_id, learned_digest


class ChangingIndex(AskedIndex):
    """An index that keeps its nodes right, and notes what its memory has not learned."""

    _changing: threading.RLock
    """Held while the notes change."""

    def insert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Add a document, which is stale until the memory is trained again."""
        super().insert(document, **insert_kwargs)
        self._settle(document)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:  # noqa: ANN401
        """Like `insert`."""
        await super().ainsert(document, **insert_kwargs)
        self._settle(document)

    def delete_ref_doc(
        self,
        ref_doc_id: str,
        delete_from_docstore: bool = False,
        **delete_kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take a document out; the memory knows it until it is trained again."""
        info = self._docstore.get_ref_doc_info(ref_doc_id)
        nodes = [] if info is None else list(info.node_ids)
        super().delete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        self._forget(ref_doc_id, nodes)

    async def adelete_ref_doc(
        self,
        ref_doc_id: str,
        delete_from_docstore: bool = False,
        **delete_kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Like `delete_ref_doc`."""
        info = await self._docstore.aget_ref_doc_info(ref_doc_id)
        nodes = [] if info is None else list(info.node_ids)
        await super().adelete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        self._forget(ref_doc_id, nodes)

    # What BaseIndex asks for.

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:  # noqa: ANN401
        struct = self._index_struct
        self._stored.forget([node.node_id for node in nodes])
        with self._changing:
            for node in nodes:
                if node.node_id not in struct.nodes:
                    struct.nodes.append(node.node_id)
                struct.inserted(document_id(node))

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:  # noqa: ANN401
        struct = self._index_struct
        if node_id not in struct.nodes:
            return
        node = self._docstore.get_node(node_id, raise_error=False)
        document = node_id if node is None else document_id(node)
        info = self._docstore.get_ref_doc_info(document)
        with self._changing:
            struct.nodes.remove(node_id)
            if info is not None and not set(info.node_ids).isdisjoint(struct.nodes):
                struct.present.pop(document, None)
                struct.inserted(document)  # a part of it is still there
            else:
                struct.deleted(document)

    def _forget(self, document: str, nodes: Sequence[str]) -> None:
        """Of a document's nodes LlamaIndex deletes every other one only from the index."""
        struct = self._index_struct
        if nodes:
            with self._changing:
                struct.nodes = [node for node in struct.nodes if node not in nodes]
                struct.deleted(document)
            self._storage_context.index_store.add_index_struct(struct)

    def _settle(self, document: Document) -> None:
        with self._changing:
            self._index_struct.settled(document.id_, learned_digest(document), document.hash)
        self._storage_context.index_store.add_index_struct(self._index_struct)
