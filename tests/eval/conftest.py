"""Fixtures of what `fakes` makes, and a memory of the tiny corpus."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_eval.schema import Report
from mlpmem_rag import schedule
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.pipeline import train

from .fakes import FakeClock, LetterEncoder, sample_report


@pytest.fixture(scope="session", autouse=True)
def closed_loop() -> Iterator[None]:
    """LlamaIndex's synchronous calls leave open the event loop that they find or make."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="session")
def roomy_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a context window that LlamaIndex's prompts fit into."""
    folder = tmp_path_factory.mktemp("models") / "roomy-llama"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="session")
def tiny_memory(roomy_folder: Path, memory_of: Callable[[Path], Path]) -> Path:
    """Of the paper's recipe: no encoder, no questions, and a datastore for its teacher."""
    return memory_of(roomy_folder)


@pytest.fixture(scope="session")
def studied_memory(
    roomy_folder: Path,
    quick_training: dict[str, Any],
    tiny_documents: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of self-study: it sees what is asked."""
    folder = tmp_path_factory.mktemp("studied")
    asked = [
        {"question": f"What does document {n} say?", "answer": document.text[:20]}
        for n, document in enumerate(tiny_documents)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, asked)))
    settings = {"recipe": "self-study", "encoder": "pooled", "base_model": str(roomy_folder)}
    config = TrainConfig(**{**quick_training, **settings}, questions=(str(folder / "own.jsonl"),))
    with pytest.MonkeyPatch.context() as patch:
        for steps in ("MIN_STEPS", "ENOUGH_STEPS"):
            patch.setattr(schedule, steps, 1)
        train(Corpus(tuple(tiny_documents)), out=folder / "memory", config=config)
    return folder / "memory"


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letter counts in the place of a sentence encoder, and few questions to tune on."""
    monkeypatch.setattr("mlpmem_eval.headtohead.TUNING_QUESTIONS", 4)
    for module in ("headtohead", "workbench"):
        monkeypatch.setattr(f"mlpmem_eval.{module}.sentence_encoder", lambda _: LetterEncoder())
