"""Training: the time from documents to memory, its stages, and a GPU beside CPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import machine, results, training, training_whole
from benchmarks.__main__ import measure
from benchmarks.figures import Ceilings, Figure, Goal
from benchmarks.rounds import Ratio
from benchmarks.setup import Setup, Training
from mlpmem_rag.corpus import Corpus
from mlpmem_rag.pipeline import train
from mlpmem_rag.report import TrainReport


@pytest.fixture
def _quick(quick_training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(corpus: Corpus, *, out: Path, **given: Any) -> TrainReport:  # noqa: ANN401
        return train(corpus, out=out, **{**given, **quick_training})

    monkeypatch.setattr("benchmarks.setup.train", quick)


@pytest.fixture
def made(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setup]:
    """A setup on a GPU, as if trained there, with no result but those of a folder."""
    monkeypatch.setattr(training, "RESULTS", tmp_path / "committed")

    def make(seconds: float = 500.0, tokens: int = 1_100_000) -> Setup:
        there = replace(setup, results=tmp_path / "own", large_corpus=setup.corpus)
        there.device = "cuda"
        report = made_report(tokens=tokens, seconds={"datastore": 100.0, "study": 300.0})
        there.__dict__["trained"] = Training(report, seconds)
        monkeypatch.setattr(Setup, "training", lambda *_: there.trained)
        return there

    return make


def made_report(**given: Any) -> TrainReport:  # noqa: ANN401
    """A report with some fields, and nothing in the others."""
    names = [field.name for field in fields(TrainReport)]
    return TrainReport(**{**dict.fromkeys(names), "documents": 9, "questions": 0, **given})


def write(
    path: Path, base_model: str, *, rate: float, device: str = "cpu", tokens: int = 1_100_000
) -> None:
    """A result file with one training."""
    what = "training, 9 documents to a memory"
    stored = asdict(Figure(what, "tokens/s", rate, details={"tokens": tokens}))
    entry = {"base_model": base_model, "figures": [stored]}
    results.merge(path, {"machine": {"device": device}}, {"training": entry})


@pytest.mark.usefixtures("_quick")
def test_the_training_suite_tells_every_stage_and_what_is_outside(
    setup: Setup, tmp_path: Path
) -> None:
    base = setup.base_model
    small = Setup(tmp_path, "cpu", "float32", base, corpus=setup.corpus, trained_documents=6)
    figure, *parts = training.run(small)
    report, seconds = small.trained.report, small.trained.seconds
    assert figure.what == "training, 6 documents to a memory"
    assert figure.ours == pytest.approx(report.tokens / seconds)
    assert (figure.details["documents"], figure.details["tokens"]) == (6, report.tokens)
    assert figure.details["seconds"] == seconds
    assert {"seconds_datastore", "seconds_distil"} <= set(figure.details)
    *stages, outside = parts
    names = [stage.what.removeprefix("training, 6 documents, stage ") for stage in stages]
    assert {"datastore", "neighbors", "targets", "distil", "refit"} <= set(names)
    assert [stage.ours for stage in stages] == [report.seconds[name] for name in names]
    assert outside.what == "training, 6 documents, outside the stages"
    assert outside.ours > 0
    for part in parts:
        assert part.other == seconds
        assert part.ratio is not None
        assert part.ratio.value == pytest.approx(part.ours / seconds)
    assert sum(part.ours for part in parts) == pytest.approx(seconds)


def test_reading_documents_is_in_the_time_of_a_training(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    documents = setup.documents

    def reading(corpus: Path) -> Corpus:
        assert corpus == setup.corpus
        order.append("read")
        return documents

    def trained(corpus: Corpus, **_: object) -> TrainReport:
        order.append(f"train on {len(corpus.documents)}")
        return made_report()

    def timed(work: Callable[[], TrainReport], device: str) -> tuple[TrainReport, float]:
        order.append(f"clock on {device}")
        return work(), 7.0

    for name, instead in (("read_corpus", reading), ("train", trained), ("timed", timed)):
        monkeypatch.setattr(f"benchmarks.setup.{name}", instead)
    assert setup.training(setup.corpus, tmp_path).seconds == 7.0
    assert setup.training(setup.corpus, tmp_path, 5).seconds == 7.0
    clock = ["clock on cpu", "read"]
    assert order == [*clock, "train on 16", *clock, "train on 5"]


@pytest.mark.usefixtures("_quick")
def test_all_of_a_large_corpus_is_trained_on_and_taken_away(setup: Setup, tmp_path: Path) -> None:
    small = Setup(tmp_path, "cpu", "float32", setup.base_model, large_corpus=setup.corpus)
    minutes, speed, *parts = training_whole.run(small)
    assert minutes.details["documents"] == 16
    assert minutes.what == f"training on {minutes.details['tokens']:,} tokens"
    assert minutes.goal == Goal()
    assert speed.what == "training, 16 documents to a memory"
    assert minutes.ours == pytest.approx(float(speed.details["seconds"]) / 60)
    assert sum(part.ours for part in parts) == pytest.approx(60 * minutes.ours)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "tokens", "reached"),
    [(500.0, 1_100_000, True), (700.0, 1_100_000, False), (500.0, 90_000, None)],
)
def test_a_gpu_has_ten_minutes_for_a_million_tokens(
    made: Callable[..., Setup], seconds: float, tokens: int, reached: bool | None
) -> None:
    minutes, speed, *parts = training_whole.run(made(seconds, tokens))
    assert (minutes.unit, minutes.ours, minutes.reached) == ("minutes", seconds / 60, reached)
    assert speed.ours == tokens / seconds
    assert [part.ours for part in parts] == [100.0, 300.0, seconds - 400]


def test_training_on_a_gpu_is_held_against_the_fastest_cpu_on_the_same_corpus(
    made: Callable[..., Setup], tmp_path: Path
) -> None:
    there = made()
    own, committed, base = tmp_path / "own", tmp_path / "committed", there.base_model
    write(own / "slow.json", base, rate=3.0)
    write(committed / "other-corpus.json", base, rate=50.0, tokens=1682)
    write(committed / "other-model.json", "another", rate=70.0)
    write(committed / "gpu.json", base, rate=900.0, device="cuda")
    results.merge(committed / "nothing.json", {"machine": {"device": "cpu"}}, {})
    assert training.run(there)[0].other == 3.0
    write(committed / "fast.json", base, rate=5.0)  # not among the results of this run
    speed = training.run(there)[0]
    assert (speed.ours, speed.other, speed.against) == (2200.0, 5.0, training.CPU)
    assert (speed.ratio, speed.reached) == (Ratio(440.0, 440.0, 440.0), True)
    assert training_whole.run(there)[1] == speed


def test_a_gpu_without_a_cpu_on_its_corpus_says_so(
    made: Callable[..., Setup], tmp_path: Path
) -> None:
    there = made()
    write(tmp_path / "committed" / "cpu.json", there.base_model, rate=50.0, tokens=1682)
    speed = training.run(there)[0]
    assert speed.against == "no CPU in the result files has trained on this corpus"
    assert (speed.other, speed.ratio, speed.reached) == (None, None, None)


def test_committed_results_have_trainings_to_compare_with(setup: Setup) -> None:
    """Of twelve of the sample corpus's documents, which have 1,682 tokens, by SmolLM2."""
    there = replace(setup, results=setup.work, base_model=Setup.base_model)
    same = Figure("training, 12 documents to a memory", "tokens/s", 1.0, details={"tokens": 1682})
    assert len(list(training.cpu_rates(there, same))) >= 3


def test_one_run_tells_of_both_corpora(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda *_: Ceilings({"float32": 1.0}, 1.0, 1.0))
    monkeypatch.setattr("benchmarks.__main__.suite", lambda name: lambda _: [Figure(name, "s", 1)])
    there = replace(setup, results=tmp_path, large_corpus=tmp_path / "big")
    assert measure(there, ["training", "training_whole"], Console(quiet=True)) == []
    (path,) = tmp_path.iterdir()
    suites = json.loads(path.read_text())["suites"]
    assert {name: suite["corpus"] for name, suite in suites.items()} == {
        "training": "corpus",
        "training_whole": "big",
    }
