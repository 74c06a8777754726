"""What each of several processes does in `test_processes.py`; started by torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mlpmem_rag.backbone import load_backbone, mlp_shape
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.distill import DistillConfig, distill
from mlpmem_rag.lessons import Columns, TextLesson
from mlpmem_rag.memory import Memory, derive_config, new_memory
from mlpmem_rag.neighbors import find_neighbors
from mlpmem_rag.pipeline import train
from mlpmem_rag.processes import Team, join_team
from mlpmem_rag.shared_lesson import shared_out
from mlpmem_rag.targets import build_targets
from mlpmem_rag.windows import make_windows, tokenize

CONFIG = DistillConfig(epochs=2, batch_rows=65, learning_rate=1e-3)
"""The last step of an epoch has one row in these tests: fewer than processes."""
ROWS = 131


def run(base: str, documents: list[Document], folder: Path, team: Team) -> None:
    """A datastore in `folder/store`, a memory trained on it in `folder/INDEX.safetensors`."""
    backbone = load_backbone(base, device="cpu", dtype="float32")
    windows = make_windows(tokenize(documents, backbone.tokenizer), length=16, stride=8)
    store = build_datastore(backbone, windows, folder / "store", team=team)
    shape = mlp_shape(backbone.model, backbone.layer)
    memory, losses = learn(store, derive_memory(store, shape), folder / str(team.index), team)
    save_file(memory.state_dict(), folder / f"{team.index}.safetensors")
    (folder / f"{team.index}.json").write_text(json.dumps(losses))


def train_all(base: str, documents: list[Document], out: Path) -> None:
    """The whole of a training, by as many processes as there are."""
    with patch("mlpmem_rag.lessons.has_bfloat16", return_value=False):
        train(
            Corpus(tuple(documents)),
            out=out,
            recipe="paper",
            base_model=base,
            device="cpu",
            dtype="float32",
            window=48,
            neighbors=8,
            distill=DistillConfig(epochs=2, batch_rows=256, learning_rate=1e-3),
        )


def derive_memory(store: Datastore, shape: object) -> Memory:
    """Small."""
    tokens = np.unique(np.asarray(store.next_tokens))
    config = derive_config(shape, 4, len(tokens), "base")  # type: ignore[arg-type]
    return new_memory(config, torch.from_numpy(tokens.astype(np.int64)), None, seed=0)


def learn(store: Datastore, memory: Memory, folder: Path, team: Team) -> tuple[Memory, list[float]]:
    """The library's own training."""
    near = find_neighbors(store, np.arange(store.num_rows), folder / "neighbors", k=8)
    targets = build_targets(near, np.asarray(store.next_tokens), folder / "targets", tau=5.0)
    lesson = TextLesson(store, targets, Columns(memory, 300), alpha=0.4)
    # Sums in float32: in bfloat16 they would depend on which rows are added up together.
    with (
        patch("mlpmem_rag.lessons.has_bfloat16", return_value=False),
        shared_out(lesson, memory, team) as part,
    ):
        report = distill(memory, part, np.arange(ROWS), CONFIG, folder / "distil", validate=None)
    return memory, report.train_losses


if __name__ == "__main__":
    _, base_model, texts, out = sys.argv
    given = [Document(**fields) for fields in json.loads(Path(texts).read_text())]
    joined = join_team(torch.device("cpu"))
    assert joined.count == 2
    run(base_model, given, Path(out), joined)
    train_all(base_model, given, Path(out) / "memory")
    dist.destroy_process_group()
