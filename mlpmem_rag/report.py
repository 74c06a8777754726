"""What a training run says about itself: the figures, and the model card made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlpmem_rag.calibrate import ASKED_OPENING, StudyFigures
from mlpmem_rag.heldout import Perplexities


@dataclass(frozen=True)
class TrainReport:
    """Figures of a finished run.

    Attributes:
        out: folder the memory is in.
        recipe: how it was taught.
        base_model: what it belongs to.
        layer: decoder layer whose MLP input it reads.
        documents: number of documents trained on.
        skipped: sources left out, with the reason.
        tokens: tokens of all documents.
        rows: rows of the datastore.
        questions: taught, written from the documents or given.
        study_rows: rows along their answers.
        vocabulary: distinct tokens the memory can predict.
        parameters: number of the memory's parameters.
        tau: temperature of the neighbours' votes.
        kept_mass: share of the votes kept in the sparse targets.
        epochs: how often the kept memory has learned each row.
        memory_lambda: mixing weight; the paper's recipe chooses it on the validation documents,
            self-study lowers it token by token (`mlpmem_rag.gate`).
        memory_temperature: chosen on the validation documents; 1 in a self-study.
        held_out_by: "document", "passage", or None where the corpus was too small to hold out.
        perplexity: on the test documents; None where nothing was held out.
        study: what became of the questions; None where there were none or too few.
        seconds: of each stage.
        datastore_bytes: keys, provenance, neighbours, targets and study rows on the disk.
        memory_bytes: the memory's tensors.
    """

    out: str
    recipe: str
    base_model: str
    layer: int
    documents: int
    skipped: tuple[tuple[str, str], ...]
    tokens: int
    rows: int
    questions: int
    study_rows: int
    vocabulary: int
    parameters: int
    tau: float
    kept_mass: float
    epochs: int
    memory_lambda: float
    memory_temperature: float
    held_out_by: str | None
    perplexity: Perplexities | None
    study: StudyFigures | None
    seconds: dict[str, float]
    datastore_bytes: int
    memory_bytes: int

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, derived figures included."""
        values = asdict(self) | {"total_seconds": self.total_seconds}
        if self.perplexity is not None:
            values["perplexity"]["kept_gain"] = self.perplexity.kept_gain
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainReport:
        """The inverse of `to_dict`."""
        values = dict(values)
        values.pop("total_seconds", None)
        if values["perplexity"] is not None:
            perplexity = dict(values["perplexity"])
            perplexity.pop("kept_gain", None)
            values["perplexity"] = Perplexities(**perplexity)
        if values["study"] is not None:
            values["study"] = StudyFigures(**values["study"])
        values["skipped"] = tuple((source, reason) for source, reason in values["skipped"])
        return cls(**values)


def model_card(report: TrainReport, training: dict[str, Any]) -> str:
    """The artifact's README.md."""
    asked = "" if report.study is None else _answers(report.study)
    gate = f" at most (a gate lowers it, to {ASKED_OPENING:g} for questions)"
    gated = "" if report.study is None else gate
    return f"""---
library_name: mlpmem-rag
base_model: {report.base_model}
tags: [mlp-memory]
---

# MLP Memory for {report.base_model}

A memory of {report.documents} documents ({report.tokens:,} tokens). It reads the hidden state at
the MLP input of decoder layer {report.layer} and predicts the next token; its distribution is
mixed with the base model's: p = λ·p_mem + (1-λ)·p_LM with λ = {report.memory_lambda:.3f}{gated} and
temperature {report.memory_temperature:g}.

| | |
|---|---|
| parameters | {report.parameters:,} |
| tokens it can predict | {report.vocabulary:,} |
| size on disk | {report.memory_bytes / 1e6:.1f} MB |
| recipe | {training["recipe"]}, size {training["size"]}, seed {training["seed"]} |
| datastore rows, τ | {report.rows:,}, {report.tau:.3g} |
| training time | {report.total_seconds:.0f} s |

## Measured on held-out text

{_measured(report)}
{asked}
## Use

```python
from mlpmem_rag import MemoryModel

memory = MemoryModel.load("{Path(report.out).name}")
print(memory.answer("…").text)
```

The folder holds only safetensors and JSON. The memory works with the base model it was trained on
and refuses any other.
"""


def _answers(study: StudyFigures) -> str:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    taught, held_out, nearest, unknown = map(
        share, (study.taught, study.held_out, study.nearest, study.unknown)
    )
    return f"""
## Measured on written questions

{study.questions:,} questions from {study.sources:,} sentences and lines were taught. Exact match
before the memory learned what was held out:

| learned questions | other wordings (the nearest learned question) | documents not learned |
|---|---|---|
| {taught} | {held_out} ({nearest}) | {unknown} |
"""


def _measured(report: TrainReport) -> str:
    perplexity = report.perplexity
    if perplexity is None:
        return "Nothing: the corpus is too small, or its questions too few, to hold a part out."
    kept = perplexity.kept_gain
    gain = "the teacher gained nothing" if kept is None else f"{kept:.0%} of the teacher's gain"
    return f"""Perplexity of {perplexity.tokens:,} tokens held out by {report.held_out_by}, measured
before the memory learned these as well; what is fitted was fitted on others.

| base model | base + kNN datastore (the teacher) | base + memory |
|---|---|---|
| {perplexity.base:.2f} | {perplexity.teacher:.2f} | {perplexity.memory:.2f} ({gain}) |

Memory / base: {perplexity.memory / perplexity.base:.3f}, 95 % interval \
{perplexity.ratio_low:.3f} to {perplexity.ratio_high:.3f} (bootstrap over documents)."""
