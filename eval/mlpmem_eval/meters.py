"""Peak memory and energy of a stretch of work, where the machine tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")
RESET_PEAK = "5"
"""Written to clear_refs, it resets the peak of the resident memory (proc(5))."""


@dataclass
class Reading:
    """Filled when the stretch has ended.

    Attributes:
        peak_bytes: most memory of the process, or of the GPU that it computes on; None: unknown.
        joules: energy of the whole machine's processors and GPUs; None: unknown.
    """

    peak_bytes: int | None = None
    joules: float | None = None


@contextmanager
def metered(device: str | torch.device = "cpu") -> Iterator[Reading]:
    """Measure what happens in the block, which computes on the device."""
    reading, place = Reading(), torch.device(device)
    _reset_peak(place)
    counters = energy_counters()
    before = [(read, read()) for read, _ in counters]
    yield reading
    reading.peak_bytes = _peak(place)
    reading.joules = _spent(before, [size for _, size in counters])


def energy_counters(root: Path = POWERCAP) -> list[tuple[Callable[[], float], float]]:
    """Readable counters of energy in joules, with the value after which each starts again."""
    counters = []
    for zone in sorted(root.glob("intel-rapl:?")):
        try:
            size = int((zone / "max_energy_range_uj").read_text()) / 1e6
            int((zone / "energy_uj").read_text())
        except (OSError, ValueError):
            continue  # not there, or only for the superuser
        counters.append((_rapl(zone / "energy_uj"), size))
    return counters + _nvidia_counters()


def _rapl(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _nvidia_counters() -> list[tuple[Callable[[], float], float]]:
    if not torch.cuda.is_available():
        return []
    try:
        import pynvml
    except ImportError:
        return []
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return []
    return [(_nvidia(nvml, handle), float("inf")) for handle in handles]


def _nvidia(nvml: Any, handle: Any) -> Callable[[], float]:  # noqa: ANN401
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _spent(before: list[tuple[Callable[[], float], float]], sizes: list[float]) -> float | None:
    if not before:
        return None
    spent = [read() - start for read, start in before]
    return sum(s if s >= 0 else s + size for s, size in zip(spent, sizes, strict=True))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return  # another system


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None
