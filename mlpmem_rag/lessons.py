"""What rows teach: the kNN teacher's votes on corpus text, answers to written questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mlpmem_rag.contexts import Contexts
from mlpmem_rag.cross_entropy import SparseTargets, cross_entropy, joined
from mlpmem_rag.datastore import Datastore
from mlpmem_rag.distill import Rows
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.hardware import has_bfloat16
from mlpmem_rag.memory import Memory
from mlpmem_rag.recall import question_keys
from mlpmem_rag.study import StudyRows
from mlpmem_rag.targets import Targets

CONTEXT_SHARE = 0.5
"""Share of the text rows that are told the text before them; the others know no request."""


def queued(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; a GPU fetches it when it gets there, and nothing waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Columns:
    """Columns of a memory's head by token id; 0 for tokens that the memory does not know."""

    def __init__(self, memory: Memory, vocab_size: int) -> None:
        tokens = memory.corpus_tokens.cpu().numpy()
        self._columns = np.zeros(vocab_size + 1, dtype=np.int64)  # the last place serves -1
        self._columns[tokens] = np.arange(len(tokens))
        self.device = memory.corpus_tokens.device

    def of(self, token_ids: npt.NDArray[np.int32]) -> Tensor:
        """*Shape:* any -> the same."""
        return queued(self._columns[token_ids], self.device)


@dataclass(frozen=True)
class Batch:
    """Rows as a memory takes them, and what it is to predict there.

    Attributes:
        keys: *Shape:* (R, D).
        queries: query vectors; None where the memory takes none. *Shape:* (R, Q).
        targets: *Shape:* (R,).
    """

    keys: Tensor
    queries: Tensor | None
    targets: SparseTargets

    def loss(self, memory: Memory) -> Tensor:
        """Mean over rows, computed in bfloat16 where it is fast. *Shape:* ()."""
        fast = has_bfloat16(self.keys.device)
        with torch.autocast(self.keys.device.type, torch.bfloat16, enabled=fast):
            states = memory.states(self.keys, self.queries)
        dtype = torch.bfloat16 if fast else states.dtype
        return cross_entropy(states, memory.lm_head.weight, self.targets, dtype)


