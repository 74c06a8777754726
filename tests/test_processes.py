"""Two processes on CPUs do what one does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlpmem_rag.artifact import WORK, load_manifest, verify_files
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.datastore import build_datastore, length_buckets
from mlpmem_rag.distill import Rows
from mlpmem_rag.errors import ArtifactError
from mlpmem_rag.memory import Memory
from mlpmem_rag.processes import ALONE, Team, join_team
from mlpmem_rag.progress import ProgressEvent
from mlpmem_rag.shared_lesson import _Part
from mlpmem_rag.windows import make_windows, tokenize
from tests.workers import team as worker

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_documents: list[Document]
) -> Path:
    """The folder of two processes that torchrun has started."""
    out = tmp_path_factory.mktemp("together")
    texts = out / "texts.json"
    texts.write_text(json.dumps([asdict(document) for document in tiny_documents]))
    worker.write_questions(tiny_documents, out / "questions.jsonl")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--master-port=0", "--standalone", "-m", "tests.workers.team"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ran = subprocess.run(
        [*launcher, str(tiny_folder), str(texts), str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_documents: list[Document]
) -> Path:
    """The same by this process."""
    out = tmp_path_factory.mktemp("alone")
    worker.run(str(tiny_folder), tiny_documents, out, ALONE)
    worker.train_all(str(tiny_folder), tiny_documents, out / "memory")
    asked = out / "questions.jsonl"
    worker.write_questions(tiny_documents, asked)
    worker.study_all(str(tiny_folder), tiny_documents, asked, out / "studied")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_write_the_datastore_of_one(together: Path, alone: Path) -> None:
    assert contents(together / "store") == contents(alone / "store")


def test_two_processes_write_the_study_of_one(together: Path, alone: Path) -> None:
    assert contents(together / "study") == contents(alone / "study")


def test_two_processes_learn_the_same_memory(together: Path, alone: Path) -> None:
    first, second = (load_file(together / f"{n}.safetensors") for n in (0, 1))
    one = load_file(alone / "0.safetensors")
    assert set(first) == set(second) == set(one)
    for name, weights in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weights, rtol=0, atol=1e-4)
    losses = [json.loads((together / f"{n}.json").read_text()) for n in (0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(json.loads((alone / "0.json").read_text()), rel=1e-5)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_two_processes_train_the_memory_of_one(together: Path, alone: Path) -> None:
    assert names(together / "memory") == names(alone / "memory")
    two, one = (load_file(out / "memory" / "model.safetensors") for out in (together, alone))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-3)
    reports = [load_manifest(out / "memory").figures for out in (together, alone)]
    assert reports[0]["perplexity"]["memory"] == pytest.approx(
        reports[1]["perplexity"]["memory"], rel=1e-3
    )
    verify_files(together / "memory", load_manifest(together / "memory"))


def test_two_processes_study_the_memory_of_one(together: Path, alone: Path) -> None:
    two, one = (out / "studied" for out in (together, alone))
    assert names(two) == names(one)
    for stage in ("questions", "study"):
        found, expected = (contents(out / WORK / stage) for out in (two, one))
        del found["stage.json"], expected["stage.json"]  # which say how long it took
        assert found == expected
    weights = load_file(one / "model.safetensors")
    for name, found_weights in load_file(two / "model.safetensors").items():
        torch.testing.assert_close(found_weights, weights[name], rtol=0, atol=1e-3)
    verify_files(two, load_manifest(two))


def test_each_process_draws_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []

    class Drawing:
        def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> torch.Tensor:
            drawn.append(torch.rand(4, generator=generator))
            return torch.zeros(())

    memory: Any = None
    monkeypatch.setattr("mlpmem_rag.shared_lesson._meaned", lambda loss: loss)
    for seed in (7, 8):  # two epochs of two steps
        for index in range(2):
            part, shared = _Part(Drawing(), Team(index, 2)), torch.Generator().manual_seed(seed)
            for _ in range(2):
                part.loss(memory, np.arange(6), shared)
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 8
    part, seen = _Part(Drawing(), Team(1, 2)), [*drawn]
    drawn.clear()
    for seed in (7, 8):
        shared = torch.Generator().manual_seed(seed)
        for _ in range(2):
            part.loss(memory, np.arange(6), shared)
    assert all(map(torch.equal, drawn, [*seen[2:4], *seen[6:8]])), "an epoch begins anew"


def test_without_a_launcher_a_process_is_alone() -> None:
    assert join_team(torch.device("cpu")) == ALONE
    assert ALONE.first
    ALONE.wait()


def test_an_interrupted_process_goes_on_with_its_own_batches(
    tmp_path: Path,
    tiny_backbone: Backbone,
    tiny_documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = functools.partial(length_buckets, max_tokens=16)
    monkeypatch.setattr("mlpmem_rag.datastore.length_buckets", small)
    monkeypatch.setattr(Team, "wait", lambda _: None)
    token_ids = tokenize(tiny_documents, tiny_backbone.tokenizer)
    windows = make_windows(token_ids, length=8, stride=4)
    build_datastore(tiny_backbone, windows, tmp_path / "one")
    events: list[ProgressEvent] = []

    def interrupt(event: ProgressEvent) -> None:
        events.append(event)
        if len(events) == 40:
            raise KeyboardInterrupt

    folder, first, second = tmp_path / "team", Team(0, 2), Team(1, 2)
    with pytest.raises(KeyboardInterrupt):
        build_datastore(tiny_backbone, windows, folder, team=first, on_progress=interrupt)
    with pytest.raises(ArtifactError, match="no finished datastore"):
        build_datastore(tiny_backbone, windows, folder, team=second)
    resumed: list[ProgressEvent] = []
    build_datastore(tiny_backbone, windows, folder, team=first, on_progress=resumed.append)
    assert resumed[0] == events[32], "the first note was after 32 batches"
    assert contents(folder) == contents(tmp_path / "one")
