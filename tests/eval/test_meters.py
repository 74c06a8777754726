"""Peak memory and energy, on counters whose values are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlpmem_eval import meters
from mlpmem_eval.meters import energy_counters, metered


def zone(root: Path, name: str, microjoules: int, size: int = 10_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")
    return folder / "energy_uj"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's counters, of which there are none yet."""
    counters = energy_counters
    monkeypatch.setattr(meters, "energy_counters", lambda: counters(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_the_packages_counters_are_added_up(root: Path) -> None:
    first, second = zone(root, "intel-rapl:0", 1_000_000), zone(root, "intel-rapl:1", 5_000_000)
    part = zone(root, "intel-rapl:0:0", 7)  # a part of the first package, not to be counted twice
    with metered() as reading:
        first.write_text("3500000")
        second.write_text("5250000")
        part.write_text("9000000")
    assert reading.joules == pytest.approx(2.5 + 0.25)


def test_a_counter_that_starts_again_is_followed(root: Path) -> None:
    counter = zone(root, "intel-rapl:0", 9_000_000, size=10_000_000)
    with metered() as reading:
        counter.write_text("500000")
    assert reading.joules == pytest.approx(1.5)


def test_no_or_closed_counters_are_no_energy(root: Path) -> None:
    with metered() as reading:
        pass
    assert reading.joules is None
    zone(root, "intel-rapl:0", 1).unlink()  # as if only the superuser could read it
    assert energy_counters(root) == []
    zone(root, "intel-rapl:1", 1).write_text("nonsense")
    assert energy_counters(root) == []


@pytest.mark.skipif(not meters.STATUS.is_file(), reason="only Linux tells the peak")
def test_the_peak_is_that_of_the_stretch(root: Path) -> None:
    with metered() as before:
        pass
    with metered() as during:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
    del block
    assert before.peak_bytes is not None
    assert during.peak_bytes is not None
    assert during.peak_bytes - before.peak_bytes > 150_000_000


def test_on_a_machine_that_does_not_tell_there_is_no_peak(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "STATUS", tmp_path / "none" / "status")
    monkeypatch.setattr(meters, "CLEAR", tmp_path / "none" / "clear")
    with metered() as reading:
        pass
    assert reading.peak_bytes is None


def test_a_gpu_tells_its_own_peak(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda:1")
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {there: 12_345}[device])
    with metered("cuda:1") as reading:
        assert calls == [there]
    assert reading.peak_bytes == 12_345
    with metered("cpu") as reading:
        pass
    assert calls == [there], "a GPU that is not computed on is not asked"
    assert reading.peak_bytes != 12_345
