"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mlpmem_rag.integrity import Verify


class Size(StrEnum):
    """How large the memory is in relation to the base model."""

    small = "small"
    base = "base"
    large = "large"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Number format of the base model."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Recipe(StrEnum):
    """How a memory is taught."""

    self_study = "self-study"
    paper = "paper"


CorpusArgument = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="A folder, a file or a quoted glob of txt, md, rst, html, pdf, docx, csv, jsonl.",
    ),
]
MemoryArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A memory: the --out of `mlpmem-rag train`.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        help="Hub id, local folder or embedded name.", show_default="smollm2-135m-instruct"
    ),
]
BasePlaceOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        help="Where the memory's base model is now.",
        show_default="as the memory names it",
    ),
]
SizeOption = Annotated[Size | None, typer.Option(help="Size of the memory.", show_default="base")]
LayerOption = Annotated[
    int | None,
    typer.Option(
        help="Decoder layer to read.", show_default="at 55 % of the depth; paper: at 70 %"
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the base model.")]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Of everything random.", show_default="0")
]
RecipeOption = Annotated[
    Recipe | None, typer.Option(help="How to teach.", show_default="self-study")
]
QuestionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--questions",
        help="Who writes the questions: rules, base-model, or a jsonl file; may be repeated.",
        show_default="rules",
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        help="Makes query vectors: a sentence-transformers model, pooled, or none.",
        show_default="all-minilm-l6-v2",
    ),
]
NeighborsOption = Annotated[
    int | None, typer.Option(help="Neighbours that vote, up to 1024.", show_default="1024")
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Main memory that training may take, such as 4GiB or 800MB.",
        show_default="all there is",
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail when any file had to be skipped.")
]
FollowLinksOption = Annotated[
    bool, typer.Option("--follow-links", help="Follow symbolic links in the corpus.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
LambdaOption = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0.0,
        max=1.0,
        help="Most that the memory weighs; a gate may lower it.",
        show_default="set in training",
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
ThresholdOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Confidence below which the answer is `not in my documents`."
    ),
]
VerifyOption = Annotated[
    Verify,
    typer.Option(
        "--verify",
        help="Compare all checksums, or (fast) all sizes and the checksums of small files.",
    ),
]
