"""Train a memory on a folder of documents, ask it, and see where the answer comes from.

python examples/quickstart.py examples/corpus demo/index "Which constellation is Vega in?"
"""

from __future__ import annotations

from pathlib import Path

import typer
from llama_index.core import SimpleDirectoryReader

from llama_index.indices.managed.mlpmem import MLPMemIndex

TEXTS = [".html", ".md", ".rst", ".txt"]
"""LlamaIndex reads PDF and Word files only where `llama-index-readers-file` is installed."""


def main(documents: Path, memory: Path, question: str) -> None:
    read = SimpleDirectoryReader(str(documents), recursive=True, required_exts=TEXTS).load_data()
    # Trains the first time, and finds the memory in its folder from then on.
    index = MLPMemIndex.from_documents(read, out=memory, show_progress=True)

    response = index.as_query_engine().query(question)
    print(response)
    for source in response.source_nodes:
        print(
            f"- {source.node.metadata['file_name']} ({source.node.metadata['mlpmem_attribution']})"
        )
    print((response.metadata or {})["mlpmem"]["confidence"])


if __name__ == "__main__":
    typer.run(main)
