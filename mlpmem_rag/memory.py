"""The memory: feed-forward blocks from a hidden state to next-token logits.

A query-aware memory reads `[hidden state ; query vector]`, the vector being the retriever's view
of the request; it is what tells which question is asked. No attention and no mixing between
positions (paper, section 3). Blocks are pre-norm residual and of the base's own MLP kind; the head
covers only the tokens that occur in the corpus, since kNN targets have no mass elsewhere. Module
names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from mlpmem_rag.backbone import MLPShape
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.few_rows import Linear
from mlpmem_rag.late_interaction import (
    CANDIDATES,
    WEIGHT,
    Words,
    WordShape,
    request_size,
    tokens_of,
)

PIECE = 8192
"""Keys that are compared with a request at once."""
SUPPORT_TEMPERATURE = 1 / 30
"""Of the candidates' scores, where it is asked how many of them agree (docs/experiments.md)."""
SIZES = {"small": 1 / 16, "base": 1 / 10, "large": 1 / 4}
"""Number of blocks as a share of the base's layers; `large` is the paper's (8 of 32)."""


@dataclass(frozen=True)
class MemoryConfig:
    """Everything that decides the shape of a memory; nothing of it is chosen by hand.

    Attributes:
        hidden_size: D, width of the base's hidden states.
        intermediate_size: inner width of a block.
        num_blocks: number of blocks.
        activation: name of the activation function, as transformers names it.
        gated: SwiGLU-like block with RMSNorm, or two-matrix block with LayerNorm.
        vocab_size: number of corpus tokens, the width of the head.
        query_size: Q, width of the query vector; 0: the memory reads the hidden state alone.
        hidden_scale: hidden states are divided by it, so that they and the query vector weigh
            alike.
        num_questions: M, learned questions that are known by their keys; see `mlpmem_rag.recall`.
        recalls: whether requests are taken for these; see `Memory.recall`.
        draft_size: K, tokens that are kept of these questions' answers; see `Memory.drafts`.
        num_question_tokens: of these questions that are kept, 0: no word of theirs; see
            `mlpmem_rag.late_interaction`.
        num_sentences: S, that answer these questions.
        num_sentence_tokens: of all these that are kept.
        norm_eps: added to variances in the norms.
        inner_size: width that hidden states are first mapped to, as in published checkpoints whose
            memory is not as wide as the base; 0: they are taken as they are.
    """

    hidden_size: int
    intermediate_size: int
    num_blocks: int
    activation: str
    gated: bool
    vocab_size: int
    query_size: int = 0
    hidden_scale: float = 1.0
    num_questions: int = 0
    recalls: bool = False
    draft_size: int = 0
    num_question_tokens: int = 0
    num_sentences: int = 0
    num_sentence_tokens: int = 0
    norm_eps: float = 1e-5
    inner_size: int = 0

    @property
    def width(self) -> int:
        """Width of the residual stream: D + Q, with the inner width for D where there is one."""
        return (self.inner_size or self.hidden_size) + self.query_size

    @property
    def words(self) -> WordShape | None:
        """Of the learned questions, that requests are compared with; None: there are none."""
        if not (self.recalls and self.num_question_tokens):
            return None
        return WordShape(self.num_question_tokens, self.num_sentences, self.num_sentence_tokens)

    @property
    def request_size(self) -> int:
        """R, width of a request: its query vector, and its tokens' where words are compared."""
        return request_size(self.query_size) if self.words else self.query_size

    @property
    def learned(self) -> dict[str, Any]:
        """What decides how it learns: all but the words, which are looked at afterwards only."""
        fields = asdict(self)
        return {n: v for n, v in fields.items() if n not in asdict(WordShape(0, 0, 0))}


def derive_config(
    shape: MLPShape,
    num_layers: int,
    vocab_size: int,
    size: str,
    *,
    query_size: int = 0,
    hidden_scale: float = 1.0,
    num_questions: int = 0,
    recalls: bool = False,
    draft_size: int = 0,
    words: WordShape | None = None,
) -> MemoryConfig:
    """The memory that belongs to a base model, a corpus vocabulary and a size.

    Raises:
        ConfigError: unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r} is not known; choose one of {', '.join(SIZES)}")
    return MemoryConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_blocks=max(1, round(SIZES[size] * num_layers)),
        activation=shape.activation,
        gated=shape.gated,
        vocab_size=vocab_size,
        query_size=query_size,
        hidden_scale=hidden_scale,
        num_questions=num_questions,
        recalls=recalls,
        draft_size=draft_size,
        **(asdict(words) if words else {}),
    )


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.width, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.width, bias=False)
        self.act = ACT2FN[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (..., W) -> (..., W)."""
        down = _recomputed(self._down) if self.training else self._down
        return down(self.gate_proj(x), self.up_proj(x))

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(gate) * up)
        return out


