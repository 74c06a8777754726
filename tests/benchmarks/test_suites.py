"""The suites measure what they say, on tiny models."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import (
    answers,
    approximate,
    compiled,
    corpora,
    datastore,
    decoding,
    distillation,
    gpu_neighbors,
    inference_memory,
    machine,
    neighbors,
    results,
)
from benchmarks.__main__ import SUITES, in_order, main, measure, suite
from benchmarks.figures import Ceilings, Figure, Goal
from benchmarks.setup import Setup
from mlpmem_rag import generation
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.index import CPU, Floats, Rows, flat_index
from mlpmem_rag.lessons import Columns, TextLesson
from mlpmem_rag.memory import MemoryConfig, new_memory
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.neighbors import FlatSearch
from mlpmem_rag.query import SentenceEncoder
from mlpmem_rag.targets import Targets

from .checks import check


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PROMPT", 8)
    monkeypatch.setattr(decoding, "STEPS", 2)
    monkeypatch.setattr(corpora, "PROMPT", 8)
    monkeypatch.setattr(corpora, "STEPS", 2)


def test_the_datastore_suite_counts_the_corpus(setup: Setup) -> None:
    (figure,) = datastore.run(setup)
    check(figure)
    assert figure.details["tokens"] == sum(len(w.token_ids) for w in setup.windows)
    assert figure.other is not None
    assert figure.needs is not None
    assert figure.needs.flops > 2 * 3 * 32 * 48 * 2, "more than two of its MLPs"


def test_the_neighbours_suite_searches_every_row(setup: Setup) -> None:
    for figure in neighbors.run(setup):
        check(figure)
        assert figure.details == {"rows": setup.datastore.num_rows, "width": 32}


def test_the_approximate_suite_finds_most_of_what_is_nearest(setup: Setup) -> None:
    speed, exact, found = approximate.run(setup)
    for figure in (speed, exact, found):
        check(figure)
    assert 0.5 < found.ours <= 1.0
    assert exact.needs is not None
    assert exact.needs.flops == 2 * 3000 * 32


def test_grown_rows_lie_near_the_rows_they_come_from(setup: Setup, tmp_path: Path) -> None:
    store = setup.datastore
    many = approximate.grown(store, 5000, tmp_path)
    assert many.num_rows == 5000
    keys, old = many.keys(np.arange(5000)), store.keys(np.arange(store.num_rows))
    assert len(np.unique(keys, axis=0)) > 4500, "copies that differ"
    spread, grown = old.std(0).mean(), keys.std(0).mean()
    assert spread < grown < 1.5 * spread


def test_the_gpu_suite_searches_where_it_is_told(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(gpu_neighbors, "WIDTH", 16)
    for figure, k in zip(gpu_neighbors.run(setup), (64, 1024), strict=True):
        check(figure)
        assert figure.what.endswith(f"k = {k:,}")
        operations = 2 * 3000**2 * 16
        assert figure.ours == pytest.approx(operations / float(figure.details["seconds"]) / 1e12)


def test_a_search_on_a_gpu_keeps_no_more_than_it_is_at() -> None:
    kept: list[weakref.ref[Any]] = []

    class Counting:
        def groups(self) -> Iterator[Rows]:
            return iter([np.arange(3)] * 9)

        def search(self, rows: Rows, k: int) -> tuple[Rows, Floats]:
            assert not any(found() is not None for found in kept), "of the groups before"
            found, distances = np.zeros((3, k), np.int64), np.zeros((3, k), np.float32)
            kept.extend(map(weakref.ref, (found, distances)))
            return found, distances

    assert gpu_neighbors.search_seconds(Counting(), 4, "cpu") > 0
    assert len(kept) == 2 * (gpu_neighbors.WARM_UP + 9)


def test_a_search_on_a_gpu_stands_between_two_measurements_of_its_products(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rates = iter([4e12, 2e12, 1e12])

    def product_rate(*_: object) -> float:
        order.append("products")
        return next(rates)

    def search_seconds(_search: object, k: int, _device: str) -> float:
        order.append(f"k = {k}")
        return 3000**2 * 16 / 1e12  # at 2 TFLOP/s

    monkeypatch.setattr(machine, "product_rate", product_rate)
    monkeypatch.setattr(gpu_neighbors, "search_seconds", search_seconds)
    monkeypatch.setattr(gpu_neighbors, "WIDTH", 16)
    first, second = gpu_neighbors.run(setup)
    assert order == ["products", "k = 64", "products", "k = 1024", "products"]
    assert (first.other, second.other) == (3.0, 1.5)
    for figure, expected in ((first, (2 / 3, 0.5, 1.0)), (second, (4 / 3, 1.0, 2.0))):
        assert figure.ratio is not None
        assert astuple(figure.ratio) == pytest.approx(expected)


def test_distillation_and_the_released_formulation_agree_on_the_loss(setup: Setup) -> None:
    """With one vocabulary for both, sparse and dense are the same numbers."""
    _, folder = distillation.prepared(setup)
    store, targets = Datastore.open(folder / "datastore"), Targets.open(folder / "targets")
    width = int(np.max(store.next_tokens)) + 1
    config = MemoryConfig(32, 48, 1, "silu", gated=True, vocab_size=width)
    rows = np.arange(0, store.num_rows, 3)
    memory = new_memory(config, torch.arange(width), None, seed=0)
    arm = distillation.released(config, store, targets, "cpu")
    arm.memory.load_state_dict(memory.state_dict())
    lesson = TextLesson(store, targets, Columns(memory, width), alpha=distillation.ALPHA)
    expected = lesson.loss(memory, rows, torch.Generator())
    assert arm.step(rows) == pytest.approx(expected.item(), rel=2e-3)


def test_the_distillation_suite_measures_speed_and_memory(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(arm: str, *given: object) -> float:
        return float(str(given[-1])) * {"ours": 1, "released": 3}[arm]

    for name, rows in (("PAPER_ROWS", 16), ("TRAIN_ROWS", 32), ("RELEASED_ROWS", 64)):
        monkeypatch.setattr(distillation, name, rows)
    monkeypatch.setattr(distillation, "ROUNDS", 2)
    monkeypatch.setattr(distillation, "in_own_process", peak)
    figures = distillation.run(setup)
    speeds, memory = figures[:3], figures[3:]
    for speed, rows in zip(speeds, (16, 32, 64), strict=True):
        check(speed)
        assert speed.what == f"distillation, {rows} rows a step"
        assert speed.details["vocabulary"] == 300
        assert speed.details["distinct_tokens"] == len(np.unique(setup.datastore.next_tokens))
    ratios = [figure.ratio.value for figure in memory if figure.ratio]
    assert ratios == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 6])
    # Like beside like, the goal at the most rows; and as each side trains.
    assert [figure.reached for figure in memory] == [None, None, False, None]
    assert (memory[-1].what[-14:], memory[-1].against[-14:]) == ("32 rows a step", "64 rows a step")


def test_peak_memory_is_measured_in_a_process_of_its_own(setup: Setup) -> None:
    """A process with a larger vocabulary needs more, by no less than the larger head."""
    config, folder = distillation.prepared(setup)
    wide = replace(config, vocab_size=200_000)
    peak = distillation.in_own_process("released", setup, wide, folder, rows=4)
    assert peak > 4 * (4 * 200_000 * 32), "weights, gradients and two moments in float32"


def test_peak_memory_of_answering_is_beside_the_base_and_what_is_added(
    setup: Setup,
    tmp_path: Path,
    sentence_folder: Path,
    memory_on: Callable[..., MLPMemForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a memory with an encoder of its own, each arm in a process."""
    ran: dict[str, dict[str, int]] = {}
    measured = inference_memory.in_own_process

    def remembered(arm: str, arguments: list[str]) -> dict[str, int]:
        ran[arm] = measured(arm, arguments)
        return ran[arm]

    for name, value in (("RUNS", 1), ("PROMPT", 8), ("STEPS", 4), ("in_own_process", remembered)):
        monkeypatch.setattr(inference_memory, name, value)
    model = memory_on(setup.backbone, query_size=32, encoder=str(sentence_folder))
    model.save_pretrained(tmp_path / "memory")
    vector, text = inference_memory.run(replace(setup, memory=tmp_path / "memory"))
    encoder = model.query_encoder
    assert isinstance(encoder, SentenceEncoder)
    added = {"base": 0, "vector": inference_memory.weight_bytes(model.memory)}
    added["text"] = added["vector"] + inference_memory.weight_bytes(encoder.model)
    assert {arm: found["added"] for arm, found in ran.items()} == added
    base = sum(tensor.nbytes for tensor in setup.backbone.model.parameters())
    assert min(found["peak"] for found in ran.values()) > base
    for figure, arm in ((vector, "vector"), (text, "text")):
        check(figure)
        assert figure.ours == ran[arm]["peak"] / 2**20
        assert figure.other == (ran["base"]["peak"] + added[arm]) / 2**20
        assert figure.goal == Goal(at_most=1.1)


