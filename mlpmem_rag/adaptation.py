"""An encoder that has read the corpus: fine-tuned until it tells its sentences apart.

A general sentence encoder has never seen the documents. The questions written from them show what
is asked of each sentence; trained on these by contrast, it finds the right one more often, for
people's questions too (docs/experiments.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag.errors import TrainingError
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.query import SentenceEncoder
from mlpmem_rag.questions import Question
from mlpmem_rag.scoring import normalize

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Numbers = npt.NDArray[np.int64]

FEWEST_STEPS, MOST_STEPS = 60, 120
"""A quarter of an epoch of the questions, between these; all of a shorter epoch."""
SENTENCES = 16
"""Of a step; those of one document are what is hard to tell apart."""
DOCUMENTS = 4
ANSWERS = 2
"""Of each sentence that are asked for in a step, in so many wordings each."""
LEARNING_RATE = 1e-4
WAY = 0.5
"""From the first weights to the trained ones. All the way, it forgets what it knew of topics: with
the documents around it, it finds the sentence, and without them another document's (arXiv
2109.01903; docs/experiments.md)."""
WARMUP = 20
TEMPERATURE = 0.05
FROZEN = 0.5
"""Share of its layers, from below, that stay as they are; words stand for there what they stood for
(docs/experiments.md)."""
GROUP = 16
"""Texts of like length that run at once; a sentence is several times as long as a question."""


@dataclass(frozen=True)
class Lesson:
    """What one step learns.

    Attributes:
        questions: texts.
        sentences: texts.
        sources: number of the sentence that answers each question. *Shape:* (G,).
        answers: equal for questions of one sentence with the same answer. *Shape:* (G,).
    """

    questions: list[str]
    sentences: list[str]
    sources: list[int]
    answers: list[int]


def write_adapted(
    encoder: SentenceEncoder,
    questions: Sequence[Question],
    numbers: Numbers,
    folder: Path,
    *,
    seed: int,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """What an encoder becomes by some of the questions, in half precision.

    Args:
        encoder: where it begins; left as it is.
        questions: written from the corpus.
        numbers: which of them may be learned.
        folder: where to write it, for `load_encoder`.
        seed: of the choice of questions.
        on_progress: called at every step.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    model = copy.deepcopy(encoder.model).float()  # half precision would lose small steps
    adapt(model, [questions[number] for number in numbers], seed=seed, on_progress=on_progress)
    with torch.no_grad():
        for mine, first in zip(model.parameters(), encoder.model.parameters(), strict=True):
            mine.lerp_(first.float(), 1 - WAY)
    model.half().save_pretrained(str(folder), create_model_card=False)