class PlainMLP(nn.Module):
    """proj(act(fc(x))), the GPT-2 form."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.width, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.width)
        self.act = ACT2FN[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (..., W) -> (..., W)."""
        down = _recomputed(self._down) if self.training else self._down
        return down(self.up_proj(x))

    def _down(self, up: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(up))
        return out


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function; for its gradient only its inputs are kept, the rest is made again.

    The activation and its product are half of what a training step holds and take next to no time;
    torch stops before the matrix product, which the gradient does not need.
    """
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """x + MLP(norm(x))."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.mlp = GatedMLP(config) if config.gated else PlainMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (..., W) -> (..., W)."""
        out: Tensor = x + self.mlp(self.input_layernorm(x))
        return out


def _norm(config: MemoryConfig) -> nn.Module:
    kind = nn.RMSNorm if config.gated else nn.LayerNorm
    return kind(config.width, eps=config.norm_eps)


@dataclass(frozen=True)
class Candidates:
    """Learned questions that B requests may mean.

    Attributes:
        best: number of the one that each is taken for. *Shape:* (B,).
        numbers: of those that come nearest. *Shape:* (B, K).
        scores: how near, -1 to 1; -inf at places that are free. *Shape:* (B, K).
    """

    best: Tensor
    numbers: Tensor
    scores: Tensor

    def of(self, line: int) -> Candidates:
        """Those of one request."""
        return Candidates(
            *(part[line : line + 1] for part in (self.best, self.numbers, self.scores))
        )


