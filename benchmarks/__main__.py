"""One entry to all suites."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import machine, page, results
from benchmarks.figures import Figure
from benchmarks.setup import TRAINED_DOCUMENTS, Setup
from mlpmem_eval.environment import versions
from mlpmem_rag.embedded import SMOLLM2
from mlpmem_rag.errors import MLPMemError

SUITES = {
    "datastore": "datastore stage beside bare forward passes",
    "neighbors": "exact neighbours beside faiss.knn",
    "approximate": "approximate neighbours beside exact ones, a million rows",
    "gpu_neighbors": "exact neighbours on a GPU beside its matrix products",
    "targets": "neighbours' votes beside np.unique row by row",
    "study": "study stage beside bare forward passes, with and without a shared beginning",
    "distillation": "distillation beside the released formulation",
    "decoding": "prefill and decoding beside the bare base model",
    "answers": "a token of an answer beside the bare base model, as they are served",
    "corpora": "decoding with memories of two corpora",
    "inference_memory": "peak memory of answering",
    "serving": "first token and whole answer beside RAG; many requests at once",
    "training": "documents to memory, end to end",
    "training_whole": "the same for all of a large corpus",
    "compiled": "generation and distillation compiled, on a GPU",
}
GPU_ONLY = ("gpu_neighbors", "compiled")
OF_LARGE_CORPUS = ("training_whole",)
FIRST_ON_GPU = ("gpu_neighbors", "training", "training_whole")
"""What is known of a GPU alone, should its time run out."""

SuiteArgument = Annotated[
    list[str] | None,
    typer.Argument(help="; ".join(f"{name}: {about}" for name, about in SUITES.items())),
]


def main(
    suites: SuiteArgument = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or what is there.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Number format of the base model.")] = "auto",
    base_model: Annotated[str, typer.Option(help="Where no memory is needed.")] = SMOLLM2,
    memory: Annotated[Path | None, typer.Option(help="A memory; else one is trained.")] = None,
    other_memory: Annotated[Path | None, typer.Option(help="Of another corpus.")] = None,
    corpus: Annotated[Path, typer.Option(help="Documents.")] = Setup.corpus,
    questions: Annotated[Path, typer.Option(help="About them, jsonl.")] = Setup.questions,
    large_corpus: Annotated[
        Path | None, typer.Option(help="Documents to train on all of; else that is left out.")
    ] = None,
    documents: Annotated[int, typer.Option(help="To train on; 0: all.")] = TRAINED_DOCUMENTS,
    search_rows: Annotated[int, typer.Option(help="Of the large datastore.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Of a comparison of a second or two.")] = 7,
    folder: Annotated[
        Path, typer.Option("--results", help="Folder of the result files.")
    ] = results.RESULTS,
    write_page: Annotated[
        bool, typer.Option("--page", help="Only fill docs/performance.md from the result files.")
    ] = False,
) -> None:
    """Measure the suites named, or all, and write MACHINE.json among the results."""
    if write_page:
        page.fill(folder=folder)
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as work:
        setup = Setup(
            Path(work),
            device=device,
            dtype=dtype,
            base_model=base_model,
            memory=memory,
            other_memory=other_memory,
            corpus=corpus,
            questions=questions,
            large_corpus=large_corpus,
            trained_documents=documents,
            search_rows=search_rows,
            rounds=rounds,
            results=folder,
            say=lambda text: console.print(f"[dim]{text}[/dim]"),
        )
        failed = measure(setup, suites or in_order(setup.device), console)
    if failed:
        raise typer.Exit(1)


def in_order(device: str) -> list[str]:
    """All suites."""
    first = FIRST_ON_GPU if device.startswith("cuda") else ()
    return sorted(SUITES, key=lambda name: name not in first)


def measure(setup: Setup, names: list[str], console: Console) -> list[str]:
    """Suite by suite, so that a run that is cut short leaves what it has.

    Gives those that failed.
    """
    if unknown := set(names) - set(SUITES):
        raise typer.BadParameter(f"{', '.join(unknown)}; suites are {', '.join(SUITES)}")
    about = {"machine": machine.describe(setup.device), "versions": versions()}
    path = setup.results / f"{machine.slug(setup.device)}.json"
    ceilings = machine.ceilings(setup.device, setup.work)
    failed = []
    for name in names:
        if why := left_out(setup, name):
            setup.say(f"{name}: {why}")
            continue
        setup.say(f"{name}: {SUITES[name]}")
        started = time.perf_counter()
        try:
            figures = suite(name)(setup)
        except Exception as error:  # the next suite may do all the same
            console.print(f"{name} failed: {type(error).__name__}: {error}", style="red")
            failed.append(name)
            continue
        took = time.perf_counter() - started
        entry = results.entry(figures, ceilings, took, choices(setup, name))
        results.merge(path, about, {name: entry})
        Console().print(results.table(name, figures, ceilings))
    return failed


def left_out(setup: Setup, name: str) -> str | None:
    """Why a suite cannot be measured; None: it can."""
    if name in GPU_ONLY and not setup.device.startswith("cuda"):
        return "only on a GPU"
    if name in OF_LARGE_CORPUS and setup.large_corpus is None:
        return "left out, no --large-corpus is given"
    return None


def suite(name: str) -> Callable[[Setup], list[Figure]]:
    """A suite by its name; what only it needs is imported now."""
    run: Callable[[Setup], list[Figure]] = importlib.import_module(f"benchmarks.{name}").run
    return run


def choices(setup: Setup, name: str) -> dict[str, Any]:
    """What a suite was measured on."""
    large = setup.large_corpus if name in OF_LARGE_CORPUS else None
    return {
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "base_model": setup.base_model,
        "dtype": setup.dtype,
        "corpus": (large or setup.corpus).name,
        "memory": setup.memory.name if setup.memory else "trained in the run",
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except MLPMemError as error:
        raise SystemExit(f"error: {error}") from error