def test_the_decoding_suite_times_one_request_and_eight(setup: Setup) -> None:
    figures = decoding.run(setup)
    for figure in figures:
        check(figure)
    against = ["bare base model", "bare base model", decoding.LIKEWISE]  # float32 on a CPU
    assert [(figure.what[-1], figure.against) for figure in figures] == [
        (batch, other) for batch in "18" for other in against
    ]


def test_the_answers_suite_asks_alone_and_in_one_turn(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    sizes: list[int] = []
    begun = generation.generate_together

    def counting(generations: Sequence[Any], listeners: Sequence[Any]) -> None:
        sizes.append(len(generations))
        begun(generations, listeners)

    monkeypatch.setattr(generation, "generate_together", counting)
    questions = setup.work / "questions.jsonl"
    questions.write_text('{"question": "What was found in the old mill?"}\n' * 8)
    figures = answers.run(replace(setup, questions=questions))
    for figure in figures:
        check(figure)
    assert [figure.what[-1] for figure in figures] == ["1", "8"]
    # Two rounds and a warm-up of both ways, each group behind the request that holds it.
    assert sizes == [1, 1] * (3 * 2 * 6) + [1, 8] * (3 * 2)


def test_the_compiled_suite_generates_and_trains(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU transformers compiles nothing; the blocks are traced."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "PROMPT", 8)
    monkeypatch.setattr(compiled, "TOKENS", 4)
    monkeypatch.setattr(distillation, "RELEASED_ROWS", 64)
    torch.compiler.reset()
    figures = compiled.run(setup)
    for figure in figures:
        check(figure)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    assert [figure.unit for figure in figures] == ["ms/token", "ms/token", "rows/s"]


def test_the_memory_of_another_corpus_is_as_large(setup: Setup) -> None:
    (figure,) = corpora.run(setup)
    check(figure)
    larger, other = (float(figure.details[f"distinct_tokens{n}"]) for n in ("", "_other"))
    assert larger >= other > 0


def test_goals_of_a_cpu_are_none_of_a_gpu(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device, as if measured on a GPU."""
    monkeypatch.setattr(neighbors, "IN_MEMORY", setup.work)
    assert [figure.goal for figure in neighbors.run(setup)] == [Goal(), Goal(at_least=0.95)]
    there = replace(setup)
    there.__dict__["datastore"] = setup.datastore
    there.device = "cuda"
    monkeypatch.setattr(neighbors, "find_neighbors", lambda *_, **__: None)
    monkeypatch.setattr(neighbors, "interleaved", lambda *_: {"stage": [1.0], "knn": [2.0]})
    for figure in neighbors.run(there):
        assert figure.goal == Goal()
        assert figure.needs is not None
        assert figure.needs.dtype == "float16"


def test_what_only_a_gpu_tells_is_measured_first_there() -> None:
    assert in_order("cuda:0")[:3] == ["gpu_neighbors", "training", "training_whole"]
    assert set(in_order("cuda")) == set(SUITES)
    assert in_order("cpu") == list(SUITES)


def test_a_search_by_faiss_is_held_against_ours(setup: Setup) -> None:
    """The same index on a CPU in the place of one on a GPU."""
    store = gpu_neighbors.random_store(600, 16)
    rows, centre = np.arange(600), np.zeros(16, dtype=np.float32)
    search = FlatSearch(store, rows, centre, CPU)
    other = flat_index(store, rows, centre)
    figure = gpu_neighbors.beside_faiss(search, other, store, 8, "cpu")
    check(figure)
    assert figure.ratio is not None


def test_a_run_writes_what_it_has_beside_what_others_had(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(machine, "COPIED", 1 << 20)
    monkeypatch.setattr(machine, "WRITTEN", 1 << 16)
    monkeypatch.setattr("benchmarks.__main__.suite", lambda name: lambda _: [Figure(name, "s", 1)])
    said: list[str] = []
    there = replace(setup, results=tmp_path / "new" / "results", say=said.append)
    assert measure(there, ["neighbors"], Console(quiet=True)) == []
    assert measure(there, ["datastore", "gpu_neighbors"], Console(quiet=True)) == []
    (path,) = there.results.iterdir()
    assert path.stem == machine.slug("cpu")
    written = json.loads(path.read_text())
    assert set(written["suites"]) == {"neighbors", "datastore"}
    assert "gpu_neighbors: only on a GPU" in said
    assert measure(there, ["training_whole"], Console(quiet=True)) == []
    assert "training_whole: left out, no --large-corpus is given" in said
    assert set(json.loads(path.read_text())["suites"]) == {"neighbors", "datastore"}
    assert results.figures_of(written["suites"]["datastore"]) == [Figure("datastore", "s", 1)]


def test_a_suite_that_fails_does_not_end_the_run(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> Callable[[Setup], list[Figure]]:
        def run(_: Setup) -> list[Figure]:
            if name == "neighbors":
                raise RuntimeError("no room")
            return [Figure(name, "s", 1)]

        return run

    ceilings = Ceilings({"float32": 1.0}, 1.0, 1.0)
    monkeypatch.setattr(machine, "ceilings", lambda *_: ceilings)
    monkeypatch.setattr("benchmarks.__main__.suite", made)
    app = typer.Typer()
    app.command()(main)
    given = ["neighbors", "datastore", "--device", "cpu", "--results", str(tmp_path)]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 1
    assert "neighbors failed: RuntimeError: no room" in ran.output
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["suites"]) == {"datastore"}
    assert CliRunner().invoke(app, given[1:]).exit_code == 0


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_named(name: str) -> None:
    assert callable(suite(name))
