"""Late interaction: which of the nearest learned questions has the words that were asked.

One vector says what a request is about, and less of which words it has. So the few questions that
come nearest by their keys are compared word by word, as ColBERT compares passages (Khattab and
Zaharia, arXiv 2004.12832, equation 3): every token of the request takes the likeness of the token
most like it, here in a learned question or in the sentence that answers it, whichever is more. The
first token, which mostly says what is asked for, is looked for in the question alone and counts
twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKEN_SIZE = 64
"""T, of a token's vector as it is kept (docs/experiments.md)."""
CANDIDATES = 16
"""Questions nearest by their keys that are compared word by word."""
WEIGHT = 2.0
"""Of the agreement of words, beside that of keys."""
FIRST_WEIGHT = 2.0
"""Of the first word of a request among its words."""
WORDS_WEIGHTS = [CANDIDATES, WEIGHT, FIRST_WEIGHT]
"""What decides the choice besides words and keys."""
REQUEST_TOKENS, QUESTION_TOKENS, SENTENCE_TOKENS = 32, 32, 96
"""That are looked at. Of a request its first and the last, where people ask; else the first."""
SCALE = 127
"""Of numbers from -1 to 1 in eight bits."""

Codes = npt.NDArray[np.int8]
Ends = npt.NDArray[np.int32]


@dataclass(frozen=True)
class WordShape:
    """How many words a memory keeps; of none, nothing is compared.

    Attributes:
        num_question_tokens: of all learned questions.
        num_sentences: S, that answer these.
        num_sentence_tokens: of all these.
    """

    num_question_tokens: int
    num_sentences: int
    num_sentence_tokens: int


@dataclass(frozen=True)
class TokenTable:
    """Vectors of the tokens of N texts, one text after the other.

    Attributes:
        codes: of length 1, times `SCALE`. *Shape:* (A, T).
        ends: where each text ends. *Shape:* (N,).
    """

    codes: Codes
    ends: Ends

    def some(self, numbers: npt.NDArray[np.integer]) -> TokenTable:
        """Those of some of the texts, in this order. *Shape:* (M,)."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)[numbers]
        counts = self.ends[numbers] - starts
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)
        return TokenTable(self.codes[places], ends.astype(np.int32))


@dataclass(frozen=True)
class WordRows:
    """The words of G questions and of the S sentences that answer them.

    Attributes:
        query_vectors: of the questions. *Shape:* (G, Q).
        source_vectors: of the sentences. *Shape:* (S, Q).
        projection: from an encoder's vectors of tokens to those that are kept. *Shape:* (Q, T).
        questions: theirs.
        sentences: theirs.
    """

    query_vectors: npt.NDArray[np.float32]
    source_vectors: npt.NDArray[np.float32]
    projection: npt.NDArray[np.float32]
    questions: TokenTable
    sentences: TokenTable

    @property
    def shape(self) -> WordShape:
        """What a memory of all of them keeps."""
        return WordShape(
            len(self.questions.codes), len(self.sentences.ends), len(self.sentences.codes)
        )


class Words(nn.Module):
    """The words of learned questions, and of the sentences that answer them.

    `projection` (Q, T) is what their vectors were mapped with. Of question m the tokens end at
    `question_ends[m]` in `question_tokens` (A, T), and its sentence is `sources[m]`, likewise.
    """

    projection: Tensor
    question_tokens: Tensor
    question_ends: Tensor
    sentence_tokens: Tensor
    sentence_ends: Tensor
    sources: Tensor

    def __init__(self, query_size: int, num_questions: int, shape: WordShape) -> None:
        super().__init__()

        def codes(count: int) -> Tensor:
            return torch.zeros((count, TOKEN_SIZE), dtype=torch.int8)

        def places(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32)

        self.register_buffer("projection", torch.zeros((query_size, TOKEN_SIZE)))
        self.register_buffer("question_tokens", codes(shape.num_question_tokens))
        self.register_buffer("question_ends", places(num_questions))
        self.register_buffer("sentence_tokens", codes(shape.num_sentence_tokens))
        self.register_buffer("sentence_ends", places(shape.num_sentences))
        self.register_buffer("sources", places(num_questions))

    def know(self, rows: WordRows, numbers: npt.NDArray[np.integer], sources: Ends) -> None:
        """Keep the words of some of the questions; further places stay free.

        Args:
            rows: of all questions.
            numbers: of those to be kept. *Shape:* (M,).
            sources: number of the sentence that answers each of all questions. *Shape:* (G,).
        """
        questions = rows.questions.some(numbers)
        self.projection.copy_(torch.from_numpy(rows.projection))
        self.sentence_tokens.copy_(torch.from_numpy(rows.sentences.codes))
        self.sentence_ends.copy_(torch.from_numpy(rows.sentences.ends))
        for buffer, values in (
            (self.question_tokens, questions.codes),
            (self.question_ends, questions.ends),
            (self.sources, sources[numbers].astype(np.int32)),
        ):
            buffer.zero_()
            buffer[: len(values)] = torch.from_numpy(values)
        self.question_ends[len(questions.ends) :] = len(questions.codes)

    def agreement(self, asked: Tensor, numbers: Tensor) -> Tensor:
        """Mean likeness of a request's tokens to the best of each question and its sentence.

        Weighted: the first token has `FIRST_WEIGHT`, and its best is of the question.

        Args:
            asked: tokens of each request, as the encoder has them; rows of zeros where there are
                no more. *Shape:* (B, L, Q).
            numbers: of the learned questions to compare it with. *Shape:* (B, K).

        Returns:
            -1 to 1, 0 for a request without tokens. *Shape:* (B, K).
        """
        words = F.normalize(asked.float() @ self.projection.float(), dim=-1)  # (B, L, T)
        numbers = numbers.long()
        in_question = _best(
            words, self.question_tokens, self.question_ends, numbers, QUESTION_TOKENS
        )
        sources = self.sources[numbers].long()
        in_sentence = _best(
            words, self.sentence_tokens, self.sentence_ends, sources, SENTENCE_TOKENS
        )
        best = torch.maximum(in_question, in_sentence)
        best[:, 0] = in_question[:, 0]
        weights = asked.ne(0).any(-1, keepdim=True).float()  # (B, L, 1)
        weights[:, 0] *= FIRST_WEIGHT
        return (best * weights).sum(1) / weights.sum(1).clamp_min(1)


def _best(words: Tensor, codes: Tensor, ends: Tensor, numbers: Tensor, most: int) -> Tensor:
    """Likeness of each word to the most like it in each text. *Shape:* (B, L, T) -> (B, L, K)."""
    last = ends[numbers].long()
    first = torch.where(numbers > 0, ends[(numbers - 1).clamp_min(0)].long(), 0)
    places = first[..., None] + torch.arange(most, device=codes.device)  # (B, K, P)
    inside = places < last[..., None]
    texts = codes[places.clamp_max(len(codes) - 1)].float() / SCALE  # (B, K, P, T)
    likeness = torch.einsum("blt,bkpt->blkp", words, texts)
    return likeness.masked_fill(~inside[:, None], -1.0).amax(-1)


def request_size(query_size: int) -> int:
    """Width of a request with the vectors of its tokens behind its own."""
    return query_size * (1 + REQUEST_TOKENS)


def tokens_of(request: Tensor, query_size: int) -> Tensor:
    """Of a request as wide as that. *Shape:* (B, R) -> (B, L, Q)."""
    return cast("Tensor", request[:, query_size:].unflatten(1, (REQUEST_TOKENS, query_size)))
