"""Perplexity of a text under the base model, kNN-LM and the memory.

Text without a question: the memory's gate for text decides how far it has a say, so this also
shows whether a memory harms text that has nothing to do with its documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpmem_eval.knn import NeighborMemory
from mlpmem_eval.twin import sharing_base
from mlpmem_rag.errors import ConfigError
from mlpmem_rag.heldout import Perplexities, measure
from mlpmem_rag.memory_model import MemoryModel
from mlpmem_rag.mixing import best_lambda
from mlpmem_rag.progress import OnProgress, ProgressEvent, ignore_progress
from mlpmem_rag.prompts import text_ids
from mlpmem_rag.windows import Window, make_windows

WINDOW = 1024
"""Tokens; each is predicted once, with half a window before it."""
FITTED_SHARE = 0.2
"""Of the text, from its beginning: kNN-LM's lambda is fitted there, and the rest is measured."""
STRETCH = 512
"""Tokens that the bootstrap draws together, as neighbours depend on each other."""

Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TextFigures:
    """Perplexities of one text, and the lambda of kNN-LM; None without a datastore."""

    perplexities: Perplexities
    teacher_lambda: float | None


def text_perplexity(
    memory: MemoryModel,
    teacher: NeighborMemory | None,
    text: str,
    *,
    tokens: int = 0,
    on_progress: OnProgress = ignore_progress,
) -> TextFigures:
    """Measure a text.

    Args:
        memory: on its base model.
        teacher: its kNN-LM; None: not measured.
        text: of which the first part is for fitting.
        tokens: measure at most so many; 0: all.
        on_progress: called after every window.

    Raises:
        ConfigError: the text is too short.
    """
    ids = np.asarray(text_ids(memory.tokenizer, text), dtype=np.int32)
    length = min(WINDOW, memory.context_window)
    measured = ids[: tokens + 1 if tokens else None]
    windows = make_windows([measured], length=length, stride=length // 2)
    rows = sum(window.num_rows for window in windows)
    if rows < 2 * STRETCH:
        raise ConfigError(
            f"a text of {rows} tokens is too short to measure; give {2 * STRETCH} or more"
        )

    def scored(arm: str, by: MemoryModel, lambda_: float | None) -> Probabilities:
        return _true_tokens(by, windows, lambda_, f"text, {arm}", on_progress)

    base, mixed = scored("base", memory, 0.0), scored("memory", memory, None)
    fitted = int(rows * FITTED_SHARE)
    near, teacher_lambda = base, None
    if teacher is not None:
        near = scored("knn", sharing_base(memory, teacher, 1.0), None)
        teacher_lambda = best_lambda(base[:fitted], near[:fitted])
    figures = measure(
        base[fitted:],
        near[fitted:],
        mixed[fitted:],
        (np.arange(fitted, rows) // STRETCH).astype(np.int32),
        teacher_lambda=teacher_lambda or 0.0,
        memory_lambda=1.0,  # mixed already
    )
    return TextFigures(figures, teacher_lambda)


def _true_tokens(
    memory: MemoryModel,
    windows: Sequence[Window],
    lambda_: float | None,
    stage: str,
    on_progress: OnProgress,
) -> Probabilities:
    """Probability of each token that a window predicts. *Shape:* (N,)."""
    parts = []
    for number, window in enumerate(windows, 1):
        log_probs = memory.log_probs(window.token_ids.tolist(), lambda_=lambda_)  # (T, W)
        before = log_probs[window.context - 1 : -1].double().exp().cpu().numpy()
        targets = window.token_ids[window.context :]
        parts.append(before[np.arange(len(targets)), targets])
        on_progress(ProgressEvent(stage, number, len(windows), "windows"))
    return np.concatenate(parts)
