"""p = lambda * p_mem + (1 - lambda) * p_LM, and the lambda that fits held-out text best."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.gate import Gate, gate_features

Probabilities = npt.NDArray[np.floating]


def check_lambda(lambda_: float) -> float:
    """Return the mixing weight when it is one.

    Raises:
        ConfigError: outside 0..1.
    """
    if not 0.0 <= lambda_ <= 1.0:
        raise ConfigError(
            f"lambda = {lambda_}: allowed are 0 (base model alone) to 1 (memory alone)"
        )
    return float(lambda_)


def mix(
    base_logits: Tensor,
    memory_log_probs: Tensor,
    corpus_tokens: Tensor,
    lambda_: float,
    gate: Gate | None = None,
    *,
    asked: bool | Tensor = False,
) -> Tensor:
    """Log-probabilities of the mixture; at lambda 0 the base's logits, untouched.

    A gate lowers lambda token by token, in one way where a request is known (`asked`) and in
    another where none is. *Shapes:* base (..., W), memory (..., V), corpus_tokens (V,),
    asked (...) -> (..., W), with W the base's vocabulary. Tokens outside the corpus have no
    memory mass.
    """
    if lambda_ == 0.0:
        return base_logits
    base = base_logits.float().log_softmax(-1)
    weight = torch.tensor(lambda_, dtype=torch.float64, device=base.device)
    if gate is not None:
        features = gate_features(memory_log_probs, base, corpus_tokens)
        weight = (lambda_ * gate.opening(features, asked=asked))[..., None]
    mixed = base + torch.log1p(-weight)
    there = torch.logaddexp(mixed[..., corpus_tokens], memory_log_probs + torch.log(weight))
    return mixed.index_copy(-1, corpus_tokens, there)


def mixture_nll(p_base: Probabilities, p_memory: Probabilities, lambda_: float) -> float:
    """Mean negative log-likelihood of the true tokens. *Shapes:* (R,), (R,)."""
    mixed = lambda_ * p_memory.astype(np.float64) + (1 - lambda_) * p_base.astype(np.float64)
    return float(-np.log(np.maximum(mixed, np.finfo(np.float64).tiny)).mean())


def best_lambda(p_base: Probabilities, p_memory: Probabilities, *, steps: int = 40) -> float:
    """The lambda in [0, 1) with the smallest mixture loss.

    The loss is convex in lambda, so bisection on its derivative finds the one minimum.
    """
    difference = p_memory.astype(np.float64) - p_base.astype(np.float64)
    base = np.maximum(p_base.astype(np.float64), np.finfo(np.float64).tiny)
    low, high = 0.0, 0.999
    for _ in range(steps):
        middle = (low + high) / 2
        if np.mean(difference / (base + middle * difference)) > 0:
            low = middle
        else:
            high = middle
    return 0.0 if low == 0.0 else (low + high) / 2
