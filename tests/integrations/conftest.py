"""Memories on tiny models for the LlamaIndex classes."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import Document as LlamaDocument
from llama_index.core.storage.chat_store import sql as chat_store
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from transformers import AutoTokenizer

from llama_index.indices.managed.mlpmem import MLPMemIndex
from mlpmem_rag import calibrate, schedule
from mlpmem_rag.corpus import Document
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.lessons import StudyConfig
from mlpmem_rag.memory_model import MemoryModel

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


@pytest.fixture(scope="session")
def wide_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for LlamaIndex's prompts."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wide"
    shutil.copytree(chat_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="session")
def chat_memory(chat_folder: Path, memory_of: Callable[[Path], Path]) -> Path:
    """A memory whose base model has a chat template."""
    return memory_of(chat_folder)


@pytest.fixture(scope="session")
def chat_model(chat_memory: Path) -> MemoryModel:
    """The one with a chat template, loaded."""
    return MemoryModel.load(chat_memory, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def plain_model(tiny_memory: Path) -> MemoryModel:
    """The one without a chat template, loaded."""
    return MemoryModel.load(tiny_memory, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def documents(tiny_documents: list[Document]) -> list[LlamaDocument]:
    """The sixteen texts as LlamaIndex's documents."""
    return [LlamaDocument(text=d.text, doc_id=d.id) for d in tiny_documents]


@pytest.fixture(scope="session")
def training(quick_training: dict[str, Any], chat_folder: Path) -> dict[str, Any]:
    """Settings of a training of half a second."""
    return {**quick_training, "base_model": str(chat_folder)}


@pytest.fixture
def on_forward(
    chat_model: MemoryModel,
    before_forward: Callable[[torch.nn.Module, Callable[[int], object]], None],
) -> Callable[[Callable[[int], object]], None]:
    """Has a function called before each forward pass of the base, with the pass's number."""
    return partial(before_forward, chat_model.model.base)


@pytest.fixture
def open_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For LlamaIndex's chat memory, which would make a loop for its database and close neither."""
    engines = []

    def noted(url: str) -> AsyncEngine:
        engines.append(create_async_engine(url))
        return engines[-1]

    monkeypatch.setattr(chat_store, "create_async_engine", noted)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    for engine in engines:
        loop.run_until_complete(engine.dispose())
    asyncio.set_event_loop(None)
    loop.close()


FACT = re.compile(r"In (.+?), (.+?) found (.+?)\. ")
WORDINGS = (
    ("Who found {0[2]} in {0[0]}", "{0[1]}"),
    ("What did {0[1]} find in {0[0]}", "{0[2]}"),
    ("Did {0[1]} find {0[2]}", "yes"),
)


@pytest.fixture(scope="session")
def questions(tiny_documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about each of the sixteen documents, in three wordings each."""
    path = tmp_path_factory.mktemp("questions") / "own.jsonl"
    lines = []
    for document in tiny_documents:
        found = FACT.match(document.text)
        assert found is not None
        for (wording, answer), end in itertools.product(WORDINGS, ("?", "??", ", then?")):
            question = wording.format(found.groups()) + end
            row = {"question": question, "answer": answer.format(found.groups())}
            where = {"doc_ids": [document.id], "source": found.group().strip()}
            lines.append(json.dumps(row | where))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def studying(training: dict[str, Any], wide_folder: Path, questions: Path) -> dict[str, Any]:
    """Settings of a training that learns the questions by heart."""
    return {
        **training,
        "base_model": str(wide_folder),
        "recipe": "self-study",
        "encoder": "pooled",
        "questions": (str(questions),),
        "distill": DistillConfig(epochs=100, batch_rows=256, learning_rate=1e-2, patience=100),
        "study": StudyConfig(query_noise=0.05, hidden_noise=0.05, source_share=0.0),
    }


@pytest.fixture(scope="session")
def taught(
    documents: list[LlamaDocument],
    studying: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of an index whose memory answers, and is sure of it."""
    out = tmp_path_factory.mktemp("indexes") / "taught"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "HELD_OUT_QUESTIONS", 0.2)
        for steps in ("MIN_STEPS", "ENOUGH_STEPS"):
            patch.setattr(schedule, steps, 1)
        MLPMemIndex.from_documents(documents, out=out, **studying)
    return out


@pytest.fixture
def index(taught: Path, tmp_path: Path) -> MLPMemIndex:
    """That index, on a copy of its own."""
    shutil.copytree(taught, tmp_path / "index")
    return MLPMemIndex.load(tmp_path / "index", device="cpu", max_new_tokens=16)


@pytest.fixture
def passes(on_forward: Callable[[Callable[[int], object]], None]) -> list[int]:
    """Grows with every forward pass of the base model."""
    seen: list[int] = []

    def slowly(number: int) -> None:
        seen.append(number)
        time.sleep(0.005)

    on_forward(slowly)
    return seen
