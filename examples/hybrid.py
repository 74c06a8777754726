"""Ask the memory first, and RAG where the memory is not sure or not up to date.

python examples/hybrid.py demo/index "Which constellation is Vega in?" --threshold 0.5

The index is the one that quickstart.py wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from llama_index.core import VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index.indices.managed.mlpmem import MemoryFirstQueryEngine, MLPMemIndex
from mlpmem_rag.embedded import MINILM, embedded_model_path


def main(
    index: Path,
    questions: list[str],
    threshold: float = 0.5,
    embedding: Annotated[str, typer.Option(help="Folder or hub id; of RAG's passages.")] = "",
) -> None:
    memory = MLPMemIndex.load(index)
    rag = VectorStoreIndex(
        list(memory.docstore.docs.values()),
        embed_model=HuggingFaceEmbedding(embedding or str(embedded_model_path(MINILM))),
    )
    engine = MemoryFirstQueryEngine(
        memory.as_query_engine(),
        rag.as_query_engine(llm=memory.as_llm(lambda_=0.0)),  # the same base model reads passages
        threshold,
    )
    for question in questions:
        response = engine.query(question)
        told = (response.metadata or {})["mlpmem"]
        print(f"{question}\n  {response}\n  from {told['route']} {told.get('why', '')}".rstrip())


if __name__ == "__main__":
    typer.run(main)
