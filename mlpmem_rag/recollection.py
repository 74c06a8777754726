"""The answer that was taught to the recalled question has a say of its own.

A memory that is taught with noise looks at all of a request, and where it says something else than
the answer of the question that the request is recalled as, that answer is right oftener (docs/
experiments.md). So as long as a text says what that answer says, the answer's next token has a
share of its own in the mixture, as the copied word has in a pointer network (arXiv 1704.04368,
equation 9): p = s + (1 - s) p_mixture for this token, (1 - s) p_mixture for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mlpmem_rag.memory import columns_of

SHARE = 0.3
"""Of the answer's next token, at lambda 1 (docs/experiments.md)."""


class Recollection:
    """What the answers say next, line by line, as long as the texts say the same."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        """Begin with nothing said; an empty answer says nothing."""
        self._answers = answers
        self._said = 0
        self._same = [True] * len(answers)

    def expected(self, count: int) -> list[list[int]]:
        """The next tokens of each line if it goes on like its answer, -1 where it says nothing."""
        return [
            [
                answer[place] if same and place < len(answer) else -1
                for place in range(self._said, self._said + count)
            ]
            for answer, same in zip(self._answers, self._same, strict=True)
        ]

    def take(self, tokens: Sequence[int]) -> None:
        """The next token of each line."""
        for number, ((expected,), token) in enumerate(zip(self.expected(1), tokens, strict=True)):
            self._same[number] = expected == token
        self._said += 1


def with_recollection(
    log_probs: Tensor, corpus_tokens: Tensor, weight: float, expected: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """A memory that the answers' next tokens are part of, and the weight of both in the mixture.

    Args:
        log_probs: the memory's. *Shape:* (B, N, V).
        corpus_tokens: the ids of its vocabulary. *Shape:* (V,).
        weight: its weight in the mixture.
        expected: ids of the answers' next tokens, -1 where there is none. *Shape:* (B, N).
        share: of these in the mixture.

    Returns:
        Log-probabilities and weights. *Shapes:* (B, N, V), (B, N, 1).
    """
    columns, known = columns_of(expected, corpus_tokens)
    part = torch.where(known, share, 0.0)[..., None].to(log_probs)  # (B, N, 1)
    both = part + (1 - part) * weight
    out = log_probs + ((1 - part) * weight / both).log()
    there = out.gather(-1, columns[..., None])
    return out.scatter(-1, columns[..., None], there.logaddexp((part / both).log())), both


def of_answer(
    log_probs: Tensor, answer: Sequence[int], taught: Sequence[int], share: float
) -> Tensor:
    """Log-probabilities of an answer's tokens once the taught one has its share. *Shape:* (A,)."""
    recollection = Recollection([taught])
    out = log_probs.clone()
    for place, token in enumerate(answer):
        ((expected,),) = recollection.expected(1)
        if expected >= 0:
            out[place] += math.log1p(-share)
        if expected == token:
            out[place] = out[place].logaddexp(out.new_tensor(share).log())
        recollection.take([token])
    return out


class RecollectionProcessor(LogitsProcessor):
    """The same for transformers' `generate`, whose scores are the mixture's log-probabilities."""

    def __init__(self, answers: Tensor, share: float) -> None:
        """Answers as token ids, -1 behind their ends; share above 0. *Shape:* (B, K)."""
        self._answers = answers.long()
        self._share = share
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rows of one request stand together. *Shapes:* (R, T), (R, W) -> (R, W)."""
        if self._start is None:
            self._start = input_ids.shape[1]
        said = input_ids[:, self._start :]
        place = said.shape[1]
        if place >= self._answers.shape[1]:
            return scores
        each = len(input_ids) // len(self._answers)  # beams, or several samples
        answers = self._answers.repeat_interleave(each, dim=0)
        token = answers[:, place : place + 1]
        same = (answers[:, :place] == said).all(1, keepdim=True) & (token >= 0)
        token = token.clamp_min(0)
        same &= scores.gather(1, token).isfinite()  # what is forbidden stays so
        part = scores.new_tensor(self._share)
        out = scores.log_softmax(-1) + torch.log1p(-part)
        out = out.scatter(1, token, out.gather(1, token).logaddexp(part.log()))
        return torch.where(same, out, scores)
