"""Nodes put together again are the text they were cut from."""

from __future__ import annotations

import pytest
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode

from llama_index.indices.managed.mlpmem.documents import (
    corpus_of_documents,
    corpus_of_nodes,
    joined,
)
from mlpmem_rag.errors import CorpusError

TEXT = "In the old mill, two surveyors found a map. Nobody asked! Why it had been left there?"


@pytest.mark.parametrize("size", [20, 33, 60, 200])
@pytest.mark.parametrize("overlap", [0, 6, 12])
@pytest.mark.parametrize("between", [" ", "\n\n"])
def test_cut_and_joined_is_the_text(size: int, overlap: int, between: str) -> None:
    text = between.join([TEXT, "The second report, written by another hand, says 42 crowns."])
    splitter = SentenceSplitter(chunk_size=size, chunk_overlap=overlap, tokenizer=list)
    nodes = splitter.get_nodes_from_documents([Document(text=text)])
    assert joined(nodes).split() == text.split()
    assert joined(nodes[::-1]).split() == text.split()


def test_nodes_without_a_place_follow_one_another() -> None:
    assert joined([TextNode(text="One."), TextNode(text="Two.")]) == "One.\n\nTwo."


def test_documents_keep_their_ids_and_lose_their_metadata() -> None:
    documents = [
        Document(text="Some text.", doc_id="a  b", metadata={"file_name": "x.txt"}),
        Document(text="More text.", doc_id="c", metadata={"title": "A title"}),
        Document(text=" \n", doc_id="d"),
        Document(text="Some text.", doc_id="e"),
    ]
    corpus = corpus_of_documents(documents).corpus
    assert [(d.id, d.text) for d in corpus.documents] == [
        ("a  b", "Some text."),
        ("c", "A title\n\nMore text."),
    ]
    assert [(s.source, s.reason) for s in corpus.skipped] == [
        ("d", "empty"),
        ("e", "same text as a  b"),
    ]


def test_nodes_become_their_documents() -> None:
    documents = [
        Document(text="One two three. Four five six.", doc_id="a"),
        Document(text="Seven."),  # an id made up at random
    ]
    nodes = SentenceSplitter(
        chunk_size=16, chunk_overlap=0, tokenizer=list
    ).get_nodes_from_documents(documents)
    assert len(nodes) > 2
    named = corpus_of_nodes(nodes)
    found = {named.names[d.id]: " ".join(d.text.split()) for d in named.corpus.documents}
    assert found == {d.doc_id: d.text for d in documents}
    (alone,) = corpus_of_nodes([TextNode(text="Alone.", id_="n")]).corpus.documents
    assert (alone.id, alone.text) == ("n", "Alone.")


def test_random_ids_do_not_make_another_corpus() -> None:
    texts = ["One.", "Two.", "One.", "One."]
    first, second = (corpus_of_documents([Document(text=t) for t in texts]) for _ in range(2))
    assert first.corpus.fingerprint == second.corpus.fingerprint
    assert len(first.names) == len(set(first.names.values())) == 4
    assert list(first.names) == list(second.names)
    assert set(first.names.values()).isdisjoint(second.names.values())
    other = corpus_of_documents([Document(text=t) for t in ["One.", "Three."]])
    assert other.corpus.fingerprint != first.corpus.fingerprint


@pytest.mark.parametrize("documents", [[], [Document(text="")], [Document(text=" \n ")]])
def test_no_text_is_refused(documents: list[Document]) -> None:
    with pytest.raises(CorpusError, match=r"none of \d documents holds text"):
        corpus_of_documents(documents)


def test_two_documents_of_one_id_are_refused() -> None:
    with pytest.raises(CorpusError, match="an id of its own"):
        corpus_of_documents([Document(text=t, doc_id="a") for t in ("One.", "Two.")])
