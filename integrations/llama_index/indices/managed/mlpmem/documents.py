"""LlamaIndex's documents and nodes as a corpus."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_index.core.schema import BaseNode, MetadataMode, TextNode

from mlpmem_rag.corpus import Corpus, make_corpus
from mlpmem_rag.readers import Record


def document_id(node: BaseNode) -> str:
    """Id of the document that a node is part of; a node of no document is one."""
    return node.ref_doc_id or node.node_id


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus whose ids are the same each time that the same documents are read.

    Attributes:
        corpus: what is trained on.
        names: id in the corpus -> id of the document. They differ where a reader made up the
            latter: LlamaIndex's give a random one each time.
    """

    corpus: Corpus
    names: dict[str, str]


def corpus_of_documents(documents: Iterable[BaseNode]) -> NamedCorpus:
    """A corpus of whole documents, without their metadata but for a title.

    Raises:
        CorpusError: no document holds text.
    """
    return _named(
        Record(
            text=document.get_content(metadata_mode=MetadataMode.NONE),
            title=_title(document),
            id=document.node_id,
        )
        for document in documents
    )


def corpus_of_nodes(nodes: Iterable[BaseNode]) -> NamedCorpus:
    """A corpus of the documents that nodes were cut from, put together again.

    Raises:
        CorpusError: no node holds text.
    """
    return _named(
        Record(text=joined(group), title=_title(group[0]), id=document)
        for document, group in _by_document(nodes).items()
    )


def learned_digest(document: BaseNode) -> str:
    """Tells whether a document says the same as before: its title and its words, nothing else."""
    words = " ".join(document.get_content(metadata_mode=MetadataMode.NONE).split())
    return hashlib.sha256(f"{_title(document)}\n{words}".encode(errors="replace")).hexdigest()


def node_digests(nodes: Iterable[BaseNode]) -> dict[str, str]:
    """The same of documents as their nodes have them: id of the document -> digest."""
    return {
        document: learned_digest(TextNode(text=joined(group), metadata={"title": _title(group[0])}))
        for document, group in _by_document(nodes).items()
    }


def _by_document(nodes: Iterable[BaseNode]) -> dict[str, list[BaseNode]]:
    parts: dict[str, list[BaseNode]] = {}
    for node in nodes:
        parts.setdefault(document_id(node), []).append(node)
    return parts


def _named(records: Iterable[Record]) -> NamedCorpus:
    lasting: list[Record] = []
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for record in records:
        given = record.id or ""
        name = given
        if _is_random(given):
            digest = hashlib.sha256(f"{record.title}\n{record.text}".encode()).hexdigest()[:32]
            seen[digest] += 1
            name = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        lasting.append(replace(record, id=name))
        names[name] = given
    return NamedCorpus(make_corpus(lasting), names)


def _is_random(name: str) -> bool:
    try:
        return uuid.UUID(name).version == 4
    except ValueError:
        return False


def joined(nodes: Sequence[BaseNode]) -> str:
    """The text of neighbouring nodes, what they share said once.

    Nodes that know their place (those of LlamaIndex's splitters do) are laid out by it; others
    follow one another as paragraphs.
    """
    placed = [
        (node.start_char_idx, node.end_char_idx, node.text)
        for node in nodes
        if isinstance(node, TextNode)
        and node.start_char_idx is not None
        and node.end_char_idx is not None
        and node.end_char_idx - node.start_char_idx == len(node.text)
    ]
    if len(placed) < len(nodes):
        texts = (node.get_content(metadata_mode=MetadataMode.NONE) for node in nodes)
        return "\n\n".join(texts)
    text, end = "", 0
    for start, stop, part in sorted(placed):
        if stop <= end:
            continue
        # Splitters drop white space between nodes, never anything else.
        text += "\n" if text and start > end else ""
        text += part[max(0, end - start) :] if text else part
        end = stop
    return text


def _title(node: BaseNode) -> str | None:
    title = node.metadata.get("title")
    return title if isinstance(title, str) else None
