"""What the suites measure on: base model, corpus, memory. Made when a suite asks for it, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import RESULTS
from benchmarks.rounds import timed
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.config import TrainConfig
from mlpmem_rag.corpus import Corpus, read_corpus
from mlpmem_rag.datastore import Datastore, build_datastore
from mlpmem_rag.embedded import SMOLLM2
from mlpmem_rag.hardware import dtype_name, resolve_device, resolve_dtype
from mlpmem_rag.model import MLPMemForCausalLM, load_model
from mlpmem_rag.neighbors import MAX_NEIGHBORS, Neighbors, find_neighbors
from mlpmem_rag.pipeline import train
from mlpmem_rag.report import TrainReport
from mlpmem_rag.windows import Window, make_windows, tokenize

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED_DOCUMENTS = 12


@dataclass(frozen=True)
class Training:
    """A training that is done.

    Attributes:
        report: what it says about itself.
        seconds: from the first document to be read to the memory on the disk.
    """

    report: TrainReport
    seconds: float


@dataclass
class Setup:
    """Choices of a run and what was made for it.

    Attributes:
        work: folder for everything that is written; taken away by the caller.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: number format of the base; `auto`, …
        base_model: of the suites that need no memory.
        memory: a trained memory; None: one is trained on the first documents of the corpus.
        other_memory: a second one of the same size, from another corpus.
        corpus: documents.
        questions: jsonl, about these documents.
        large_corpus: documents that are all trained on, beside the others; None: there are none.
        trained_documents: how many documents are trained on; 0: all.
        search_rows: rows of the large datastore that is searched approximately.
        rounds: of a comparison whose arms take a second or two.
        results: folder of the result files of all machines.
        say: told what is being done.
    """

    work: Path
    device: str = "auto"
    dtype: str = "auto"
    base_model: str = SMOLLM2
    memory: Path | None = None
    other_memory: Path | None = None
    corpus: Path = EXAMPLES / "corpus"
    questions: Path = EXAMPLES / "questions.jsonl"
    large_corpus: Path | None = None
    trained_documents: int = TRAINED_DOCUMENTS
    search_rows: int = 1_000_000
    rounds: int = 7
    results: Path = RESULTS
    say: Callable[[str], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        """Turn `auto` into what it is here."""
        place = resolve_device(self.device)
        self.device = str(place)
        self.dtype = dtype_name(resolve_dtype(self.dtype, place))

    @cached_property
    def backbone(self) -> Backbone:
        """The base model."""
        return load_backbone(self.base_model, device=self.device, dtype=self.dtype)

    @cached_property
    def documents(self) -> Corpus:
        """The corpus, read."""
        return read_corpus(self.corpus)

    @cached_property
    def windows(self) -> list[Window]:
        """The corpus as the datastore stage sees it."""
        ids = tokenize(self.documents.documents, self.backbone.tokenizer)
        length = min(TrainConfig().window, self.backbone.context_window)
        return make_windows(ids, length=length, stride=length // 2)

    @cached_property
    def datastore(self) -> Datastore:
        """Its keys."""
        self.say("building the datastore of the corpus")
        return build_datastore(self.backbone, self.windows, self.work / "datastore")

    @cached_property
    def neighbors(self) -> Neighbors:
        """The nearest rows of each of its rows."""
        rows = np.arange(self.datastore.num_rows)
        k = min(MAX_NEIGHBORS, len(rows) - 1)
        place = torch.device(self.device)
        return find_neighbors(self.datastore, rows, self.work / "neighbors", k=k, device=place)

    @cached_property
    def trained(self) -> Training:
        """On the first documents of the corpus; the memory stays in the working folder."""
        return self.training(self.corpus, self.work / "memory", self.trained_documents)

    def training(self, corpus: Path, out: Path, documents: int = 0) -> Training:
        """From so many documents, 0 being all, to a memory in `out`."""
        self.say(f"training on {documents or 'all'} documents of {corpus.name}")

        def from_documents() -> TrainReport:
            return train(
                Corpus(read_corpus(corpus).documents[: documents or None]),
                out=out,
                base_model=self.base_model,
                device=self.device,
                dtype=self.dtype,
            )

        return Training(*timed(from_documents, self.device))

    @cached_property
    def memory_folder(self) -> Path:
        """The memory given, or one that is trained now."""
        return self.memory or Path(self.trained.report.out)

    @cached_property
    def model(self) -> MLPMemForCausalLM:
        """The memory on its base model."""
        return load_model(self.memory_folder, device=self.device, dtype=self.dtype)[0]

    @property
    def asked(self) -> list[str]:
        """Questions about the corpus."""
        lines = self.questions.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines if line]
