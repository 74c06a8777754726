"""How tokens are chosen: greedily or drawn, how many, and what ends them."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mlpmem_rag.errors import ConfigError
from mlpmem_rag.mixing import check_lambda


@dataclass(frozen=True)
class Decoding:
    """Settings of one generation.

    Attributes:
        max_new_tokens: most tokens to generate.
        lambda_: mixing weight; None: the one chosen in training.
        temperature: 0 takes the most probable token each time; above, tokens are drawn from
            p^(1/temperature).
        top_p: tokens are drawn from the smallest set that holds this much probability.
        stop: the text ends before the first of these.
        seed: of the draws; None: another one each time.
        logits_processors: change the mixture before a token is chosen (a grammar, say). One with
            a state belongs to one generation.
        batch_size: requests that wait with these same settings and are greedy are generated
            together, so many at most. All are ready sooner; in bfloat16, where computing in a
            batch changes the last bits, an unsure answer can come out otherwise than alone.
    """

    max_new_tokens: int = 128
    lambda_: float | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is outside what is allowed.
        """
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}: allowed is 1 or more")
        if self.lambda_ is not None:
            check_lambda(self.lambda_)
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature}: allowed are 0 (greedy) and above")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p = {self.top_p}: allowed are values above 0, up to 1")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size = {self.batch_size}: allowed is 1 or more")
        if not all(self.stop):
            raise ConfigError("an empty stop string would end every text at once; leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the mixture's most probable token is taken each time."""
        return self.temperature == 0.0 and not self.logits_processors

    @property
    def shareable(self) -> bool:
        """Whether requests with these settings can be generated together."""
        return self.batch_size > 1 and self.greedy

    def choosers(self) -> LogitsProcessorList:
        """What is done to the mixture so that its largest entry is the token to take."""
        steps = LogitsProcessorList(self.logits_processors)
        if self.temperature == 0.0:
            return steps
        steps.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_p < 1.0:
            steps.append(TopPLogitsWarper(self.top_p))
        steps.append(GumbelNoise(secrets.randbits(63) if self.seed is None else self.seed))
        return steps


class GumbelNoise(LogitsProcessor):
    """Noise after which the largest logit is a draw from the distribution.

    Unlike transformers' own sampling it has its own random state, so that requests served at the
    same time do not change each other's draws (the Gumbel-max trick).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*Shapes:* (B, T), (B, W) -> (B, W)."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        waits = torch.empty_like(scores, dtype=torch.float32).exponential_(
            generator=self._generator
        )
        return scores.float() - waits.log()
