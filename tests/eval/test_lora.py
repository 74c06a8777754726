"""The arm `lora`: what an adapter learns, and for how long; peft itself is an extra."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_eval.lora import IGNORED, LoraSettings, examples_of, train_lora
from mlpmem_rag.backbone import Backbone, load_backbone
from mlpmem_rag.corpus import Document
from mlpmem_rag.prompts import answer_ids
from mlpmem_rag.questions import Question


@pytest.fixture
def backbone(tiny_folder: Path) -> Backbone:
    """A tiny base model of which everything can be learned."""
    found = load_backbone(str(tiny_folder), device="cpu", dtype="float32")
    found.model.requires_grad_(True)
    return found


def examples(backbone: Backbone, documents: list[Document]) -> list[tuple[list[int], list[int]]]:
    question = Question("Who hung it?", "Ann", "Ann hung it.", documents[0].id)
    return examples_of(backbone.tokenizer, documents[:4], [question], 32)


def test_of_a_question_only_the_answer_is_learned(
    backbone: Backbone, tiny_documents: list[Document]
) -> None:
    *texts, (ids, labels) = examples(backbone, tiny_documents)
    assert all(ids == labels for ids, labels in texts)
    assert max(len(ids) for ids, _ in texts) == 32
    answer = answer_ids(backbone.tokenizer, "Ann")
    assert labels == [IGNORED] * (len(ids) - len(answer)) + answer
    assert ids[-len(answer) :] == answer


def test_training_lowers_the_loss(backbone: Backbone, tiny_documents: list[Document]) -> None:
    given = examples(backbone, tiny_documents)
    settings = LoraSettings(epochs=12, learning_rate=3e-3)
    first = train_lora(backbone.model, given, LoraSettings(epochs=1), budget_seconds=1e-6)
    last = train_lora(backbone.model, given, settings, budget_seconds=600)
    assert last.steps == last.planned > first.steps
    assert last.loss < first.loss - 1


@pytest.mark.parametrize("budget", [0.0, 1e-9])
def test_without_time_one_step_is_made(
    backbone: Backbone, tiny_documents: list[Document], budget: float
) -> None:
    trained = train_lora(
        backbone.model, examples(backbone, tiny_documents), LoraSettings(), budget_seconds=budget
    )
    assert trained.steps == 1 < trained.planned
