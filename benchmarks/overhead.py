"""What a memory costs beside its bare base model: prefill and decoding, interleaved in one run.

    python -m benchmarks.overhead MEMORY [--rounds 20] [--prompt 256] [--steps 32]

Each round times base and memory one after the other, in turns of order; the figure is the median
of the rounds' ratios, with its 95 % confidence interval from their order alone, since what differs
between rounds is the machine's other load.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import quantile_test
from torch import Tensor

from mlpmem_rag.hardware import dtype_name
from mlpmem_rag.model import MLPMemForCausalLM, load_model


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, **given: object) -> tuple[float, Any]:  # noqa: ANN401
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
    return time.perf_counter() - started, output.past_key_values


@torch.inference_mode()
def decode(model: Any, cache: Any, steps: int, **given: object) -> float:  # noqa: ANN401
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    started = time.perf_counter()
    for _ in range(steps):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, **given).logits
        token = logits[:, -1:].argmax(-1)
    return (time.perf_counter() - started) / steps


def measured(model: MLPMemForCausalLM, rounds: int, prompt: int, steps: int) -> dict[str, Any]:
    ids = torch.arange(5, 5 + prompt, device=model.device)[None]
    width = model.query_size
    given = {"query_vector": torch.full((1, width), width**-0.5)} if width else {}

    def base() -> tuple[float, float]:
        seconds, cache = prefill(model.base, ids)
        return seconds, decode(model.base, cache, steps)

    def memory() -> tuple[float, float]:
        seconds, cache = prefill(model, ids, **given)
        return seconds, decode(model, cache, steps)

    arms: list[Callable[[], tuple[float, float]]] = [base, memory]
    for arm in arms:  # the first run of each is warm-up
        arm()
    pairs = []
    for number in range(rounds):
        order = arms if number % 2 else arms[::-1]
        times = {arm.__name__: arm() for arm in order}
        pairs.append((times["base"], times["memory"]))
    return {
        name: {
            "base_ms": 1e3 * statistics.median(b[place] for b, _ in pairs),
            "memory_ms": 1e3 * statistics.median(m[place] for _, m in pairs),
            **median_of([m[place] / b[place] for b, m in pairs]),
        }
        for place, name in enumerate(("prefill", "decode, a token"))
    }


def median_of(ratios: list[float]) -> dict[str, Any]:
    interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    return {"ratio": statistics.median(ratios), "interval_95": [interval.low, interval.high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("memory")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model, _, settings = load_model(options.memory, device=options.device, dtype=options.dtype)
    found = measured(model, options.rounds, options.prompt, options.steps)
    about = {
        "base": settings.base.name,
        "memory_parameters": sum(p.numel() for p in model.memory.parameters()),
        "dtype": dtype_name(model.dtype),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({**vars(options), **about, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
