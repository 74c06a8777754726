"""Peak memory of answering: base model and memory beside the bare base model.

Each arm loads and generates in a process of its own, since a process never gives back its peak:

    base    the base model by transformers alone
    vector  base and memory, the query vector given
    text    base, memory and query encoder, the question given

The figure of an arm is the peak of its resident memory (on a GPU, of what torch allocated there),
the median of its runs. The goal: at most 1.1 times the bare base model's peak and the weights that
the arm adds to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from benchmarks.figures import Figure, Goal
from benchmarks.rounds import Ratio
from benchmarks.setup import Setup
from mlpmem_eval.meters import metered
from mlpmem_rag.artifact import load_settings
from mlpmem_rag.embedded import embedded_model_path
from mlpmem_rag.query import SentenceEncoder

ARMS = ("base", "vector", "text")
ALLOWED = 1.1
RUNS = 3
PROMPT = 256
STEPS = 64


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, those that are shared once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def base_arm(options: argparse.Namespace) -> tuple[Any, dict[str, Any], int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(options.base)  # no text is answered without one
    dtype = getattr(torch, options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype)
    return model.to(options.device), {}, 0


def vector_arm(options: argparse.Namespace) -> tuple[Any, dict[str, Any], int]:
    from mlpmem_rag.model import load_model

    model, _, _ = load_model(options.memory, device=options.device, dtype=options.dtype)
    width = model.query_size
    given = {"query_vector": torch.full((1, width), width**-0.5)} if width else {}
    return model, given, weight_bytes(model.memory)


def text_arm(options: argparse.Namespace) -> tuple[Any, dict[str, Any], int]:
    model, _, added = vector_arm(options)
    asked = {"query_text": "What does the warranty cover?"}
    encoder = model.query_encoder
    own = isinstance(encoder, SentenceEncoder)  # pooled, it is the base model itself
    return model, asked, added + (weight_bytes(encoder.model) if own else 0)


def run_arm(options: argparse.Namespace) -> dict[str, int]:
    """In a process that has done nothing before."""
    with metered(options.device) as reading:
        load = {"base": base_arm, "vector": vector_arm, "text": text_arm}[options.arm]
        model, given, added = load(options)
        ids = torch.arange(5, 5 + options.prompt, device=options.device)[None]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=options.steps,
            min_new_tokens=options.steps,
            **given,
        )
    assert reading.peak_bytes is not None, "this system does not tell the peak"
    return {"peak": reading.peak_bytes, "added": added}


def in_own_process(arm: str, arguments: list[str]) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.inference_memory", *arguments, "--arm", arm]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def run(setup: Setup) -> list[Figure]:
    """Both arms with a memory beside what the base's peak and the added weights allow."""
    memory = setup.memory_folder
    base = load_settings(memory).base.name
    arguments = [str(memory), "--base", str(embedded_model_path(base) or base)]
    arguments += ["--dtype", setup.dtype, "--device", setup.device]
    arguments += ["--prompt", str(PROMPT), "--steps", str(STEPS)]
    runs = {arm: [in_own_process(arm, arguments) for _ in range(RUNS)] for arm in ARMS}
    peaks = {arm: statistics.median(run["peak"] for run in found) for arm, found in runs.items()}
    return [
        Figure(
            f"peak memory of answering, {given} given",
            "MiB",
            peaks[arm] / 2**20,
            "the base model's peak and the added weights",
            (whole := peaks["base"] + runs[arm][0]["added"]) / 2**20,
            Ratio(
                peaks[arm] / whole,
                min(run["peak"] for run in runs[arm]) / whole,
                max(run["peak"] for run in runs[arm]) / whole,
            ),
            Goal(at_most=ALLOWED),
            details={"added_weights_mib": runs[arm][0]["added"] / 2**20},
        )
        for arm, given in (("vector", "query vector"), ("text", "question"))
    ]


def main() -> None:
    """One arm, for the process that measures all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("memory")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--base", required=True)
    print(json.dumps(run_arm(parser.parse_args())))


if __name__ == "__main__":
    main()
