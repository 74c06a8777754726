"""The machine: its name, and what it can do at most."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import Ceilings
from benchmarks.rounds import Work, seconds
from mlpmem_eval.environment import machine
from mlpmem_rag.hardware import has_bfloat16

MATRIX = 2048
COPIED = 1 << 28
WRITTEN = 1 << 26
RUNS = 5


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, threads and GPU, with the device that was measured."""
    return {**_machine(device), "instructions": instructions(), "device": device}


def instructions() -> str:
    """The best that the processor has for matrix products: machines of one name differ in it."""
    found = torch.cpu.get_capabilities()
    for name in ("amx_bf16", "avx512_bf16"):
        if found.get(name):
            return name
    return torch.backends.cpu.get_cpu_capability().lower()


def slug(device: str) -> str:
    """A file name from what computes: the GPU's model, or the CPU's, its best instructions and
    the number of threads."""
    found = _machine(device)
    name = f"{found['processor']} {instructions()} {found['torch_threads']} threads"
    name = found["gpu"] if device.startswith("cuda") else name
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def _machine(device: str) -> dict[str, Any]:
    """As the evaluation tells it, with the GPU that is measured."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return {**machine(), **gpu}


def ceilings(device: str, folder: Path | None = None) -> Ceilings:
    """Measured, the best of some runs: what other load takes away is not the machine's."""
    return Ceilings(
        flops={
            str(dtype).removeprefix("torch."): product_rate(dtype, device)
            for dtype in formats(torch.device(device))
        },
        bytes_per_second=copy_rate(device),
        disk_bytes_per_second=disk_rate(folder),
    )


def formats(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that the device multiplies by hardware: without, one product takes minutes."""
    halves = (torch.bfloat16,) if has_bfloat16(device) else ()
    return (torch.float32, *halves, *((torch.float16,) if device.type == "cuda" else ()))


def product_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a square product.

    By torch, and in float32 on a CPU by numpy too, whichever is faster: FAISS brings the library
    that numpy has, and on some processors it is ahead of torch's.
    """
    size = MATRIX * (4 if device.startswith("cuda") else 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ways: list[Work] = [lambda: torch.mm(a, b, out=out)]
    if dtype == torch.float32 and a.device.type == "cpu":
        ways.append(lambda: np.matmul(a.numpy(), b.numpy(), out=out.numpy()))
    best = min(seconds(way, device) for way in ways for _ in range(RUNS))
    return 2 * size**3 / best


def copy_rate(device: str) -> float:
    """Bytes a second that a copy reads and writes together."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(RUNS))
    return 2 * COPIED / best


def disk_rate(folder: Path | None) -> float:
    """Bytes a second to a file, until they are on the disk."""
    block = os.urandom(WRITTEN)
    with tempfile.NamedTemporaryFile(dir=folder) as file:

        def write() -> None:
            file.seek(0)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

        return WRITTEN / min(seconds(write) for _ in range(3))


def held_bytes(device: str) -> int:
    """Memory that this process holds now: on a GPU what torch has allocated there."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
