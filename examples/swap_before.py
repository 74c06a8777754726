"""A LlamaIndex application that answers from documents: with retrieval, or with a memory.

python examples/swap_before.py examples/corpus "Which constellation is Vega in?"
python examples/swap_after.py examples/corpus "Which constellation is Vega in?"
"""

from __future__ import annotations

from pathlib import Path

import typer
from llama_index.core import Settings, SimpleDirectoryReader
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.indices import VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.llms.huggingface import HuggingFaceLLM

from mlpmem_rag.embedded import MINILM, SMOLLM2, embedded_model_path


TEXTS = [".html", ".md", ".rst", ".txt"]
"""LlamaIndex reads PDF and Word files only where `llama-index-readers-file` is installed."""


def main(documents: Path, question: str, llm: str = "", embedding: str = "") -> None:
    llm = llm or str(embedded_model_path(SMOLLM2))
    Settings.llm = HuggingFaceLLM(
        model_name=llm, tokenizer_name=llm, is_chat_model=True, context_window=2048
    )
    Settings.embed_model = HuggingFaceEmbedding(embedding or str(embedded_model_path(MINILM)))

    read = SimpleDirectoryReader(str(documents), recursive=True, required_exts=TEXTS).load_data()
    index = VectorStoreIndex.from_documents(read, show_progress=True)

    response = index.as_query_engine(similarity_top_k=3).query(question)
    print("answer:", response)
    for source in response.source_nodes:
        print("source:", source.node.metadata["file_name"])

    chat = index.as_chat_engine(chat_mode=ChatMode.CONDENSE_QUESTION)
    print("chat:", end=" ")
    for piece in chat.stream_chat(question).response_gen:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    typer.run(main)
