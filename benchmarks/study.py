"""The study stage beside the bare forward passes of the same batches.

And these beside passes that read what all prompts begin with anew for each question. The stage is
measured without its query vectors, which another model makes: what they take is told by itself.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.figures import Figure
from benchmarks.rounds import exhaust, interleaved, median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.backbone import Backbone, Prefix, resolve_layer
from mlpmem_rag.config import DEPTHS, TrainConfig
from mlpmem_rag.prompts import answer_ids, prompt_ids
from mlpmem_rag.query import encoded, load_encoder
from mlpmem_rag.questions import Question
from mlpmem_rag.study import BATCH_TOKENS, study_rows
from mlpmem_rag.writers import write_questions

QUESTIONS = 128
"""On a CPU, and of middle length: as few of all lengths would need more padding than all do."""
ENCODER = TrainConfig.encoder
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Asked:
    """A question, with the tokens of its prompt and those of its answer, the end included."""

    question: Question
    prompt: int
    answer: int


@dataclass(frozen=True)
class Noted(Backbone):
    """A base model that notes what it is asked to read.

    Attributes:
        beginning: token ids that are read once, before every sequence. *Shape:* (P,).
        batches: token ids, padded on the right. *Shape:* (B, T).
    """

    beginning: list[int] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)

    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        self.beginning.extend(token_ids)
        return super().prefix(token_ids)

    def hidden(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.batches.append(token_ids)
        return super().hidden(token_ids, attention_mask)

    def hidden_after(self, prefix: Prefix, token_ids: Tensor) -> Tensor:
        self.batches.append(token_ids)
        return super().hidden_after(prefix, token_ids)


def run(setup: Setup) -> list[Figure]:
    """Tokens, questions and texts a second."""
    backbone = reading_backbone(setup.backbone)
    asked = asked_questions(setup, backbone)
    questions = [one.question for one in asked]
    noted = noted_batches(backbone, questions)
    took = seconds_of_all(setup, backbone, questions, noted)
    return [
        of_states(backbone, asked, noted, took),
        of_beginning(len(asked), len(noted.beginning), took),
        of_vectors(questions, took),
    ]


def seconds_of_all(
    setup: Setup, backbone: Backbone, questions: Sequence[Question], noted: Noted
) -> Times:
    """Of each way in each round."""
    encoder, texts = load_encoder(ENCODER, backbone), encoded_texts(questions)
    with tempfile.TemporaryDirectory(dir=setup.work) as parent:
        folders = (Path(parent) / str(number) for number in itertools.count())

        def stage() -> None:  # into an empty folder, as a training does
            folder = next(folders)
            folder.mkdir()
            study_rows(backbone, None, questions, folder=folder)

        return interleaved(
            {
                "stage": stage,
                "forward": lambda: exhaust(states(backbone, noted)),
                "whole prompts": lambda: exhaust(states_of_whole_prompts(backbone, noted)),
                "vectors": lambda: encoded(encoder, texts),
            },
            setup.rounds,
            device=setup.device,
        )


def of_states(backbone: Backbone, asked: Sequence[Asked], noted: Noted, took: Times) -> Figure:
    """The stage beside the passes that it cannot do without."""
    shared = len(noted.beginning)
    lengths = [one.prompt + one.answer - 1 - shared for one in asked]  # the end is not read
    tokens, answers = sum(lengths), sum(one.answer for one in asked)
    rate = tokens / min(took["stage"])
    return Figure(
        "study, states along the answers",
        "tokens/s",
        rate,
        "bare forward passes",
        tokens / min(took["forward"]),
        median_ratio(took["forward"], took["stage"]),
        per_second=rate,
        needs=roofline.forward_needs(
            backbone, lengths, BATCH_TOKENS, shared=shared, kept=answers / tokens
        ),
        details={
            "questions": len(asked),
            "tokens": tokens,
            "padding": sum(ids.numel() for ids in noted.batches) / tokens - 1,
            "batches": len(noted.batches),
        },
    )


def of_beginning(questions: int, shared: int, took: Times) -> Figure:
    """What reading the tokens that all prompts share only once is worth."""
    return Figure(
        "study's forward passes, what all prompts begin with read once",
        "questions/s",
        questions / min(took["forward"]),
        "read with each question",
        questions / min(took["whole prompts"]),
        median_ratio(took["whole prompts"], took["forward"]),
        details={"tokens_read_once": shared},
    )


def of_vectors(questions: Sequence[Question], took: Times) -> Figure:
    """The other model's part of the stage."""
    return Figure(
        "study, vectors of questions and sources",
        "s",
        min(took["vectors"]),
        "states along the answers",
        min(took["stage"]),
        median_ratio(took["vectors"], took["stage"]),
        details={"texts": len(encoded_texts(questions))},
    )


def reading_backbone(backbone: Backbone) -> Backbone:
    """The same base model, tapped where a self-study reads."""
    layer = resolve_layer(None, backbone.num_layers, DEPTHS["self-study"])
    return replace(backbone, layer=layer)


def asked_questions(setup: Setup, backbone: Backbone) -> list[Asked]:
    """As a training writes them, those for which the context window has room."""
    documents = setup.documents.documents[: setup.trained_documents or None]
    written = write_questions(TrainConfig.questions, documents, backbone)
    asked = [measured(backbone, question) for question in written]
    fitting = [one for one in asked if one.prompt + one.answer <= backbone.context_window]
    if setup.device.startswith("cuda"):
        return fitting
    fitting.sort(key=lambda one: one.prompt + one.answer)
    first = max(0, len(fitting) - QUESTIONS) // 2
    return fitting[first : first + QUESTIONS]


def measured(backbone: Backbone, question: Question) -> Asked:
    """With its tokens counted."""
    prompt = prompt_ids(backbone.tokenizer, [{"role": "user", "content": question.text}])
    return Asked(question, len(prompt), len(answer_ids(backbone.tokenizer, question.answer)))


def encoded_texts(questions: Sequence[Question]) -> list[str]:
    """The questions, and the sentences that answer them, none of these twice."""
    sources = dict.fromkeys(question.source for question in questions)
    return [*(question.text for question in questions), *sources]


def noted_batches(backbone: Backbone, questions: Sequence[Question]) -> Noted:
    """What the stage has the base model read."""
    noted = Noted(backbone.model, backbone.tokenizer, backbone.layer, backbone.reference)
    study_rows(noted, None, questions)
    return noted


def states(backbone: Backbone, noted: Noted) -> Iterator[Tensor]:
    """Of each batch, after the beginning that is read once. *Shape:* (B, T, D)."""
    prefix = backbone.prefix(noted.beginning) if noted.beginning else None
    for ids in noted.batches:
        yield (
            backbone.hidden_after(prefix, ids)
            if prefix is not None
            else backbone.hidden(ids, torch.ones_like(ids))
        )


def states_of_whole_prompts(backbone: Backbone, noted: Noted) -> Iterator[Tensor]:
    """Of each batch, the beginning in every row of it. *Shape:* (B, P + T, D)."""
    for ids in noted.batches:
        beginning = ids.new_tensor(noted.beginning).expand(len(ids), -1)
        whole = torch.cat([beginning, ids], 1)
        yield backbone.hidden(whole, torch.ones_like(whole))
