"""The plan: exact counts, and a refusal with the numbers before any work."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.cells import search_bytes
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.errors import ResourceError
from mlpmem_rag.pipeline import plan_training
from mlpmem_rag.plan import Plan, _best_of, learning_memory, make_plan, search_memory
from mlpmem_rag.windows import TokenArray, make_windows

LENGTH, STRIDE = 40, 25
Make = Callable[..., Plan]


class Usage(NamedTuple):
    """As `shutil.disk_usage` returns it."""

    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def token_ids(tiny_backbone: Backbone, tiny_documents: list[Document]) -> list[list[int]]:
    """Of sixteen documents."""
    return [tiny_backbone.tokenizer(document.text)["input_ids"] for document in tiny_documents]


@pytest.fixture(scope="module")
def make(tiny_backbone: Backbone, token_ids: list[list[int]]) -> Make:
    """Plans a run over these documents."""
    windows = make_windows(_arrays(token_ids), length=LENGTH, stride=STRIDE)

    def plan(
        *,
        k: int = 8,
        held_out: float = 0.1,
        size: str = "base",
        max_memory: int | None = None,
        studies: bool = False,
        by_rules: bool = False,
    ) -> Plan:
        distill = DistillConfig(epochs=2, batch_rows=32)
        return make_plan(
            tiny_backbone,
            windows,
            Path(),
            size=size,
            k=k,
            held_out=held_out,
            distill=distill,
            query_size=6 if studies else 0,
            studies=studies,
            by_rules=by_rules,
            max_memory=max_memory,
        )

    return plan


@pytest.fixture(scope="module")
def plan(make: Make) -> Plan:
    """With the settings most tests need."""
    return make()


def _arrays(token_ids: list[list[int]]) -> list[TokenArray]:
    return [np.array(ids, dtype=np.int32) for ids in token_ids]


def searched(plan: Plan) -> int:
    """Rows that are not in either of the two parts held out, a tenth each."""
    return plan.rows - 2 * (plan.rows // 10)


def test_no_more_questions_than_are_taught_are_planned_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = make(studies=True)
    monkeypatch.setattr("mlpmem_rag.plan.MAX_QUESTIONS", 100)
    some = make(studies=True)
    left_out = round(1.1 * some.rows) - 100
    # Five rows of a question with their keys, its prompt's share of the memory, and its vectors.
    sentences = some.rows // 25
    vectors = 4 * 6 * (left_out + sentences - min(100, sentences))
    assert everything.disk_bytes - some.disk_bytes == vectors + left_out * (
        5 * (2 * 32 + 8) + 22 * 6 + 6 * 64
    )


def test_processes_that_write_questions_are_counted_and_kept_within_the_limit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(studies=True, by_rules=True)
    assert one.writing_processes == 1
    monkeypatch.setattr("mlpmem_rag.plan.PIECE", 5 * one.rows // 6 + 1)
    monkeypatch.setattr("joblib.cpu_count", lambda: 64)
    several = make(studies=True, by_rules=True)
    assert several.writing_processes == 6
    assert several.seconds["questions"] == pytest.approx(one.seconds["questions"] / 6)
    added = several.memory_bytes - make(studies=True).memory_bytes
    assert 5 * 300 * 2**20 < added <= 6 * 300 * 2**20
    # First the search reads its keys from the disk, then fewer write.
    tight = make(studies=True, by_rules=True, max_memory=several.memory_bytes - 1)
    assert (tight.writing_processes, tight.keys_in_memory) == (6, False)
    tighter = make(studies=True, by_rules=True, max_memory=tight.memory_bytes - 1)
    assert tighter.writing_processes == 5
    assert tighter.memory_bytes == several.memory_bytes - 300 * 2**20, "and the keys have room"
    least = make(studies=True, by_rules=True, max_memory=1)
    assert least.writing_processes == 1
    assert least.memory_bytes < one.memory_bytes
    assert "questions" not in make(studies=True).seconds


def test_counts_are_those_of_a_walk_over_the_documents(
    plan: Plan, token_ids: list[list[int]]
) -> None:
    computed = 0
    for ids in token_ids:
        start = reached = 0
        while reached < len(ids):
            reached = min(start + LENGTH, len(ids))
            computed += reached - start
            start += STRIDE
    assert plan.documents == len(token_ids)
    assert plan.tokens == sum(map(len, token_ids))
    assert plan.computed_tokens == computed
    assert plan.rows == sum(len(ids) - 1 for ids in token_ids)
    assert plan.vocabulary == len({token for ids in token_ids for token in ids[1:]})


def test_the_memory_is_counted_by_hand(plan: Plan, make: Make) -> None:
    block = 3 * 32 * 48 + 32  # gate, up, down, norm
    head = 32 * plan.vocabulary + 32
    assert plan.memory_parameters == head + block
    assert make(size="large").memory_parameters == head + block, "a quarter of four layers is one"


def test_no_more_neighbours_than_rows_are_planned_for(plan: Plan, make: Make) -> None:
    assert make(k=10_000).disk_bytes == make(k=plan.rows - 1).disk_bytes > plan.disk_bytes
    assert make(k=9).disk_bytes - plan.disk_bytes == plan.rows * (4 + 4 + 4 + 2)


def test_every_stage_has_a_time(plan: Plan, make: Make) -> None:
    assert list(plan.seconds) == ["datastore", "neighbors", "targets", "base scores", "distil"]
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in plan.seconds.values())
    assert make(held_out=0.0).seconds["base scores"] == 0


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(plan: Plan) -> None:
    replace(plan, disk_bytes=3 << 29, free_disk_bytes=3 << 29).check()
    with pytest.raises(ResourceError, match=r"needs 1\.50 GiB .*, 1\.25 GiB are free; free some"):
        replace(plan, disk_bytes=3 << 29, free_disk_bytes=5 << 28).check()


def test_keys_are_held_where_the_memory_allows_it(plan: Plan, make: Make) -> None:
    held = 4 * 32 * searched(plan)  # float32, width 32
    assert make(max_memory=plan.memory_bytes).keys_in_memory
    tight = make(max_memory=plan.memory_bytes - 1)
    assert not tight.keys_in_memory
    assert tight.memory_bytes == plan.memory_bytes - held
    tight.check()


def test_a_memory_that_is_too_small_is_refused_with_the_numbers(plan: Plan) -> None:
    plan.check()
    replace(plan, memory_bytes=3 << 29, max_memory=3 << 29).check()
    with pytest.raises(ResourceError, match=r"1\.50 GiB of memory, 1\.25 GiB are allowed; allow"):
        replace(plan, memory_bytes=3 << 29, max_memory=5 << 28).check()


def test_a_search_by_cells_is_planned_with_its_copy_of_the_keys(
    plan: Plan, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlpmem_rag.plan.exact_rows", lambda *_: searched(plan))
    assert make().disk_bytes == plan.disk_bytes, "all are compared"
    monkeypatch.setattr("mlpmem_rag.plan.exact_rows", lambda *_: searched(plan) - 1)
    by_cells = make()
    assert by_cells.disk_bytes == plan.disk_bytes + searched(plan) * 2 * 32
    assert make(max_memory=by_cells.memory_bytes).keys_in_memory, "there are none to be held"


def test_a_large_search_is_planned_with_what_a_group_of_rows_takes() -> None:
    # Beyond exact search: 112 of 4,000 cells are 28,000 of a million rows.
    assert search_memory(1_000_000, 576, 1024, exact=False) == search_bytes(1_000_000, 576)
    distances, keys = 4 * 512 * 28_000, 4 * 576 * 28_000
    assert search_bytes(1_000_000, 576) > distances + keys
    assert search_bytes(1_000_000, 576) < 4 * (distances + keys)
    assert search_bytes(4_000_000, 576) < 4 * search_bytes(1_000_000, 576), "as the root of rows"


def test_what_is_learned_is_counted_by_hand() -> None:
    found = learning_memory(1000, 1100, 384, parameters=10)
    vectors, sentences = 1100 * 4 * 384, 40 * 4 * 384
    taught = 1100 * 1200 + vectors + sentences + 5500 * 8 + 1000 * (8 + 4 * 384 // 64)
    # Keys, and those of the memory; drafts and words; an order of all rows.
    words = 3 * 20 * 64
    assert found["distil"] == taught + 2 * vectors + 1100 * (64 + words) + 240 + 6500 * 24
    assert found["study"] == taught + vectors + sentences + 1100 * 700
    assert learning_memory(1000, 0, 0, parameters=10) == {"study": 0, "distil": 240 + 1000 * 24}


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    there = torch.device("cuda:1")
    assert _best_of(1, lambda: done.append("work"), there) >= 0
    assert done == ["work", there, "work", there]


TRAIN = """
import json, sys
from pathlib import Path
from mlpmem_rag.corpus import Corpus, Document
from mlpmem_rag.distill import DistillConfig
from mlpmem_rag.pipeline import train