class TextLesson:
    """Corpus rows: alpha * KL(p_kNN || p_mem) + (1 - alpha) * CE(next token) (paper, section 3).

    The KL is computed on the sparse targets alone, and the head covers only corpus tokens. Where
    the memory is query-aware, every other row or so is told the text before it.
    """

    def __init__(
        self,
        datastore: Datastore,
        targets: Targets,
        columns: Columns,
        *,
        alpha: float,
        contexts: Contexts | None = None,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha = {alpha}: allowed are 0 (only CE) to 1 (only KL)")
        self._datastore = datastore
        self._targets = targets
        self._columns = columns
        self._alpha = alpha
        self._contexts = contexts

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        """As the class says."""
        return self.batch(rows, generator).loss(memory)

    def batch(self, rows: Rows, generator: torch.Generator) -> Batch:
        """Keys as they are, with the text before them for some."""
        columns = self._columns.of(self._targets.token_ids[rows])
        probs = queued(self._targets.probs[rows].astype(np.float32), columns.device)
        keys, next_columns = self.keys_and_next(rows)
        targets = distillation_targets(columns, probs, next_columns, self._alpha)
        return Batch(keys, self._queries(rows, generator), targets)

    def _queries(self, rows: Rows, generator: torch.Generator) -> Tensor | None:
        if self._contexts is None:
            return None
        vectors = self._contexts.vectors[self._contexts.blocks[rows]]
        queries = queued(vectors, self._columns.device)
        told: Tensor = queries * (_uniform(queries, generator) < CONTEXT_SHARE)
        return told

    def keys_and_next(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys (R, D) and columns of the true next tokens (R,)."""
        keys = queued(self._datastore.keys(rows), self._columns.device)
        return keys, self._columns.of(self._datastore.next_tokens[rows])

    @torch.inference_mode()
    def true_token_probabilities(
        self, memory: Memory, rows: Rows, temperature: float = 1.0, batch: int = 1024
    ) -> npt.NDArray[np.float64]:
        """What the memory gives the true next token of each row. *Shape:* (R,)."""
        training = memory.training
        memory.eval()
        out = np.empty(len(rows))
        for first in range(0, len(rows), batch):
            keys, next_columns = self.keys_and_next(rows[first : first + batch])
            log_probs = memory_log_probs(memory, keys, temperature=temperature)
            chosen = log_probs.gather(1, next_columns[:, None]).squeeze(1)
            out[first : first + batch] = chosen.exp().double().cpu().numpy()
        memory.train(training)
        return out


def distillation_targets(
    columns: Tensor, probs: Tensor, next_columns: Tensor, alpha: float
) -> SparseTargets:
    """Whose cross-entropy is alpha * KL(votes || memory) + (1 - alpha) * CE(next token).

    *Shapes:* columns (R, M), probs (R, M), next_columns (R,).
    """
    truth = probs.new_full((len(probs), 1), 1 - alpha)
    entropy = -torch.special.xlogy(probs, probs).sum(1)
    return SparseTargets(
        torch.cat([columns, next_columns[:, None]], 1),
        torch.cat([alpha * probs, truth], 1),
        spread=torch.zeros_like(entropy),
        least=alpha * entropy,
    )


def smoothed_targets(next_columns: Tensor, smoothing: float) -> SparseTargets:
    """One token each, with a share of the probability spread over all. *Shape:* (R,)."""
    none = torch.zeros(len(next_columns), device=next_columns.device)
    return SparseTargets(
        next_columns[:, None], 1 - smoothing + none[:, None], spread=smoothing + none, least=none
    )


@dataclass(frozen=True)
class StudyConfig:
    """How answers to written questions are learned.

    People ask in other words than the writer: noise on both inputs makes the memory answer
    what is near a written question, rather than know the written questions by heart.

    Attributes:
        query_noise: largest length of the noise on a query vector, relative to its own.
        hidden_noise: the same for hidden states.
        source_share: share of the rows whose query vector is moved towards the source sentence's.
        smoothing: share of the probability spread over all tokens.
    """

    query_noise: float = 0.9
    hidden_noise: float = 0.5
    source_share: float = 0.3
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value outside what is allowed.
        """
        if not all(0 <= noise < math.inf for noise in (self.query_noise, self.hidden_noise)):
            raise ConfigError(
                f"noise {self.query_noise} on queries, {self.hidden_noise} on hidden states: "
                "allowed are 0 and above"
            )
        if not (0 <= self.source_share <= 1 and 0 <= self.smoothing < 1):
            raise ConfigError(
                f"source share {self.source_share} and smoothing {self.smoothing}: allowed are "
                "0 to 1"
            )


class StudyLesson:
    """Rows along the answers of written questions: cross-entropy with noise on the inputs."""

    def __init__(self, study: StudyRows, columns: Columns, config: StudyConfig) -> None:
        self._study = study
        self._columns = columns
        self._config = config
        device = columns.device
        self._queries = torch.from_numpy(question_keys(study)).to(device)
        self._sources = torch.from_numpy(study.source_vectors).to(device)

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        """As the class says."""
        return self.batch(rows, generator).loss(memory)

    def batch(self, rows: Rows, generator: torch.Generator) -> Batch:
        """Keys and query vectors with noise."""
        config = self._config
        keys, queries, next_columns = self.inputs(rows)
        places = self._study.sources[self._study.questions[rows]]
        sources = self._sources[queued(places, keys.device)]
        queries = towards(queries, sources, config.source_share, generator)
        queries = F.normalize(with_noise(queries, config.query_noise, generator), dim=-1)
        keys = with_noise(keys, config.hidden_noise, generator)
        return Batch(keys, queries, smoothed_targets(next_columns, config.smoothing))

    def inputs(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (R, D), query vectors (R, Q), columns of the answers' tokens (R,)."""
        device = self._columns.device
        keys = queued(self._study.keys[rows].astype(np.float32), device)
        questions = queued(self._study.questions[rows], device)
        return keys, self._queries[questions], self._columns.of(self._study.next_tokens[rows])


def towards(queries: Tensor, sources: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the vectors moved by a random part of the way to another. *Shapes:* (R, Q)."""
    way, chosen = _uniform(queries, generator), _uniform(queries, generator)
    return torch.where(chosen < share, torch.lerp(queries, sources, way), queries)


def with_noise(vectors: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Add noise of a random length, at most `most` times a vector's own. *Shape:* (R, D)."""
    noise = torch.empty_like(vectors).normal_(generator=generator)
    length = most * _uniform(vectors, generator) * vectors.norm(dim=-1, keepdim=True)
    noisy: Tensor = vectors + F.normalize(noise, dim=-1) * length
    return noisy


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand((len(like), 1), device=like.device, generator=generator)


class BatchLesson(Protocol):
    """A lesson that can share a forward pass with others."""

    def batch(self, rows: Rows, generator: torch.Generator) -> Batch:
        """The rows as the memory takes them. *Shape:* (R,)."""
        ...


class Curriculum:
    """Several lessons as one: the rows of the second are numbered after those of the first."""

    def __init__(self, lessons: Sequence[tuple[BatchLesson, int]]) -> None:
        self._lessons = lessons

    def loss(self, memory: Memory, rows: Rows, generator: torch.Generator) -> Tensor:
        """Mean over all rows, whichever lesson they belong to, in one pass of the memory."""
        batches = []
        first = 0
        for lesson, count in self._lessons:
            mine = rows[(rows >= first) & (rows < first + count)] - first
            if len(mine):
                batches.append(lesson.batch(mine, generator))
            first += count
        width = memory.config.query_size
        queries = [
            batch.keys.new_zeros(len(batch.keys), width) if batch.queries is None else batch.queries
            for batch in batches
        ]
        together = Batch(
            torch.cat([batch.keys for batch in batches]),
            torch.cat(queries) if width else None,
            joined([batch.targets for batch in batches]),
        )
        return together.loss(memory)


def memory_log_probs(
    memory: Memory, keys: Tensor, queries: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities as in use, computed in bfloat16 where it is fast.

    *Shapes:* (R, D), (R, Q) -> (R, V), float32.
    """
    device = keys.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
        logits = memory(keys, queries)
    log_probs: Tensor = (logits.float() / temperature).log_softmax(-1)
    return log_probs
