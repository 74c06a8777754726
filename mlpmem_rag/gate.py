"""How far to trust the memory, token by token: lambda adapts, so that other text is unharmed.

lambda_t = lambda * sigmoid(w . features + b). The features compare what memory and base model
are sure of; the few weights are fitted on held-out text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_FEATURES = 5


@dataclass(frozen=True)
class Gate:
    """Weights of the features, the last one being the constant's.

    Attributes:
        asked: where there is a query vector (so far the same for every token, see
            docs/experiments.md).
        plain: where no request is known.
    """

    asked: tuple[float, ...]
    plain: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the number of weights.

        Raises:
            ValueError: it is not one for each feature and one for the constant.
        """
        for weights in (self.asked, self.plain):
            if len(weights) != NUM_FEATURES + 1:
                raise ValueError(f"{len(weights)} gate weights instead of {NUM_FEATURES + 1}")

    def opening(self, features: Tensor, *, asked: bool | Tensor) -> Tensor:
        """What lambda is multiplied with, 0 to 1.

        *Shapes:* features (..., F), asked (...) or one for all -> (...).
        """
        known, unknown = self._weights(features)
        if isinstance(asked, bool):
            return _opening(features, known if asked else unknown)
        return torch.where(
            asked.to(features.device), _opening(features, known), _opening(features, unknown)
        )

    def _weights(self, like: Tensor) -> Tensor:
        """Both weights, where and as the features are; made once. *Shape:* (2, F + 1)."""
        if torch.compiler.is_compiling():  # a constant of the graph
            return like.new_tensor((self.asked, self.plain))
        kind = (like.device, like.dtype)
        if kind not in self._made:
            with torch.inference_mode(False):  # also for whoever asks for gradients later
                self._made[kind] = like.new_tensor((self.asked, self.plain))
        return self._made[kind]

    @cached_property
    def _made(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    @property
    def constant_opening(self) -> float | None:
        """The opening where there is a query vector; None: it differs from token to token."""
        if any(self.asked[:-1]):
            return None
        return float(torch.tensor(self.asked[-1]).sigmoid())


def _opening(features: Tensor, weights: Tensor) -> Tensor:
    """*Shapes:* (..., F), (F + 1,) -> (...)."""
    return (features @ weights[:-1] + weights[-1]).sigmoid()


def constant_weights(opening: float) -> tuple[float, ...]:
    """Weights of a gate that is open to the same degree, between 0 and 1, everywhere."""
    return (*[0.0] * NUM_FEATURES, math.log(opening / (1 - opening)))


def gate_features(memory: Tensor, base: Tensor, corpus_tokens: Tensor) -> Tensor:
    """What memory and base model are sure of, and whether they agree; all in nats.

    *Shapes:* log-probabilities memory (..., V), base (..., W), corpus_tokens (V,) -> (..., F).
    """
    memory_best, place = memory.max(-1)
    base_of_memory_best = base.gather(-1, corpus_tokens[place][..., None]).squeeze(-1)
    features = [
        memory_best,
        -(memory.exp() * memory).sum(-1),
        base.max(-1).values,
        -(base.exp() * base).sum(-1),
        base_of_memory_best,
    ]
    return torch.stack(features, -1)


def fit_gate(
    features: Tensor, p_memory: Tensor, p_base: Tensor, weights: Tensor, *, ridge: float = 1e-3
) -> tuple[float, ...]:
    """The weights with the smallest negative log-likelihood of the true tokens.

    Args:
        features: of each held-out row. *Shape:* (R, F).
        p_memory: the memory's probability of the true token. *Shape:* (R,).
        p_base: the base model's. *Shape:* (R,).
        weights: of each row, so that questions and text count alike. *Shape:* (R,).
        ridge: keeps weights finite where a feature separates the rows.
    """
    features, p_memory, p_base, weights = (
        tensor.double() for tensor in (features, p_memory, p_base, weights)
    )
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - centre) / spread
    weights = weights / weights.sum()
    log_memory = p_memory.clamp_min(1e-30).log()
    log_base = p_base.clamp_min(1e-30).log()
    solution = torch.zeros(NUM_FEATURES + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        odds = scaled @ solution[:-1] + solution[-1]
        mixed = torch.logaddexp(F.logsigmoid(odds) + log_memory, F.logsigmoid(-odds) + log_base)
        value: Tensor = -(weights * mixed).sum() + ridge * solution[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scale = solution.detach()[:-1] / spread
    constant = solution.detach()[-1] - (scale * centre).sum()
    return (*scale.tolist(), float(constant))
