"""How right an answer is, and how well its confidence tells right from wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from mlpmem_rag.query import QueryEncoder
from mlpmem_rag.scoring import exact_match, normalize, token_f1

Floats = npt.NDArray[np.float64]

CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Scores:
    """Of one answer; 0 to 1 each.

    Attributes:
        em: exact match with a reference, as SQuAD's evaluation defines it.
        f1: largest F1 of the words shared with a reference, likewise.
        contains: whether a reference stands in the answer, as whole words.
    """

    em: float
    f1: float
    contains: float


def score(answer: str, references: Sequence[str]) -> Scores:
    """Scores of one answer to an answerable question."""
    return Scores(
        em=float(exact_match(answer, references)),
        f1=token_f1(answer, references),
        contains=float(contains(answer, references)),
    )


def contains(answer: str, references: Sequence[str]) -> bool:
    """Whether the words of a reference stand in the answer, one after the other."""
    words = f" {normalize(answer)} "
    return any(f" {normalize(r)} " in words for r in references if normalize(r))


def similarities(
    answers: Sequence[str], references: Sequence[Sequence[str]], encoder: QueryEncoder
) -> Floats:
    """Largest cosine of an answer with one of its references, -1 to 1. *Shape:* (N,).

    An empty answer has 0; every question needs a reference.
    """
    texts = sorted({*answers, *(text for group in references for text in group)})
    vectors = encoder.encode(texts).astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    row = {text: number for number, text in enumerate(texts)}
    return np.array(
        [
            max(float(vectors[row[answer]] @ vectors[row[r]]) for r in group) if answer else 0.0
            for answer, group in zip(answers, references, strict=True)
        ]
    )


@dataclass(frozen=True)
class Abstention:
    """What a confidence is worth.

    Attributes:
        n: answers that came with one.
        auroc_right: right against wrong answers to answerable questions; None: all alike.
        auroc_answerable: answerable against unanswerable questions; None: all alike.
        aurc: area under the risk-coverage curve: mean risk over all coverages.
        brier: mean squared difference between a confidence and 1 (right) or 0 (wrong).
        calibration_error: how far, on average, the share of right answers is from the confidence
            told, in ten bins of equal width (expected calibration error, arXiv 1706.04599).
        curve: (coverage, risk, confidence), from the surest answer on; one point for each
            distinct confidence.
    """

    n: int
    auroc_right: float | None
    auroc_answerable: float | None
    aurc: float
    brier: float
    calibration_error: float
    curve: tuple[tuple[float, float, float], ...]


def abstention(
    confidences: Sequence[float], right: Sequence[bool], answerable: Sequence[bool]
) -> Abstention | None:
    """Judge confidences; an answer to an unanswerable question counts as wrong.

    Returns None without any answer.
    """
    if not confidences:
        return None
    sure = np.asarray(confidences, dtype=np.float64)
    can = np.asarray(answerable, dtype=bool)
    correct = np.asarray(right, dtype=bool) & can
    curve = risk_coverage(sure, correct)
    _, groups = np.unique(-sure, return_inverse=True)
    expected = np.bincount(groups, ~correct) / np.bincount(groups)  # in whatever order ties come
    risks = np.cumsum(expected[np.sort(groups)]) / np.arange(1, len(sure) + 1)
    return Abstention(
        n=len(sure),
        auroc_right=_auroc(correct[can], sure[can]),
        auroc_answerable=_auroc(can, sure),
        aurc=float(risks.mean()),
        brier=float(np.square(sure - correct).mean()),
        calibration_error=calibration_error(sure, correct),
        curve=curve,
    )


def calibration_error(sure: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """See `Abstention`. *Shapes:* (N,), (N,)."""
    bins = np.minimum((sure * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    gaps = np.bincount(bins, sure - correct, minlength=CONFIDENCE_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def risk_coverage(
    sure: Floats, correct: npt.NDArray[np.bool_]
) -> tuple[tuple[float, float, float], ...]:
    """(coverage, risk, threshold) when only answers at least so sure are given."""
    order = np.argsort(-sure, kind="stable")
    wrong = np.cumsum(~correct[order])
    ends = np.flatnonzero(np.append(np.diff(sure[order]) != 0, True))
    return tuple(
        ((end + 1) / len(sure), float(wrong[end]) / (end + 1), float(sure[order][end]))
        for end in ends.tolist()
    )


def _auroc(positive: npt.NDArray[np.bool_], scores: Floats) -> float | None:
    return float(roc_auc_score(positive, scores)) if len(set(positive.tolist())) == 2 else None


def retrieval_hit(found: Sequence[str], wanted: Sequence[str]) -> bool | None:
    """Whether a document that answers was among those retrieved; None where none is known."""
    return bool(set(found) & set(wanted)) if wanted else None