texts, count = json.loads(sys.argv[1]), int(sys.argv[2])
documents = [
    Document(f"{n}", f"Report {n}. {texts[n % len(texts)]}", None, f"{n}.txt")
    for n in range(count)
]
plans = []
train(
    Corpus(tuple(documents)),
    out=sys.argv[3],
    on_plan=plans.append,
    base_model=sys.argv[4],
    encoder=sys.argv[5],
    device="cpu",
    dtype="float32",
    window=48,
    neighbors=8,
    distill=DistillConfig(epochs=1, batch_rows=512),
)
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
print(json.dumps([int(peak) * 1024, plans[0].memory_bytes, plans[0].rows]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tells no peak")
def test_a_corpus_ten_times_as_large_takes_no_more_memory_than_its_plan_says(
    tmp_path: Path, tiny_folder: Path, sentence_folder: Path, tiny_documents: list[Document]
) -> None:
    """Each trained in a process of its own, which never gives back its peak."""
    texts = json.dumps([document.text for document in tiny_documents])
    found = []
    for count in (32, 320):
        given = [texts, str(count), str(tmp_path / str(count))]
        models = [str(tiny_folder), str(sentence_folder)]
        command = [sys.executable, "-c", TRAIN, *given, *models]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    (peak, planned, rows), (large_peak, large_planned, large_rows) = found
    assert large_rows > 9 * rows
    assert peak <= planned
    assert large_peak <= large_planned
    assert large_peak - peak <= large_planned - planned, "without what every run takes"


def test_planning_writes_nothing_and_asks_the_disk_of_out(
    tmp_path: Path,
    tiny_folder: Path,
    tiny_documents: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    plan: Plan,
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(100, 58, 42)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    corpus = Corpus(tuple(tiny_documents))
    found, read = plan_training(
        corpus,
        out=tmp_path / "not" / "yet",
        recipe="paper",
        base_model=str(tiny_folder),
        device="cpu",
        dtype="float32",
        neighbors=8,
    )
    assert read is corpus
    assert asked == [tmp_path]
    assert found.free_disk_bytes == 42
    assert (found.rows, found.disk_bytes) == (plan.rows, plan.disk_bytes)
    assert list(tmp_path.iterdir()) == []
