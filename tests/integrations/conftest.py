"""Memories on tiny models for the LlamaIndex classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document as LlamaDocument
from transformers import AutoTokenizer

from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.pipeline import train

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    shutil.copytree(tiny_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Path, documents: list[Document], out: Path) -> Path:
    """A memory folder, made by a training of half a second."""
    config = TrainConfig(
        recipe="paper",
        base_model=str(base),
        device="cpu",
        dtype="float32",
        window=48,
        neighbors=8,
        distill=DistillConfig(epochs=3, batch_rows=256, learning_rate=1e-2),
    )
    train(Corpus(tuple(documents)), out=out, config=config)
    return out


@pytest.fixture(scope="session")
def plain_memory(
    tiny_folder: Path, tiny_documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A memory whose base model has no chat template."""
    return trained(tiny_folder, tiny_documents, tmp_path_factory.mktemp("memories") / "plain")


@pytest.fixture(scope="session")
def chat_memory(
    chat_folder: Path, tiny_documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A memory whose base model has a chat template."""
    return trained(chat_folder, tiny_documents, tmp_path_factory.mktemp("memories") / "chat")


@pytest.fixture(scope="session")
def chat_model(chat_memory: Path) -> MemoryModel:
    """The one with a chat template, loaded."""
    return MemoryModel.load(chat_memory, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def plain_model(plain_memory: Path) -> MemoryModel:
    """The one without a chat template, loaded."""
    return MemoryModel.load(plain_memory, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def documents(tiny_documents: list[Document]) -> list[LlamaDocument]:
    """The sixteen texts as LlamaIndex's documents."""
    return [LlamaDocument(text=d.text, doc_id=d.id) for d in tiny_documents]


@pytest.fixture(scope="session")
def training(chat_folder: Path) -> dict[str, Any]:
    """Settings of a training of half a second."""
    return {
        "recipe": "paper",
        "base_model": str(chat_folder),
        "device": "cpu",
        "dtype": "float32",
        "window": 48,
        "neighbors": 8,
        "distill": DistillConfig(epochs=3, batch_rows=256, learning_rate=1e-2),
    }
