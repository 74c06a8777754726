"""After the training without held-out parts: gate, confidence, and what the memory can do.

Three kinds of held-out rows: questions about text that was learned, in words that were not;
questions about text that was not learned; and that text. The confidence is fitted on questions that
were learned as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mlpmem_rag.answering import answer_batch
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.confidence import Confidence, Trace, fit_confidence
from mlpmem_rag.corpus import Document
from mlpmem_rag.gate import Gate, constant_weights, fit_gate, gate_features
from mlpmem_rag.memory import Memory, columns_of
from mlpmem_rag.model import MLPMemForCausalLM
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import answer_ids
from mlpmem_rag.query import QueryEncoder, Vectors
from mlpmem_rag.questions import Question, accepted_answers, without_topic
from mlpmem_rag.scoring import exact_match, normalize
from mlpmem_rag.study import StudyRows
from mlpmem_rag.tap import HiddenTap
from mlpmem_rag.windows import Window
from mlpmem_rag.words import requests

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

HELD_OUT_QUESTIONS = 0.05
"""Share of the questions about learned text that is held out."""
MOST_HELD_OUT = 0.5
"""Of those of which other wordings are learned, where these are few."""
ASKED_OPENING = 0.9
"""Where a request is known, for every token: a gate fitted on answers is more probable, but less
often right (docs/experiments.md). Also lambda where nothing could be held out to fit a gate."""
MIN_QUESTIONS = 8
MAX_QUESTIONS = 128
"""Questions of each kind that are answered for calibration."""
FOLDS = 5
MAX_TEXT_TOKENS = 2048
BATCH = 16
MAX_HARM = 1.004
"""Perplexity on the base model's own samples, mixture over base. Text that has nothing to do with
the corpus suffers up to twice as much (docs/experiments.md)."""
OTHER_TEXTS = 32
OTHER_TOKENS = 64


@dataclass(frozen=True)
class QuestionSplit:
    """Question numbers, each part sorted.

    Attributes:
        train: learned.
        known: held out, but about text that is learned.
        unknown: about text that is not learned.
    """

    train: Numbers
    known: Numbers
    unknown: Numbers

    @property
    def calibrates(self) -> bool:
        """Whether there is enough to fit anything to."""
        return len(self.known) >= MIN_QUESTIONS

    def among(self, studied: npt.NDArray[np.int32]) -> QuestionSplit:
        """Only those that have rows: their numbers, in any order and repeated."""
        return QuestionSplit(
            *(n[np.isin(n, studied)] for n in (self.train, self.known, self.unknown))
        )


def split_questions(
    questions: Sequence[Question], is_unknown: Mask, *, validated: bool, seed: int
) -> QuestionSplit:
    """Set apart the questions about held-out text and, to validate, a share of the others.

    Of these, what is asked in the same words, with the title behind them or without, goes together,
    and something is only held out if another wording of it is learned. Where too few are such, as
    with questions of one's own, any are held out.

    Args:
        questions: all of them.
        is_unknown: which are about held-out text. *Shape:* (M,).
        validated: whether any of the others are to be held out.
        seed: decides which.
    """
    numbers: dict[str, int] = {}
    words = [without_topic(q.text) for q in questions]
    texts = np.array([numbers.setdefault(text, len(numbers)) for text in words], int)
    luck = np.random.default_rng(seed).random(len(numbers))[texts]
    is_known = ~is_unknown & (luck < HELD_OUT_QUESTIONS)
    reworded = _held_out_wordings(questions, texts, luck, ~is_unknown)
    if reworded.sum() >= MIN_QUESTIONS:
        is_known = reworded
    is_known &= validated
    return QuestionSplit(
        train=np.flatnonzero(~is_unknown & ~is_known),
        known=np.flatnonzero(is_known),
        unknown=np.flatnonzero(is_unknown),
    )


def _held_out_wordings(
    questions: Sequence[Question], texts: Numbers, luck: Floats, learnable: Mask
) -> Mask:
    """Which questions to hold out so that another wording of each is learned. *Shape:* (M,).

    Args:
        questions: all of them.
        texts: equal for questions in the same words. *Shape:* (M,).
        luck: 0 to 1 by chance, the same for the same words; the smallest are held out. *Shape:*
            (M,).
        learnable: which may be learned at all. *Shape:* (M,).
    """
    meant = [(q.document, q.source, normalize(q.answer)) for q in questions]

    def reworded(learned: Mask, held_out: Mask) -> Mask:
        """Of what is held out that of which other words are learned, with all in its words."""
        words: dict[tuple[str, str, str], set[int]] = {}
        for number in np.flatnonzero(learned).tolist():
            words.setdefault(meant[number], set()).add(int(texts[number]))
        lacking = [
            not words.get(m, set()) - {t} for m, t in zip(meant, texts.tolist(), strict=True)
        ]
        return held_out & ~np.isin(texts, texts[held_out & np.array(lacking, dtype=bool)])

    possible = reworded(learnable, learnable)
    share = HELD_OUT_QUESTIONS * learnable.sum() / max(1, possible.sum())
    chosen = possible & (luck < min(MOST_HELD_OUT, share))
    return reworded(learnable & ~chosen, chosen)


@dataclass(frozen=True)
class HeldOutRows:
    """What memory and base model say at R held-out positions. *Shapes:* (R, F), (R,), (R,)."""

    features: Tensor
    p_memory: Tensor
    p_base: Tensor

    @classmethod
    def joined(cls, parts: Sequence[HeldOutRows]) -> HeldOutRows:
        """All rows of the parts, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})

    def some(self, count: int, rng: np.random.Generator) -> HeldOutRows:
        """At most so many of the rows, by chance."""
        chosen = torch.from_numpy(np.sort(rng.permutation(len(self.p_base))[:count]))
        return HeldOutRows(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))

    def mixed(self, gate: Gate | None, lambda_: float, *, asked: bool) -> Tensor:
        """The mixture's probability of the true tokens. *Shape:* (R,)."""
        weight = lambda_ * (gate.opening(self.features, asked=asked) if gate else 1.0)
        return weight * self.p_memory + (1 - weight) * self.p_base