class Memory(nn.Module):
    """Hidden states, and the request's query vector -> logits over the corpus vocabulary.

    `corpus_tokens` (V,) maps a logit's column to the token id of the base model; `questions`
    (M, Q) are the keys of learned questions, of length 1, see `mlpmem_rag.recall`; places that are
    free hold zeros. `drafts` (M, K) are the token ids with which their answers begin, as they were
    taught, -1 behind the end: generation gives them a share, see `mlpmem_rag.recollection`, and
    reads them ahead.
    """

    corpus_tokens: Tensor
    questions: Tensor
    drafts: Tensor

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        if config.inner_size:
            self.embedding_transform = Linear(config.hidden_size, config.inner_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = _norm(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("corpus_tokens", torch.arange(config.vocab_size))
        shape = (config.num_questions, config.query_size)
        self.register_buffer("questions", torch.zeros(shape))
        drafts = torch.full((config.num_questions, config.draft_size), -1, dtype=torch.int32)
        self.register_buffer("drafts", drafts)
        words = config.words
        self.words = Words(config.query_size, config.num_questions, words) if words else None

    def forward(self, hidden: Tensor, query: Tensor | None = None) -> Tensor:
        """Logits; without a query vector, a query-aware memory takes that no request is known.

        Query vectors are those of learned questions, as `recall` gives them.

        *Shapes:* hidden (..., D), query (..., Q), broadcast over positions -> (..., V).
        """
        out: Tensor = self.lm_head(self.states(hidden, query))
        return out

    def states(self, hidden: Tensor, query: Tensor | None = None) -> Tensor:
        """What the head reads; `forward` without it. *Shape:* -> (..., W)."""
        x = hidden.to(self.lm_head.weight.dtype) / self.config.hidden_scale
        if self.config.inner_size:
            x = self.embedding_transform(x)
        if width := self.config.query_size:
            shape = (*x.shape[:-1], width)
            # A vector of length 1 becomes one of unit variance, as the hidden state is.
            view = x.new_zeros(shape) if query is None else query.to(x).expand(shape) * width**0.5
            x = torch.cat([x, view], dim=-1)
        for block in self.blocks():
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def blocks(self) -> Iterator[Block]:
        """The blocks in order."""
        return (block for block in self.layers if isinstance(block, Block))

    @property
    def recalls(self) -> bool:
        """Whether requests are taken for learned questions."""
        return bool(self.config.num_questions and self.config.recalls)

    def place(self, query: Tensor) -> Tensor:
        """The query vectors of requests, without their tokens. *Shape:* (B, R) -> (B, Q)."""
        width = self.config.query_size
        return query if query.shape[1] == width else query[:, :width]

    def candidates(self, query: Tensor) -> Candidates:
        """The learned questions that each request may mean.

        By their keys; where the request brings its tokens, by the words of the first few as well.
        *Shape:* (B, Q) or (B, R).
        """
        # In bfloat16 whole numbers of keys agree alike: products of it are taken in float32.
        told = self.place(query).float()
        agreement = torch.cat([told @ keys.float().T for keys in self.questions.split(PIECE)], -1)
        agreement = agreement.masked_fill(agreement == 0, -torch.inf)  # 0: a free place
        near, numbers = agreement.topk(min(CANDIDATES, agreement.shape[-1]), dim=-1)  # (B, K)
        if self.words is None or query.shape[1] == self.config.query_size:
            return Candidates(agreement.argmax(-1), numbers, near)
        tokens = tokens_of(query, self.config.query_size)
        scores = (near + WEIGHT * self.words.agreement(tokens, numbers)) / (1 + WEIGHT)
        best = scores.argmax(-1, keepdim=True)
        return Candidates(numbers.gather(-1, best).squeeze(-1), numbers, scores)

    def nearest(self, query: Tensor) -> Tensor:
        """Number of the learned question that each request comes nearest to. *Shape:* -> (B,)."""
        return self.candidates(query).best

    def recall(self, query: Tensor, nearest: Tensor | None = None) -> Tensor:
        """The learned question that each request comes nearest to, as the blocks were taught it.

        A row of zeros, where nothing is asked, stays one; a memory of no questions, or that does
        not recall, takes requests as they are. `nearest` is given where it is known.
        *Shapes:* (B, R), (B,) -> (B, Q).
        """
        told = self.place(query)
        if not self.recalls:
            return told
        nearest = self.nearest(query) if nearest is None else nearest
        return torch.where(told.ne(0).any(-1, keepdim=True), self.questions[nearest], 0.0)

    def familiarity(self, query: Tensor, nearest: Tensor | None = None) -> list[float]:
        """How near each request is to a question learned; 0 for a memory of no questions.

        The cosine to its key, and the agreement of words where these are compared, weighted as for
        the choice; of a bare query vector the cosine alone, which is on another scale. `nearest` is
        given where it is known.
        *Shapes:* (B, R), (B,) -> B numbers, -1 to 1.
        """
        if not self.config.num_questions:
            return [0.0] * len(query)
        nearest = self.nearest(query) if nearest is None else nearest
        keys = self.questions[nearest].float()
        agreement = F.cosine_similarity(self.place(query).to(keys), keys)
        if self.words is not None and query.shape[1] > self.config.query_size:
            tokens = tokens_of(query, self.config.query_size)
            words = self.words.agreement(tokens, nearest[:, None])[:, 0]
            both = (agreement + WEIGHT * words) / (1 + WEIGHT)
            agreement = torch.where(tokens.ne(0).flatten(1).any(1), both, agreement)
        numbers: list[float] = agreement.tolist()
        return numbers

    def support(self, candidates: Candidates, answers: Tensor) -> list[float]:
        """How much of what requests may mean was taught these answers.

        The share of the candidates whose answers begin so, weighted by how near they come
        (a softmax at `SUPPORT_TEMPERATURE`); 0 where none are known.

        Args:
            candidates: of B requests.
            answers: token ids, -1 behind their ends. *Shape:* (B, A).
        """
        size = self.config.draft_size
        begun = F.pad(answers[:, :size], (0, max(0, size - answers.shape[1])), value=-1)
        same = (self.drafts[candidates.numbers] == begun[:, None]).all(-1) & bool(size)
        weights = (candidates.scores / SUPPORT_TEMPERATURE).softmax(-1).nan_to_num(0.0)
        shares: list[float] = (weights * same).sum(-1).tolist()
        return shares

    def taught_answers(self, query: Tensor, nearest: Tensor | None = None) -> Tensor:
        """How the answers to the questions begin that requests are recalled as.

        -1 behind their ends, and where nothing is asked or recalled. `nearest` is given where it is
        known. *Shapes:* (B, R), (B,) -> (B, K).
        """
        if not (self.recalls and self.config.draft_size):
            return self.drafts.new_full((len(query), 0), -1)
        nearest = self.nearest(query) if nearest is None else nearest
        asked = self.place(query).ne(0).any(-1, keepdim=True)
        return self.drafts[nearest].masked_fill(~asked, -1)

    def log_probs(
        self, hidden: Tensor, query: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Normalised over the corpus vocabulary, float32; shapes as in `forward`."""
        return F.log_softmax(self(hidden, query).float() / temperature, dim=-1)


def columns_of(tokens: Tensor, corpus_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of tokens in a memory's head, and which of them it has; the others' mean nothing.

    *Shapes:* (N,), (V,) -> (N,), (N,).
    """
    columns = torch.searchsorted(corpus_tokens, tokens).clamp_max(len(corpus_tokens) - 1)
    return columns, corpus_tokens[columns] == tokens


def new_memory(
    config: MemoryConfig, corpus_tokens: Tensor, head: Tensor | None, *, seed: int
) -> Memory:
    """A memory before training.

    Blocks start as the identity (their last matrix is zero). The head starts from the base's
    output rows of the corpus tokens where the widths agree, which converges faster than chance.
    *Shapes:* corpus_tokens (V,), head (V, D).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        memory = Memory(config)
    memory.corpus_tokens.copy_(corpus_tokens)
    with torch.no_grad():
        for block in memory.blocks():
            for parameter in block.mlp.down_proj.parameters():
                parameter.zero_()
        if head is not None and head.shape[1] == config.hidden_size:
            memory.lm_head.weight.zero_()
            memory.lm_head.weight[:, : config.hidden_size].copy_(head)
    return memory
