"""What each of several processes does in `test_processes.py`; started by torchrun."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
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
from mlpmem_rag.lessons import Columns, StudyConfig, TextLesson
from mlpmem_rag.memory import Memory, derive_config, new_memory
from mlpmem_rag.neighbors import find_neighbors
from mlpmem_rag.pipeline import train
from mlpmem_rag.processes import Team, join_team
from mlpmem_rag.query import PooledEncoder
from mlpmem_rag.questions import Question
from mlpmem_rag.shared_lesson import shared_out
from mlpmem_rag.study import study_rows
from mlpmem_rag.targets import build_targets
from mlpmem_rag.windows import make_windows, tokenize

CONFIG = DistillConfig(epochs=2, batch_rows=65, learning_rate=1e-3)
"""The last step of an epoch has one row in these tests: fewer than processes."""
ROWS = 131
FACT = re.compile(r"In (.+?), (.+?) found (.+?)\. ")


def run(base: str, documents: list[Document], folder: Path, team: Team) -> None:
    """A datastore in `folder/store`, a memory trained on it in `folder/INDEX.safetensors`.

    Rows of questions in `folder/study`.
    """
    backbone = load_backbone(base, device="cpu", dtype="float32")
    windows = make_windows(tokenize(documents, backbone.tokenizer), length=16, stride=8)
    store = build_datastore(backbone, windows, folder / "store", team=team)
    shape = mlp_shape(backbone.model, backbone.layer)
    memory, losses = learn(store, derive_memory(store, shape), folder / str(team.index), team)
    save_file(memory.state_dict(), folder / f"{team.index}.safetensors")
    (folder / f"{team.index}.json").write_text(json.dumps(losses))
    study = folder / "study"
    study.mkdir(exist_ok=True)
    with patch("mlpmem_rag.study.BATCH_TOKENS", 64):
        rows = study_rows(
            backbone, PooledEncoder(backbone), questions(documents), folder=study, team=team
        )
    if team.first:
        rows.save(study)


def questions(documents: list[Document]) -> list[Question]:
    """Who found what, three times a document, and a question that is answered alike everywhere."""
    found = [(document, FACT.match(document.text)) for document in documents]
    facts = [(document, fact) for document, fact in found if fact is not None]
    return [
        Question(text + end, answer, fact[0], document.id)
        for document, fact in facts
        for end in ("?", "??", ", then?")
        for text, answer in (
            (f"Who found {fact[3]} in {fact[1]}", fact[2]),
            (f"Did {fact[2]} find {fact[3]}", "yes"),
        )
    ]


def write_questions(documents: list[Document], path: Path) -> None:
    """The same for `train`."""
    source = {document.id: document.source for document in documents}
    lines = [
        json.dumps({"question": q.text, "answer": q.answer, "doc_ids": [source[q.document]]})
        for q in questions(documents)
    ]
    path.write_text("\n".join(lines))


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


def study_all(base: str, documents: list[Document], asked: Path, out: Path) -> None:
    """The whole of a self-study, without noise: processes draw other numbers than one alone."""
    settings = {
        "lessons.has_bfloat16": lambda _: False,
        "lessons.CONTEXT_SHARE": 1.0,
        "calibrate.HELD_OUT_QUESTIONS": 0.2,
        "schedule.MIN_STEPS": 1,
        "schedule.ENOUGH_STEPS": 1,
    }
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(patch(f"mlpmem_rag.{name}", value))
        train(
            Corpus(tuple(documents)),
            out=out,
            recipe="self-study",
            questions=(str(asked),),
            encoder="pooled",
            base_model=base,
            device="cpu",
            dtype="float32",
            window=48,
            neighbors=8,
            distill=DistillConfig(epochs=2, batch_rows=256, learning_rate=1e-3),
            study=StudyConfig(query_noise=0.0, hidden_noise=0.0, source_share=0.0),
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
    study_all(base_model, given, Path(out) / "questions.jsonl", Path(out) / "studied")
    dist.destroy_process_group()