@torch.inference_mode()
def score_positions(
    backbone: Backbone,
    memory: Memory,
    sequences: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    queries: Tensor | None,
) -> HeldOutRows:
    """Memory and base model before the tokens at `places` of each sequence, in order.

    *Shapes:* B sequences of token ids, B lists of R positions above 0 in all, queries (R, Q).
    """
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for line, sequence in enumerate(sequences):
        ids[line, : len(sequence)] = torch.tensor(sequence)
    ids = ids.to(backbone.device)  # what stands on the right of a token changes nothing for it
    first = min(place for part in places for place in part) - 1
    kept = torch.arange(first, longest, device=ids.device)
    with HiddenTap(backbone.mlp).listen() as tap:
        output = backbone.model(input_ids=ids, use_cache=False, logits_to_keep=kept)
    lines = [line for line, part in enumerate(places) for _ in part]
    columns = torch.tensor([place for part in places for place in part], device=ids.device)
    hidden = tap.hidden.reshape(*ids.shape, -1)[lines, columns - 1]
    query = None if queries is None else queries.to(ids.device)
    base = output.logits[lines, columns - 1 - first].float().log_softmax(-1)
    log_probs = memory.log_probs(hidden, query)
    targets = ids[lines, columns]
    known, there = columns_of(targets, memory.corpus_tokens)
    # A token outside the corpus has no mass.
    p_memory = log_probs.gather(1, known[:, None]).squeeze(1).exp() * there
    p_base = base.gather(1, targets[:, None]).squeeze(1).exp()
    features = gate_features(log_probs, base, memory.corpus_tokens)
    return HeldOutRows(features.cpu(), p_memory.cpu(), p_base.cpu())


def score_text(
    backbone: Backbone,
    memory: Memory,
    windows: Sequence[Window],
    rows: Numbers,
    *,
    on_progress: OnProgress = ignore_progress,
) -> HeldOutRows:
    """The given datastore rows, as text that no request is known for."""
    first_rows = np.concatenate([[0], np.cumsum([window.num_rows for window in windows])])
    parts = []
    for number, window in enumerate(windows):
        mine = rows[(rows >= first_rows[number]) & (rows < first_rows[number + 1])]
        if len(mine):
            places = (mine - first_rows[number] + window.context).tolist()
            sequence = window.token_ids[: places[-1] + 1].tolist()
            parts.append(score_positions(backbone, memory, [sequence], [places], None))
        on_progress(ProgressEvent("calibrate", number + 1, len(windows), "windows"))
    return HeldOutRows.joined(parts)


@torch.inference_mode()
def other_texts(backbone: Backbone, *, seed: int) -> list[list[int]]:
    """Text that is not the corpus's: what the base model writes when nothing is asked of it.

    Token ids of `OTHER_TEXTS` texts, all equally long.
    """
    mark = backbone.tokenizer.bos_token_id
    mark = backbone.tokenizer.eos_token_id if mark is None else mark
    start = torch.full((OTHER_TEXTS, 1), mark or 0, device=backbone.device)
    length = min(OTHER_TOKENS, backbone.context_window - 1)
    model: Any = backbone.model  # generate() is annotated for other classes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts: list[list[int]] = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,  # from its very distribution, whatever settings it comes with
            top_k=0,
            top_p=1.0,
            typical_p=1.0,
            min_p=0.0,
            temperature=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=mark or 0,
        ).tolist()
    return texts