def adapt(
    model: SentenceTransformer,
    questions: Sequence[Question],
    *,
    seed: int,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Train the upper layers of a sentence encoder in place, without dropout.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    catalogue = _Catalogue.of(questions)
    steps = num_steps(len(questions))
    rng = np.random.default_rng(seed)
    freeze(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.0)
    device = torch.device(model.device)
    model.eval()
    for step in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            loss = contrast(model, catalogue.lesson(rng))
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the query encoder's loss became {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            rising, falling = (step + 1) / WARMUP, (steps - step) / steps
            group["lr"] = LEARNING_RATE * min(1.0, rising) * falling
        optimizer.step()
        on_progress(ProgressEvent("encoder", step + 1, steps, "steps"))


def freeze(model: SentenceTransformer) -> None:
    """Leave embeddings and lower layers as they are, so that nothing runs back through them.

    Where the layers are not found, only embeddings stay.
    """
    upper = _upper(model)
    parameters = list(model.named_parameters())
    first = next((n for n, (name, _) in enumerate(parameters) if name.startswith(upper)), 0)
    for _, parameter in parameters[:first]:
        parameter.requires_grad_(False)
    for embedding in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
        embedding.requires_grad_(False)


def _upper(model: SentenceTransformer) -> str:
    """Where the names of the parameters that are learned begin; empty: with the first."""
    config = getattr(getattr(model[0], "model", None), "config", None)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return f"{name}.{round(FROZEN * layers)}."
    return ""


def num_steps(questions: int) -> int:
    """Of so many questions; see `FEWEST_STEPS`."""
    epoch = math.ceil(questions / (SENTENCES * ANSWERS**2))
    return min(epoch, max(FEWEST_STEPS, min(epoch // 4, MOST_STEPS)))


def contrast(model: SentenceTransformer, lesson: Lesson) -> Tensor:
    """Which sentence answers a question, and which other questions have the same answer.

    Cross-entropy over the sentences of the lesson, and over its other questions (the mean over
    all of the same answer, as in supervised contrastive learning, arXiv 2004.11362). *Shape:* ().
    """
    vectors = _vectors(model, [*lesson.questions, *lesson.sentences])
    count = len(lesson.questions)
    questions, sentences = vectors[:count], vectors[count:]
    sources = torch.tensor(lesson.sources, device=questions.device)
    answers = torch.tensor(lesson.answers, device=questions.device)
    found = F.cross_entropy(questions @ sentences.T / TEMPERATURE, sources)
    same = answers[:, None] == answers
    same.fill_diagonal_(False)
    asked = same.any(1)
    if not bool(asked.any()):
        return found
    likeness = questions @ questions.T / TEMPERATURE
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    likeness = likeness.masked_fill(itself, -math.inf)
    log_probs = likeness.log_softmax(1).masked_fill(~same, 0.0).sum(1) / same.sum(1).clamp_min(1)
    return found - log_probs[asked].mean()


def _vectors(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Of length 1, with a gradient; texts of like length run together. *Shape:* -> (N, Q)."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    vectors = torch.cat([_run(model, [texts[number] for number in group]) for group in groups])
    return vectors[torch.tensor(order, device=vectors.device).argsort()]


def _run(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    tokens: Any = model.preprocess(list(texts))
    features = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in tokens.items()}
    vectors: Tensor = model(features)["sentence_embedding"]
    return F.normalize(vectors.float(), dim=-1)


@dataclass(frozen=True)
class _Catalogue:
    """Sentences by document, and the questions of each by answer."""

    documents: list[list[int]]
    sentences: list[str]
    wordings: list[list[list[str]]]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> _Catalogue:
        numbers: dict[str, int] = {}
        documents: dict[str, list[int]] = {}
        wordings: list[dict[str, list[str]]] = []
        for question in questions:
            number = numbers.setdefault(question.source, len(numbers))
            if number == len(wordings):
                wordings.append({})
                documents.setdefault(question.document, []).append(number)
            answer = normalize(question.answer)
            wordings[number].setdefault(answer, []).append(question.text)
        return cls(
            list(documents.values()),
            list(numbers),
            [list(by_answer.values()) for by_answer in wordings],
        )

    def lesson(self, rng: np.random.Generator) -> Lesson:
        """Some sentences of a few documents, with a few questions each."""
        chosen: list[int] = []
        for document in rng.permutation(len(self.documents)):
            here = self.documents[document]
            room = SENTENCES - len(chosen)
            most = min(room, SENTENCES // min(DOCUMENTS, len(self.documents)), len(here))
            chosen += [here[place] for place in rng.permutation(len(here))[:most]]
            if len(chosen) == SENTENCES:
                break
        texts: list[str] = []
        sources: list[int] = []
        answers: list[int] = []
        different = 0
        for place, number in enumerate(chosen):
            by_answer = self.wordings[number]
            for answer in rng.permutation(len(by_answer))[:ANSWERS]:
                alike = by_answer[answer]
                some = [alike[wording] for wording in rng.permutation(len(alike))[:ANSWERS]]
                texts += some
                sources += [place] * len(some)
                answers += [different] * len(some)
                different += 1
        return Lesson(texts, [self.sentences[number] for number in chosen], sources, answers)
