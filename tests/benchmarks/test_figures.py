"""Ratios, goals, ceilings and the page, by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decoding, machine, page, results, roofline
from benchmarks.figures import Ceilings, Figure, Goal, Needs, best_of
from benchmarks.rounds import Ratio, interleaved, median_ratio, timed
from mlpmem_rag.backbone import Backbone
from mlpmem_rag.memory import Memory, MemoryConfig

CEILINGS = Ceilings({"float32": 100.0, "bfloat16": 400.0}, 10.0, 1.0)


def test_a_ratio_is_the_median_with_the_interval_of_the_order() -> None:
    assert median_ratio([2, 6, 4], [1, 1, 1]) == Ratio(4.0, 2.0, 6.0)
    # 95 % of ten: from the second to the ninth.
    assert median_ratio(range(1, 11), [1] * 10) == Ratio(5.5, 2.0, 9.0)


def test_arms_take_turns_and_their_times_are_theirs() -> None:
    order: list[str] = []

    def arm(name: str, pause: float) -> None:
        order.append(name)
        time.sleep(pause)

    arms = {"slow": lambda: arm("slow", 0.02), "fast": lambda: arm("fast", 0.0)}
    took = interleaved(arms, 3)
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert all(s >= 0.02 > f for s, f in zip(took["slow"], took["fast"], strict=True))
    assert timed(lambda: 7)[0] == 7


def test_the_device_that_is_measured_is_waited_for_and_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    timed(lambda: waited.append("work"), "cuda:1")
    assert waited == ["cuda:1", "work", "cuda:1"]
    decoding._now(torch.device("cuda:1"))
    assert waited[-1] == torch.device("cuda:1")
    for name, of in (("memory_allocated", {"cuda:1": 7}), ("get_device_name", {"cuda:1": "B"})):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, of=of: of[device])
    assert machine.held_bytes("cuda:1") == 7
    assert (machine.describe("cuda:1")["gpu"], machine.slug("cuda:1")) == ("B", "b")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "chip-amx-bf16-2-threads"),
        ({"avx512_bf16": True}, "chip-avx512-bf16-2-threads"),
        ({"avx512_bf16": False}, "chip-avx2-2-threads"),
    ],
)
def test_machines_of_one_name_with_other_instructions_have_files_of_their_own(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"processor": "Chip(R)", "torch_threads": 2, "gpu": "G"}
    monkeypatch.setattr(machine, "machine", lambda: found)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.slug("cpu") == expected
    assert machine.describe("cpu")["instructions"] in expected.replace("-", "_")


def test_the_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    where = tmp_path / "page.md"
    text = page.PAGE.read_text(encoding="utf-8")
    where.write_text(text, encoding="utf-8")
    page.fill(where)
    assert where.read_text(encoding="utf-8") == text, "fill it: python -m benchmarks --page"


def test_the_slower_of_computing_and_moving_is_the_ceiling() -> None:
    computing, moving = Needs(50, 1, "float32"), Needs(50, 80, "bfloat16")
    assert (computing.seconds(CEILINGS), computing.bound(CEILINGS)) == (0.5, "compute")
    assert (moving.seconds(CEILINGS), moving.bound(CEILINGS)) == (8.0, "memory")
    figure = Figure("work", "1/s", 1.5, per_second=1.5, needs=computing)
    assert figure.fraction(CEILINGS) == 0.75
    assert replace(figure, needs=None).fraction(CEILINGS) is None
    assert Needs(50, 1, "float16").seconds(CEILINGS) == 0.5, "not measured: float32's"


@pytest.mark.parametrize(
    ("fast", "expected"), [(True, (torch.float32, torch.bfloat16)), (False, (torch.float32,))]
)
def test_products_are_measured_in_what_has_hardware(
    fast: bool, expected: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_bfloat16", lambda _: fast)
    assert machine.formats(torch.device("cpu")) == expected
    assert machine.formats(torch.device("cuda", 1)) == (*expected, torch.float16)


def test_a_product_in_float32_is_measured_by_both_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "MATRIX", 10)
    took = {"mm": 4.0, "matmul": 2.0}
    ran: list[str] = []
    for module, name in ((torch, "mm"), (np, "matmul")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: ran.append(name))

    def seconds(work: Callable[[], object], _device: str) -> float:
        work()
        return took[ran[-1]]

    monkeypatch.setattr(machine, "seconds", seconds)
    assert machine.product_rate(torch.float32, "cpu") == 2 * 10**3 / 2.0
    assert set(ran) == {"mm", "matmul"}
    assert machine.product_rate(torch.bfloat16, "cpu") == 2 * 10**3 / 4.0


def test_goals_are_of_the_ratio_where_there_is_one() -> None:
    figure = Figure("work", "s", 3.0, goal=Goal(at_least=2.0))
    assert figure.reached is True
    assert replace(figure, ratio=Ratio(1.0, 1.0, 1.0)).reached is False
    assert replace(figure, goal=Goal()).reached is None
    within = Goal(at_least=0.95, at_most=1.05)
    assert [within.reached(v) for v in (0.9, 1.0, 1.1)] == [False, True, False]
    shown = [str(g) for g in (Goal(2.0), Goal(None, 0.1), within, Goal())]
    assert shown == ["≥ 2", "≤ 0.1", "≥ 0.95, ≤ 1.05", ""]


def test_what_a_forward_pass_needs_is_counted_by_hand(tiny_backbone: Backbone) -> None:
    # Four layers of width 32: queries 32, keys and values 16 each, output 32; three MLP matrices
    # of 48. The tap is at the third layer's MLP, which does not run.
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    assert tiny_backbone.layer == 3
    weights = 4 * attention + 3 * (3 * 32 * 48)
    looked_at = (1 + 2 + 3) / 3  # each of three tokens looks at itself and those before it
    needs = roofline.forward_needs(tiny_backbone, [3], batch_tokens=10)
    assert needs.flops == 2 * weights + 4 * looked_at * 32 * 4
    assert needs.bytes == weights * 4 / 10 + 2 * 32


def test_what_training_and_decoding_need_is_counted_by_hand() -> None:
    memory = Memory(MemoryConfig(8, 12, 2, "silu", gated=True, vocab_size=20))
    weights = 2 * 3 * 8 * 12 + 8 * 20
    assert roofline.step_needs(memory, 4, "float32") == Needs(
        6 * weights, 7 * 4 * weights / 4, "float32"
    )
    assert roofline.decode_needs(weights, 2, 8, "bfloat16") == Needs(
        16 * weights, 2 * weights, "bfloat16"
    )
    assert roofline.search_needs(1000, 8) == Needs(16_000, 32, "float32")


def test_weights_that_are_shared_count_once() -> None:
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(3, 4)})
    tied["b"].weight = tied["a"].weight
    assert roofline.matrix_weights(tied) == 12


def test_the_page_divides_by_the_best_that_a_machine_was_measured_to_do(tmp_path: Path) -> None:
    lone = Figure("lone", "rows/s", 90.0, per_second=90.0, needs=Needs(1, 0, "bfloat16"))
    loaded, idle = Ceilings({"float32": 80.0, "bfloat16": 60.0}, 12.0, 0.5), CEILINGS
    cpu = {"processor": "Chip", "instructions": "avx2", "torch_threads": 2}
    about = {"machine": {"device": "cpu", "gpu": None, **cpu}}
    suites = {
        name: results.entry(figures, ceilings, 1.0, {"measured": "2026-05-02T09:00"})
        for name, figures, ceilings in (("first", [], idle), ("last", [lone], loaded))
    }
    results.merge(tmp_path / "chip.json", about, suites)
    where = tmp_path / "page.md"
    where.write_text(f"{page.BEGIN}\n{page.END}")
    page.fill(where, tmp_path)
    best = Ceilings({"float32": 100.0, "bfloat16": 400.0}, 12.0, 1.0)
    assert best_of([loaded, idle]) == best
    assert page.limits(best) in where.read_text()
    assert "| lone | 90 rows/s |  |  |  |  | 22 % |" in where.read_text(), "of 400, not of 60"


def test_the_page_gets_a_table_a_machine(tmp_path: Path) -> None:
    figures = [
        Figure("fast", "ms", 1.234, "slow", 1234.5, Ratio(9.0, 8.0, 10.0), Goal(at_least=10.0)),
        Figure("lone", "rows/s", 50.0, per_second=50.0, needs=Needs(1, 0, "float32")),
    ]
    cpu = {"processor": "Chip", "instructions": "avx2", "torch_threads": 2}
    about = {"machine": {"device": "cpu", "gpu": None, **cpu}}
    other, entry = (
        results.entry(of, CEILINGS, 1.0, {"measured": f"{day}T09:00"})
        for of, day in (([], "2026-05-02"), (figures, "2026-04-30"))
    )
    results.merge(tmp_path / "chip.json", about, {"other": other, "suite": entry})
    assert json.loads((tmp_path / "chip.json").read_text())["suites"]["suite"]["figures"][1][
        "of_ceiling"
    ] == pytest.approx(0.5)

    where = tmp_path / "page.md"
    where.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.fill(where, tmp_path)
    page.fill(where, tmp_path)  # filling again changes nothing
    text = where.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n### Chip with avx2, 2 threads\n")
    assert text.endswith(f"### GPU\n\nNot yet measured.\n{page.END}\nafter\n")
    fast = "| fast | 1.23 ms | slow | 1,234 ms | 9.00 [8.00, 10.00] | ≥ 10 (not reached) |  |"
    assert fast in text
    assert "| lone | 50 rows/s |  |  |  |  | 50 % |" in text
    assert "old" not in text
    assert "Measured on 2026-04-30 to 2026-05-02." in text


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    where = tmp_path / "page.md"
    where.write_text("nothing to fill")
    with pytest.raises(AssertionError, match="lost its marks"):
        page.fill(where, tmp_path)
    assert where.read_text() == "nothing to fill"
