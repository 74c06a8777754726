"""What the memory is worth on documents it has not seen: perplexities side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlpmem_rag.backbone import Backbone
from mlpmem_rag.datastore import length_buckets, pad
from mlpmem_rag.mixing import best_lambda, mixture_nll
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.storage import allocate_array
from mlpmem_rag.windows import Window

Rows = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]

SCORE_TOKENS = 1024
"""Smaller batches than for the datastore: here each token costs a row over the vocabulary."""
MIN_DRAWN = 5
"""Documents from which on an interval comes of drawing these."""
STRETCH = 64
TEMPERATURES = (0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Perplexities:
    """Perplexity of the same held-out tokens under three models.

    Attributes:
        tokens: number of tokens measured.
        base: the frozen base model alone.
        teacher: base mixed with the kNN datastore (kNN-LM), lambda fitted on validation.
        memory: base mixed with the memory, lambda and temperature fitted on validation.
        ratio_low: lower end of the 95 % interval of memory / base.
        ratio_high: upper end (bootstrap over documents; of few, over
            stretches of their text).
    """

    tokens: int
    base: float
    teacher: float
    memory: float
    ratio_low: float
    ratio_high: float

    @property
    def kept_gain(self) -> float | None:
        """Share of the teacher's gain that the memory keeps; None where the teacher has none."""
        gain = self.base - self.teacher
        return (self.base - self.memory) / gain if gain > 0 else None


def score_base(
    backbone: Backbone,
    windows: Sequence[Window],
    rows: Rows,
    path: Path,
    *,
    on_progress: OnProgress = ignore_progress,
) -> Probabilities:
    """Probability that the base model alone gives the true token of each of `rows`.

    Stored in `path` as well. *Shape:* (R,).
    """
    first_rows = np.concatenate([[0], np.cumsum([w.num_rows for w in windows])])
    scores = np.full(int(first_rows[-1]), np.nan)
    wanted = np.zeros(len(scores) + 1, dtype=np.int64)
    wanted[rows + 1] = 1
    before = np.cumsum(wanted)  # rows asked for before each row
    needed = [w for w in range(len(windows)) if before[first_rows[w + 1]] > before[first_rows[w]]]
    done = 0
    on_progress(ProgressEvent("base scores", 0, len(needed), "windows"))
    for batch in length_buckets([windows[w] for w in needed], SCORE_TOKENS):
        chosen = [needed[b] for b in batch]
        token_ids, mask = pad([windows[w] for w in chosen], backbone.device)
        log_probs = backbone.next_token_log_probs(token_ids, mask).double().cpu().numpy()
        for line, w in enumerate(chosen):
            window = windows[w]
            stretch = log_probs[line, window.context - 1 : len(window.token_ids) - 1]
            scores[first_rows[w] : first_rows[w + 1]] = np.exp(stretch)
        done += len(batch)
        on_progress(ProgressEvent("base scores", done, len(needed), "windows"))
    out = allocate_array(path, np.float64, rows.shape)
    out[:] = scores[rows]
    return np.array(out)


def tune(p_base: Probabilities, p_memory_at: dict[float, Probabilities]) -> tuple[float, float]:
    """Lambda and temperature with the best mixture on the validation rows.

    Args:
        p_base: base's probability of the true tokens. *Shape:* (R,).
        p_memory_at: the memory's, for each temperature tried.
    """
    choices = []
    for temperature, p_memory in p_memory_at.items():
        lambda_ = best_lambda(p_base, p_memory)
        choices.append((mixture_nll(p_base, p_memory, lambda_), lambda_, temperature))
    _, lambda_, temperature = min(choices)
    return lambda_, temperature


def measure(
    p_base: Probabilities,
    p_teacher: Probabilities,
    p_memory: Probabilities,
    documents: npt.NDArray[np.int32],
    *,
    teacher_lambda: float,
    memory_lambda: float,
    seed: int = 0,
) -> Perplexities:
    """Perplexities of the test rows, with settings chosen elsewhere. All *shapes* (R,)."""
    mixed = memory_lambda * p_memory + (1 - memory_lambda) * p_base
    gain = np.log(np.maximum(mixed, 1e-300)) - np.log(np.maximum(p_base, 1e-300))
    low, high = _bootstrap_ratio(gain, documents, seed)
    return Perplexities(
        tokens=len(p_base),
        base=float(np.exp(mixture_nll(p_base, p_base, 0.0))),
        teacher=float(np.exp(mixture_nll(p_base, p_teacher, teacher_lambda))),
        memory=float(np.exp(mixture_nll(p_base, p_memory, memory_lambda))),
        ratio_low=low,
        ratio_high=high,
    )


def _bootstrap_ratio(
    gain: Probabilities, documents: npt.NDArray[np.int32], seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """95 % interval of perplexity ratio: documents are drawn, not tokens, as these depend.

    Few documents would say nothing of others: of these, stretches of text are drawn, and the
    interval is of more text of theirs.
    """
    _, index = np.unique(documents, return_inverse=True)
    if index.max(initial=0) + 1 < MIN_DRAWN:
        index = np.arange(len(gain)) // STRETCH
    sums, counts = np.bincount(index, weights=gain), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    ratios = np.exp(-sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