def score_other_text(
    backbone: Backbone,
    memory: Memory,
    texts: Sequence[Sequence[int]],
    *,
    on_progress: OnProgress = ignore_progress,
) -> HeldOutRows:
    """Memory and base model on `other_texts`.

    The memory has nothing to say there, and the gate learns to leave it out.
    """
    length = len(texts[0]) - 1
    places = range(length // 4 + 1, length + 1)  # with some text before it
    parts = []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        parts.append(score_positions(backbone, memory, batch, [places] * len(batch), None))
        on_progress(ProgressEvent("gate", first + len(batch), len(texts), "texts"))
    return HeldOutRows.joined(parts)


def _fitted(parts: Sequence[HeldOutRows]) -> tuple[float, ...]:
    """A gate's weights on several kinds of rows that count alike, whatever their number."""
    rows = HeldOutRows.joined(parts)
    weights = torch.cat([torch.full_like(p.p_base, 1 / len(p.p_base)) for p in parts])
    return fit_gate(rows.features, rows.p_memory, rows.p_base, weights)


def unharming(weights: tuple[float, ...], other: HeldOutRows) -> tuple[float, ...]:
    """A gate's weights with the largest constant, up to its own, that does no harm to other text.

    The mixture's perplexity on these rows is at most `MAX_HARM` times the base's.
    """

    def shifted(shift: float) -> tuple[float, ...]:
        return (*weights[:-1], weights[-1] + shift)

    def harms(shift: float) -> bool:
        gate = Gate(asked=weights, plain=shifted(shift))
        mixed = other.mixed(gate, 1.0, asked=False).clamp_min(1e-30)
        harm = (other.p_base.clamp_min(1e-30).log() - mixed.log()).mean()
        return float(harm) > math.log(MAX_HARM)

    if not harms(0.0):
        return weights
    low, high = -60.0, 0.0
    while harms(low):  # until the gate is closed
        low *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if harms(middle) else (middle, high)
    return shifted(low)


@dataclass(frozen=True)
class StudyFigures:
    """What the training without held-out parts has learned of the written questions.

    Attributes:
        questions: taught in all.
        sources: distinct sentences or lines they were written from.
        coverage: share of the corpus's words that stand in the answer of some question.
        taught: exact match on questions that were learned, as `accepted_answers` has it.
        held_out: the same on other wordings of what was learned.
        nearest: exact match there of the answer to the learned question that it is recalled as,
            which is what a memory without generalisation would reach.
        unknown: exact match on questions about documents that were not learned.
        confidence_auroc: how well the confidence tells right answers from wrong ones on
            questions it was not fitted on; None where it could not be measured.
        text_gate: mean of the gate on held-out text, 0 where the memory is left out.
    """

    questions: int
    sources: int
    coverage: float
    taught: float | None = None
    held_out: float | None = None
    nearest: float | None = None
    unknown: float | None = None
    confidence_auroc: float | None = None
    text_gate: float | None = None


@dataclass(frozen=True)
class HeldOutAnswer:
    """How sure the memory was of an answer to a question that it had not learned.

    Attributes:
        question: its number.
        confidence: probability that the answer is right.
        right: whether it is.
    """

    question: int
    confidence: float
    right: bool


@dataclass(frozen=True)
class Calibration:
    """What the held-out parts were for.

    Attributes:
        gate: of the mixture.
        confidence: None: there was too little to fit one on.
        figures: what was measured.
        answers: to other wordings of what was learned, for whoever weighs the memory against
            something else.
    """

    gate: Gate
    confidence: Confidence | None
    figures: StudyFigures
    answers: tuple[HeldOutAnswer, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `dataclasses.asdict`."""
        confidence = values["confidence"]
        return cls(
            Gate(**{name: tuple(weights) for name, weights in values["gate"].items()}),
            Confidence(tuple(confidence["weights"])) if confidence else None,
            StudyFigures(**values["figures"]),
            tuple(HeldOutAnswer(**answer) for answer in values.get("answers", ())),
        )


def calibrate(
    model: MLPMemForCausalLM,
    backbone: Backbone,
    questions: Sequence[Question],
    study: StudyRows,
    split: QuestionSplit,
    text: HeldOutRows,
    others: Sequence[Sequence[int]],
    coverage: float,
    *,
    encoder: QueryEncoder | None = None,
    seed: int,
) -> Calibration:
    """Fit gate and confidence, and measure what the memory makes of written questions.

    `model` has no gate yet; `text` is of the held-out documents, `others` are `other_texts`;
    `encoder` is needed where words are compared.
    """
    rng = np.random.default_rng(seed)

    def some(numbers: Numbers) -> Numbers:
        return np.sort(rng.permutation(numbers)[:MAX_QUESTIONS])

    taught, known, unknown = some(split.train), some(split.known), some(split.unknown)
    text = text.some(MAX_TEXT_TOKENS, rng)
    other = score_other_text(backbone, model.memory, others)
    plain = unharming(_fitted([text, other]), other)
    gate = Gate(asked=constant_weights(ASKED_OPENING), plain=plain)

    asked = np.concatenate([taught, known, unknown])
    every_answer = accepted_answers(questions)
    accepted = [every_answer[n] for n in asked]
    lengths = [len(answer_ids(backbone.tokenizer, a)) for answers in accepted for a in answers]
    texts = [questions[n].text for n in asked]
    vectors = study.query_vectors[asked]
    if encoder is not None and model.memory.words is not None:
        vectors = requests(encoder, texts, words=True)
    replies = answer_batch(
        model,
        backbone.tokenizer,
        texts,
        vectors,
        max_new_tokens=max(lengths) + 1,  # what goes on for longer is wrong
    )
    right = np.array([exact_match(r, a) for (r, _), a in zip(replies, accepted, strict=True)])
    traces = [trace for _, trace in replies]
    sure = _unfitted(traces, right, rng)
    held_out, unlearned = len(taught), len(taught) + len(known)
    learned = split.train[np.isin(split.train, study.questions)]
    known_vectors, right_answers = vectors[held_out:unlearned], accepted[held_out:unlearned]
    nearest = nearest_answers(model.memory, known_vectors, questions, learned, right_answers)
    figures = StudyFigures(
        questions=len(questions),
        sources=len(study.source_vectors),
        coverage=coverage,
        taught=float(right[:held_out].mean()),
        held_out=float(right[held_out:unlearned].mean()),
        nearest=float(np.mean(nearest)),
        unknown=float(right[unlearned:].mean()) if len(unknown) else None,
        confidence_auroc=_auroc(right[held_out:], sure[held_out:]),
        text_gate=float(gate.opening(text.features, asked=False).mean()),
    )
    confidence = fit_confidence(traces, right.tolist())
    told = range(held_out, unlearned) if confidence else ()
    answers = [HeldOutAnswer(int(asked[n]), float(sure[n]), bool(right[n])) for n in told]
    return Calibration(gate, confidence, figures, tuple(answers))


def _unfitted(traces: Sequence[Trace], right: Mask, rng: np.random.Generator) -> Floats:
    """The confidence of each answer, fitted on the others of `FOLDS` parts. *Shape:* (N,).

    Where all of these were right, or none, that is their share.
    """
    fold = rng.permutation(len(traces)) % FOLDS
    sure = np.empty(len(traces))
    for number in range(FOLDS):
        others = np.flatnonzero(fold != number).tolist()
        model = fit_confidence([traces[n] for n in others], right[others].tolist())
        for place in np.flatnonzero(fold == number).tolist():
            sure[place] = right[others].mean() if model is None else model.of(traces[place])
    return sure


def _auroc(right: Mask, sure: Floats) -> float | None:
    return float(roc_auc_score(right, sure)) if len(set(right.tolist())) > 1 else None


def nearest_answers(
    memory: Memory,
    vectors: Vectors,
    questions: Sequence[Question],
    learned: Numbers,
    accepted: Sequence[Sequence[str]],
) -> list[bool]:
    """Whether the learned question nearest to each one asked has an answer that is accepted for it.

    `learned` are those whose keys the memory has, in their order; `accepted` are the right answers
    to the N that are asked. *Shape:* vectors (N, R).
    """
    places = np.zeros(len(accepted), np.int64)
    if memory.config.num_questions and len(accepted):
        told = torch.from_numpy(vectors).to(memory.questions.device)
        places = torch.cat([memory.nearest(part) for part in told.split(BATCH)]).cpu().numpy()
    found = learned[places]
    return [exact_match(questions[f].answer, a) for f, a in zip(found, accepted, strict=True)]


def answer_coverage(questions: Sequence[Question], documents: Sequence[Document]) -> float:
    """Share of the words of the documents that stand in an answer written from the same one."""
    answered: dict[str, set[str]] = {}
    for question in questions:
        answered.setdefault(question.document, set()).update(normalize(question.answer).split())
    words = [(d.id, word) for d in documents for word in normalize(d.text).split()]
    return sum(word in answered.get(id_, ()) for id_, word in words) / max(1, len(words))
