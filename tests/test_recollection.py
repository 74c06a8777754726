"""The say of the answer that was taught to the recalled question, against sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlpmem_rag.mixing import Share, mixture
from mlpmem_rag.recollection import (
    Recollection,
    RecollectionProcessor,
    of_answer,
    with_recollection,
)

CORPUS = torch.tensor([1, 4, 5, 7])


def log_probs(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_lines_expect_what_their_answers_say_next_as_long_as_they_say_the_same() -> None:
    told = Recollection([[3, 4, 5], [3, 9], []])
    assert told.expected(2) == [[3, 4], [3, 9], [-1, -1]]
    told.take([3, 3, 8])
    assert told.expected(3) == [[4, 5, -1], [9, -1, -1], [-1, -1, -1]]
    told.take([4, 4, 8])
    assert told.expected(1) == [[5], [-1], [-1]]
    told.take([5, 9, 8])
    assert told.expected(1) == [[-1], [-1], [-1]], "what ended is over, who said else is out"
    told.take([5, 3, 3])
    assert told.expected(1) == [[-1], [-1], [-1]]


@pytest.mark.parametrize("weight", [0.6, 0.9, 1.0])
def test_the_mixture_by_hand(weight: float) -> None:
    memory, base = log_probs(2, 3, 4, seed=0), log_probs(2, 3, 10, seed=1)
    expected = torch.tensor([[5, -1, 1], [2, 7, 4]])  # 2 is no token of the corpus
    told, both = with_recollection(memory, CORPUS, weight, expected, 0.3)
    found = mixture(base, [Share(told, CORPUS, both)]).exp()
    plain = mixture(base, [Share(memory, CORPUS, torch.tensor(weight))]).exp()
    for row in range(2):
        for place in range(3):
            token = int(expected[row, place])
            by_hand = plain[row, place].clone()
            if token in CORPUS:
                by_hand *= 0.7
                by_hand[token] += 0.3
            torch.testing.assert_close(found[row, place], by_hand, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(2, 3))


def scores_after(processor: RecollectionProcessor, ids: list[list[int]]) -> Tensor:
    return processor(torch.tensor(ids), log_probs(len(ids), 10, seed=2))


def test_generates_scores_by_hand() -> None:
    processor = RecollectionProcessor(torch.tensor([[3, 4, -1], [-1, -1, -1]]), 0.3)
    plain = log_probs(4, 10, seed=2).exp()
    prompt = [[8, 8], [8, 8], [9, 9], [9, 9]]  # two beams of each request

    def expected(**tokens: int) -> Any:  # noqa: ANN401
        out = plain.clone()
        for row, token in tokens.items():
            out[int(row[1:])] *= 0.7
            out[int(row[1:]), token] += 0.3
        return out

    def check(said: list[list[int]], **tokens: int) -> None:
        ids = [p + s for p, s in zip(prompt, said, strict=True)]
        found = scores_after(processor, ids).exp()
        torch.testing.assert_close(found, expected(**tokens), rtol=1e-4, atol=1e-6)

    check([[], [], [], []], r0=3, r1=3)
    check([[3], [5], [3], [3]], r0=4)
    check([[5], [3], [3], [3]], r1=4)  # beams change places
    check([[3, 4], [3, 5], [3, 4], [3, 4]])
    check([[3, 4, 1]] * 4)
    check([[3, 4, 1, 1]] * 4)


def test_what_is_forbidden_stays_so() -> None:
    scores = log_probs(2, 10, seed=5)
    scores[0, 3] = -torch.inf
    processor = RecollectionProcessor(torch.tensor([[3], [3]]), 0.3)
    found = processor(torch.tensor([[1], [2]]), scores)
    torch.testing.assert_close(found[0], scores[0], rtol=0, atol=0)
    assert found[1, 3].exp() > 0.3


def test_without_an_answer_the_scores_stay_the_same_distribution() -> None:
    scores = log_probs(2, 10, seed=3)
    processor = RecollectionProcessor(torch.full((2, 4), -1), 0.3)
    found = processor(torch.tensor([[1], [2]]), scores)
    np.testing.assert_allclose(found, scores, atol=1e-6)


def test_the_tokens_of_an_answer_by_hand() -> None:
    plain = log_probs(1, 5, seed=4)[0]

    def check(answer: list[int], taught: list[int], factors: list[tuple[float, float]]) -> None:
        found = of_answer(plain, answer, taught, 0.3).exp()
        by_hand = torch.stack([p * f + s for p, (f, s) in zip(plain.exp(), factors, strict=True)])
        torch.testing.assert_close(found, by_hand)

    said, other, over = (0.7, 0.3), (0.7, 0.0), (1.0, 0.0)
    check([3, 4, 9, 9, 9], [3, 4], [said, said, over, over, over])
    check([3, 5, 4, 4, 4], [3, 4, 4], [said, other, over, over, over])
    check([5, 4, 9, 9, 9], [3, 4], [other, over, over, over, over])
    check([3, 4, 9, 9, 9], [], [over] * 5)
