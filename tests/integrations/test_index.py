"""MLPMemIndex."""

from __future__ import annotations

from llama_index.indices.managed.mlpmem import MLPMemIndex


def test_look(index: MLPMemIndex) -> None:
    engine = index.as_query_engine()
    for q in (
        "Who found wild honey in the old mill?",
        "What did Ines Maro find in Lake Orsa?",
        "Did Ines Maro find a map of the tunnels?",
        "Who is the king?",
    ):
        r = engine.query(q)
        print("Q", q, "A", str(r), r.metadata["mlpmem"])
        for s in r.source_nodes:
            print("   ", s.score, s.node.ref_doc_id, s.node.text[:60], s.node.metadata)
