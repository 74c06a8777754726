"""What a memory costs beside its bare base model: prefill and decoding, one request and eight.

The bare base model is as transformers runs it. Beside a memory its products of a few rows in
float32 are taken another way on a CPU, which is faster by itself: the cost of the memory alone is
that over a base model which takes them so, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import roofline
from benchmarks.figures import Figure, Goal
from benchmarks.rounds import median_ratio
from benchmarks.setup import Setup
from mlpmem_rag.few_rows import other_order
from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.model import MLPMemForCausalLM

PROMPT = 256
STEPS = 32
ROUNDS = 3
"""Times as many rounds as others: one takes a second."""
PREFILL = Goal(at_most=1.05)
DECODING = {1: Goal(at_most=1.15), 8: Goal(at_most=1.05)}
LIKEWISE = "base model with its products taken likewise"

Times = dict[str, list[float]]


class OtherOrder(nn.Module):
    """A base model that takes its products as it does beside a memory."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def forward(self, **given: object) -> object:
        with other_order():
            return self.base(**given)


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, **given: object) -> tuple[float, Any]:  # noqa: ANN401
    """Seconds, and the cache."""
    started = _now(ids.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    return _now(ids.device) - started, output.past_key_values


@torch.inference_mode()
def decode(model: Any, cache: Any, token: Tensor, **given: object) -> tuple[float, Tensor]:  # noqa: ANN401
    """Seconds of a step, and the next tokens. *Shape:* (B, 1) -> (B, 1)."""
    started = _now(model.device)
    logits = model(input_ids=token, past_key_values=cache, use_cache=True, **given).logits
    following = logits[:, -1:].argmax(-1)
    return _now(model.device) - started, following


def timed(
    models: Mapping[str, nn.Module], rounds: int, *, batch: int, prompt: int, steps: int
) -> tuple[Times, Times]:
    """Seconds of prefill and of a step of each model in each round, in turns of order.

    They take turns at every step, so that what else the machine does changes all alike.
    """
    prefills: Times = {name: [] for name in models}
    decodes: Times = {name: [] for name in models}
    for number in range(-1, rounds):  # the first is warm-up
        order = list(models)[:: -1 if number % 2 else 1]
        given = {name: query_given(models[name], batch) for name in order}
        caches, tokens, took = {}, {}, dict.fromkeys(order, 0.0)
        for name in order:
            model: Any = models[name]
            ids = torch.arange(5, 5 + prompt, device=model.device).repeat(batch, 1)
            first, caches[name] = prefill(model, ids, **given[name])
            tokens[name] = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
            if number >= 0:
                prefills[name].append(first)
        for _ in range(steps):
            for name in order:
                step, tokens[name] = decode(models[name], caches[name], tokens[name], **given[name])
                took[name] += step / steps
        for name in order if number >= 0 else ():
            decodes[name].append(took[name])
    return prefills, decodes


def query_given(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """A query vector for a model that takes one."""
    if not isinstance(model, MLPMemForCausalLM) or not model.query_size:
        return {}
    width = model.query_size
    return {"query_vector": torch.full((batch, width), width**-0.5, device=model.device)}


def run(setup: Setup) -> list[Figure]:
    """Ratios of times, memory over base."""
    model = setup.model
    base: nn.Module = model.base
    models: dict[str, nn.Module] = {"base": base, "memory": model}
    if model.dtype == torch.float32 and model.device.type == "cpu":
        models[LIKEWISE] = OtherOrder(base)
    weights = roofline.matrix_weights(base) + roofline.matrix_weights(model.memory)
    figures = []
    for batch, goal in DECODING.items():
        rounds = setup.rounds * (ROUNDS if batch == 1 else 1)
        prefills, decodes = timed(models, rounds, batch=batch, prompt=PROMPT, steps=STEPS)
        limits = {
            "per_second": 1 / min(decodes["memory"]),
            "needs": roofline.decode_needs(
                weights, model.dtype.itemsize, batch, dtype_name(model.dtype)
            ),
        }
        what = f"decoding, a token, batch {batch}"
        figures += [
            _figure(f"prefill of {PROMPT} tokens, batch {batch}", prefills, PREFILL, {}),
            _figure(what, decodes, goal, limits),
        ]
        if LIKEWISE in models:
            figures.append(_figure(what, decodes, Goal(), {}, LIKEWISE))
    return figures


def _figure(
    what: str, took: Times, goal: Goal, limits: dict[str, Any], against: str = "base"
) -> Figure:
    return Figure(
        what,
        "ms",
        1e3 * statistics.median(took["memory"]),
        "bare base model" if against == "base" else against,
        1e3 * statistics.median(took[against]),
        median_ratio(took["memory"], took[against]),
        goal,
        **limits,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
