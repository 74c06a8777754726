"""p = lambda * p_mem + (1 - lambda) * p_LM, and the lambda that fits held-out text best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
            f"lambda = {lambda_}: allowed are 0 (base model alone) to 1 (memory, "
            "as far as its gate lets it)"
        )
    return float(lambda_)


def check_temperature(temperature: float) -> float:
    """Return the memory's temperature when it is one.

    Raises:
        ConfigError: not above 0, or not finite.
    """
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"memory_temperature = {temperature}: allowed are numbers above 0")
    return float(temperature)


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
    weight = gated_weight(base, memory_log_probs, corpus_tokens, lambda_, gate, asked=asked)
    return mixture(base, [Share(memory_log_probs, corpus_tokens, weight)])


@dataclass(frozen=True)
class Share:
    """One memory's part in a mixture.

    Attributes:
        log_probs: over its corpus vocabulary. *Shape:* (..., V).
        corpus_tokens: the base's ids of that vocabulary. *Shape:* (V,).
        weight: 0 to 1. *Shape:* () or (..., 1).
    """

    log_probs: Tensor
    corpus_tokens: Tensor
    weight: Tensor


def asks(view: Tensor | None, *, asked: bool) -> bool | Tensor:
    """Which rows of what a memory reads are a request; False: none.

    *Shapes:* (B, Q), zeros where nothing is told -> (B, 1).
    """
    return view.ne(0).any(-1, keepdim=True) if asked and view is not None else False


def gated_weight(
    base: Tensor,
    memory_log_probs: Tensor,
    corpus_tokens: Tensor,
    lambda_: float,
    gate: Gate | None,
    *,
    asked: bool | Tensor,
) -> Tensor:
    """Lambda times the opening of the gate; shapes as in `mix`. *Shape:* () or (..., 1)."""
    if gate is None:
        # In main memory, from where kernels take a number without a copy; graphs have it inside.
        device = base.device if torch.compiler.is_compiling() else None
        return torch.tensor(lambda_, dtype=torch.float64, device=device)
    features = gate_features(memory_log_probs, base, corpus_tokens)
    return (lambda_ * gate.opening(features, asked=asked))[..., None]


def mixture(base: Tensor, shares: Sequence[Share]) -> Tensor:
    """P = sum of w_i p_i + (1 - sum of w_i) p_LM, as log-probabilities.

    Weights that sum to more than 1 are scaled to sum to 1, position by position: the base model
    then has no say. *Shape:* base log-probabilities (..., W) -> (..., W).
    """
    total = sum((share.weight for share in shares[1:]), shares[0].weight)
    mixed = base + torch.log1p(-total.clamp(max=1.0))
    for share in shares:
        weight = share.weight if len(shares) == 1 else share.weight / total.clamp(min=1.0)
        tokens = share.corpus_tokens
        there = torch.logaddexp(mixed[..., tokens], share.log_probs + torch.log(weight))
        mixed = mixed.index_copy(-1, tokens, there)
    return mixed


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
